"""autoglm bench: prefill, time to first token, decode alone and batched, on this machine.

Runs the engine itself, without HTTP, with the prefix cache off so that every prompt is computed, and without drafts, as
what they bring is a matter of the text. One warm-up, then
`repeats` runs of each; the median is shown with the spread. Prompt tokens are drawn from the vocabulary with a fixed
seed: what the tokens are does not change how long they take.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from msgspec.structs import replace
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from autoglm import __version__
from autoglm.cli.console import ProgressBars, parameter_count, size
from autoglm.cli.loading import LoadedModel, ModelOptions, check_model_option, find_model, load_model
from autoglm.deploy.machine import cpu_name
from autoglm.engine.engine import Engine
from autoglm.engine.sampling import SamplingParams
from autoglm.engine.sequence import Sequence, SequenceOutput
from autoglm.errors import ConfigError, EngineError

_SHORT_PROMPT = 16


@dataclass(frozen=True)
class BenchOptions:
    """How much to measure: prompt and answer lengths in tokens, batch sizes, runs of each."""

    prompt_tokens: int = 512
    decode_tokens: int = 64
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    repeats: int = 3
    as_json: bool = False


def run_bench(model: ModelOptions, options: BenchOptions) -> None:
    """Load the model, measure, print the table and, with as_json, one line of JSON instead."""
    check_model_option(model)
    model = replace(model, prefix_cache=False, draft_max=0, parallel=max(model.parallel, *options.batches))
    with ProgressBars() as bars:
        loaded = load_model(find_model(model, bars.report), model, bars.report)
    _check_room(loaded, options)
    results = measure(loaded, options)
    if options.as_json:
        print(json.dumps(results))
    else:
        Console().print(_table(results))


def measure(loaded: LoadedModel, options: BenchOptions) -> dict[str, Any]:
    """Every figure as plain values: tokens per second, milliseconds, bytes."""
    workload = Workload(loaded.engine, loaded.model_config.vocab_size)
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True
    ) as progress:
        task = progress.add_task("warming up")

        def sample(what: str, run: Callable[[], float]) -> dict[str, float]:
            progress.update(task, description=f"measuring {what}")
            return _spread([run() for _ in range(options.repeats)])

        workload.prefill_s(options.prompt_tokens)
        workload.decode_rate(1, 8)
        prefill = sample("prefill", lambda: options.prompt_tokens / workload.prefill_s(options.prompt_tokens))
        first = sample("time to first token", lambda: 1000 * workload.prefill_s(_SHORT_PROMPT))
        first_long = {"median": 1000 * options.prompt_tokens / prefill["median"]}
        decode = {
            str(batch): sample(
                f"decode of {batch} at once", partial(workload.decode_rate, batch, options.decode_tokens)
            )
            for batch in options.batches
        }
    alone = decode.get("1")
    return {
        "autoglm": __version__,
        "kernels": loaded.runtime.isa,
        "cpu": cpu_name(),
        "threads": loaded.engine_config.num_threads,
        "model": loaded.model_id,
        "file": loaded.path.name,
        "num_parameters": loaded.model_config.num_parameters,
        "weights_bytes": loaded.plan.weights_bytes,
        "prompt_tokens": options.prompt_tokens,
        "decode_tokens": options.decode_tokens,
        "repeats": options.repeats,
        "prefill_tokens_per_s": prefill,
        "first_token_ms": {str(_SHORT_PROMPT): first, str(options.prompt_tokens): first_long},
        "decode_tokens_per_s": decode,
        # Every weight is read once a token, so this is what decode takes from the memory at least.
        "decode_weights_gb_per_s": None if alone is None else alone["median"] * loaded.plan.weights_bytes / 1e9,
    }


class Workload:
    """Runs synthetic sequences through an engine and times the part asked for; greedy unless sampling is set."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self.sampling = SamplingParams(temperature=0.0)
        self._engine = engine
        self._random = random.Random(0)
        self._vocab_size = vocab_size
        self._num_requests = 0

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds from adding a prompt of num_tokens to its first token."""
        started = time.perf_counter()
        self._add(num_tokens, 1)
        while self._engine.has_work():
            self._step()
        return time.perf_counter() - started

    def decode_rate(self, batch: int, num_tokens: int) -> float:
        """Tokens per second over batch sequences that each produce num_tokens after their first."""
        self.begin_decode(batch, num_tokens)
        started = time.perf_counter()
        produced = self.finish()
        return produced / (time.perf_counter() - started)

    def begin_decode(self, batch: int, num_tokens: int) -> None:
        """Add batch sequences of num_tokens after their first, and step until each has its first."""
        waiting = {self._add(_SHORT_PROMPT, num_tokens + 1) for _ in range(batch)}
        while waiting:  # prompts of a batch may take several steps
            waiting -= {output.request_id for output in self._step()}

    def finish(self) -> int:
        """Step until nothing is left to do; the tokens produced."""
        produced = 0
        while self._engine.has_work():
            produced += sum(len(output.token_ids) for output in self._step())
        return produced

    def _add(self, num_prompt: int, num_output: int) -> str:
        self._num_requests += 1
        request_id = f"bench-{self._num_requests}"
        prompt = [self._random.randrange(self._vocab_size) for _ in range(num_prompt)]
        params = replace(self.sampling, max_tokens=num_output, ignore_eos=True)
        self._engine.add(Sequence(request_id, prompt, params, arrival_s=time.perf_counter()))
        return request_id

    def _step(self) -> list[SequenceOutput]:
        outputs = self._engine.step()
        for output in outputs:
            if output.finish_reason == "error":
                raise EngineError(f"the engine failed while measuring: {output.error}")
        return outputs


def _check_room(loaded: LoadedModel, options: BenchOptions) -> None:
    if min(options.prompt_tokens, options.decode_tokens, options.repeats, *options.batches) < 1:
        raise ConfigError("prompt, decode, batch and repeat counts are at least 1")
    room = loaded.engine.max_sequence_tokens
    needed = max(options.prompt_tokens + 1, _SHORT_PROMPT + options.decode_tokens + 1)
    if needed > room:
        raise ConfigError(f"the bench needs a context of {needed} tokens, and there are {room}; lower -p or -n")


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _table(results: dict[str, Any]) -> Table:
    title = (
        f"{results['model']}: {parameter_count(results['num_parameters'])} parameters, "
        f"{size(results['weights_bytes'])}, {results['threads']} threads, {results['kernels']} kernels"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("median", justify="right")
    table.add_column("spread", justify="right")

    def row(what: str, spread: dict[str, float], unit: str) -> None:
        between = f"{spread['min']:.1f} to {spread['max']:.1f}" if "min" in spread else ""
        table.add_row(what, f"{spread['median']:.1f} {unit}", between)

    row(f"prefill of {results['prompt_tokens']} tokens", results["prefill_tokens_per_s"], "tokens/s")
    for prompt, spread in results["first_token_ms"].items():
        row(f"first token after a prompt of {prompt}", spread, "ms")
    for batch, spread in results["decode_tokens_per_s"].items():
        row("decode" if batch == "1" else f"decode, {batch} at once", spread, "tokens/s")
    rate = results["decode_weights_gb_per_s"]
    if rate is not None:
        table.add_row("weights read in decode", f"{rate:.1f} GB/s", "")
    return table
