"""autoglm bench --roofline: every operation of a step beside what this machine can do at most.

The limits are measured in the same run, before and after the steps, all threads at once, the better of the two: reading
memory, 8-bit, 16-bit and float multiply-adds. An operation's limit is the longer of two times: its bytes at the read
limit, its multiply-adds at their limits. Bytes are those of packed weights, table rows and cached keys and values;
activations stay in caches and are not counted. Nor is what a product does besides its multiply-adds (unpacking,
scales), so 100 % is out of reach, unless weights stay in a cache: then a rate may be above the memory's.

Steps run on the runner itself over a cache that was filled, not computed: time does not depend on what it holds. Of
their repeats the fastest is shown whole, so that its parts add up. What Python and sampling cost beside it is measured
in the engine's own decode loop.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from autoglm import __version__
from autoglm.cli.bench import Workload
from autoglm.cli.console import ProgressBars, parameter_count, size
from autoglm.cli.loading import LoadedModel, ModelOptions, check_model_option, find_model, load_model
from autoglm.deploy.machine import cpu_name, read_test_bytes
from autoglm.engine.batch import Batch
from autoglm.engine.model_runner import CpuModelRunner
from autoglm.engine.sampling import SamplingParams
from autoglm.errors import ConfigError
from autoglm.formats.quant_types import GGMLType
from autoglm.kernels import MachineLimits, OpProfile, measure_limits

_DEFAULT_DEPTH = 8192
_STREAMS = 8
_LIMIT_S = 0.4  # for each limit, twice in a run
_STEP_S = 0.5  # short steps are repeated for so long
_SAMPLINGS = {"greedy": SamplingParams(temperature=0.0), "top_p": SamplingParams(temperature=0.8, top_p=0.95, seed=0)}
_WIDTH = 120  # of the tables where there is no terminal to fit


@dataclass(frozen=True)
class RooflineOptions:
    """What is looked at: a prompt's length, tokens decoded by the engine, the context of the deep steps, repeats."""

    prompt_tokens: int = 512
    decode_tokens: int = 64
    depth: int | None = None
    repeats: int = 3
    as_json: bool = False


_MACS = ("int8_macs", "int16_macs", "float_macs")


@dataclass(frozen=True)
class _Limits:
    """The better of the measurements, per second."""

    read_bytes: float
    int8_macs: float
    int16_macs: float
    float_macs: float

    def better_of(self, other: MachineLimits) -> _Limits:
        return _Limits(
            max(self.read_bytes, other.read_bytes_per_s),
            max(self.int8_macs, other.int8_macs_per_s),
            max(self.int16_macs, other.int16_macs_per_s),
            max(self.float_macs, other.float_macs_per_s),
        )


def run_roofline(model: ModelOptions, options: RooflineOptions) -> None:
    """Load the model, measure, print the tables and, with as_json, one line of JSON instead."""
    check_model_option(model)
    model = replace(model, prefix_cache=False)
    with ProgressBars() as bars:
        loaded = load_model(find_model(model, bars.report), model, bars.report)
    results = measure_roofline(loaded, options)
    if options.as_json:
        print(json.dumps(results))
    else:
        _print(results)


def measure_roofline(loaded: LoadedModel, options: RooflineOptions) -> dict[str, Any]:
    """Limits, steps with their operations, and the engine's loop, as plain values; docs/performance.md has the keys.

    Raises ConfigError if the engine has no room for the steps asked for.
    """
    runner = loaded.engine.runner
    assert isinstance(runner, CpuModelRunner)
    depth = _checked_depth(loaded, options)
    num_prompt = options.prompt_tokens
    limit = partial(measure_limits, runner.runtime, read_test_bytes(), _LIMIT_S)
    limits = _Limits(0, 0, 0, 0).better_of(limit())
    runner.fill_cache()
    steps = [
        _Step("decode", 1, 1, num_prompt + 1),
        _Step("decode", _num_streams(loaded, num_prompt + 1), 1, num_prompt + 1),
        _Step("decode", 1, 1, depth),
        _Step("prefill", 1, num_prompt, num_prompt),
        _Step("prefill", 1, num_prompt, depth),
    ]
    measured = [step.measure(runner, options.repeats) for step in steps]
    limits = limits.better_of(limit())
    return {
        "autoglm": __version__,
        "kernels": loaded.runtime.isa,
        "cpu": cpu_name(),
        "threads": runner.runtime.num_threads,
        "model": loaded.model_id,
        "file": loaded.path.name,
        "num_parameters": loaded.model_config.num_parameters,
        "weights_bytes": loaded.plan.weights_bytes,
        "repeats": options.repeats,
        "limits": {
            "read_gb_per_s": limits.read_bytes / 1e9,
            "int8_gmac_per_s": limits.int8_macs / 1e9,
            "int16_gmac_per_s": limits.int16_macs / 1e9,
            "float_gmac_per_s": limits.float_macs / 1e9,
        },
        "steps": [_described(step, limits, runner.runtime.num_threads) for step in measured],
        "engine": [
            _engine_cost(loaded, num_seqs, sampling, options)
            for num_seqs in sorted({1, loaded.engine.scheduler.max_num_running})
            for sampling in _SAMPLINGS
        ],
    }


def _checked_depth(loaded: LoadedModel, options: RooflineOptions) -> int:
    runner, room = loaded.engine.runner, loaded.engine.max_sequence_tokens
    depth = min(_DEFAULT_DEPTH, room) if options.depth is None else options.depth
    most = runner.max_num_batched_tokens
    if options.prompt_tokens > most:
        raise ConfigError(f"a prefill step takes {most} tokens at most, not {options.prompt_tokens}; lower -p")
    if depth > room:
        raise ConfigError(f"--depth is {depth}, and there is room for a context of {room} tokens; lower it")
    if depth <= options.prompt_tokens:
        raise ConfigError(
            f"the deep steps need a context of more than the prompt's {options.prompt_tokens} tokens and have {depth}; "
            "lower -p or raise --depth"
        )
    return depth


def _num_streams(loaded: LoadedModel, context: int) -> int:
    """How many sequences of that context the batched step has: eight, fewer where there is no room."""
    manager = loaded.engine.block_manager
    fitting = manager.num_blocks // -(-context // manager.block_size)
    return min(_STREAMS, loaded.engine.scheduler.max_num_running, fitting)


@dataclass(frozen=True)
class _Step:
    """num_seqs sequences, num_tokens of each at the end of its context."""

    kind: str
    num_seqs: int
    num_tokens: int
    context: int

    def measure(self, runner: CpuModelRunner, repeats: int) -> _MeasuredStep:
        """Once to warm up, then with and without the clocks in turn."""
        batch, until_s = self._batch(runner), time.perf_counter() + _STEP_S
        runner.run(batch)
        runs: list[tuple[float, list[OpProfile]]] = []
        plain: list[float] = []
        while len(runs) < repeats or time.perf_counter() < until_s:
            started_s = time.perf_counter()
            runner.run(batch)
            plain.append(time.perf_counter() - started_s)
            runs.append(runner.profile(batch))
        took_s, operations = min(runs, key=lambda run: run[0])
        return _MeasuredStep(self, took_s, min(plain), float(np.median(plain)), operations)

    def _batch(self, runner: CpuModelRunner) -> Batch:
        num_blocks = -(-self.context // runner.block_size)
        positions = np.arange(self.context - self.num_tokens, self.context, dtype=np.int32)
        first_slots = np.arange(self.num_seqs, dtype=np.int32)[:, None] * np.int32(num_blocks * runner.block_size)
        ends = np.arange(self.num_seqs + 1, dtype=np.int32) * np.int32(self.num_tokens)
        return Batch(
            token_ids=np.random.default_rng(0).integers(0, runner.vocab_size, ends[-1], dtype=np.int32),
            positions=np.tile(positions, (3, self.num_seqs)),
            slot_mapping=(first_slots + positions).ravel(),
            cu_seqlens_q=ends,
            context_lens=np.full(self.num_seqs, self.context, np.int32),
            block_tables=np.arange(self.num_seqs * num_blocks, dtype=np.int32).reshape(self.num_seqs, num_blocks),
            logits_rows=ends[1:] - np.int32(1),
        )


@dataclass(frozen=True)
class _MeasuredStep:
    """The fastest run with clocks and its operations; the fastest and the median run without."""

    step: _Step
    took_s: float
    plain_s: float
    median_s: float
    operations: list[OpProfile]


def _described(measured: _MeasuredStep, limits: _Limits, num_threads: int) -> dict[str, Any]:
    """One step as plain values; equal operations of all layers are one entry."""
    groups: dict[str, dict[tuple[object, ...], list[OpProfile]]] = {}
    for operation in measured.operations:
        of_name = groups.setdefault(operation.name, {})
        of_name.setdefault((operation.rows, operation.cols, *operation.types), []).append(operation)
    rows = [_row(group, limits, num_threads) for of_name in groups.values() for group in of_name.values()]
    num_bytes = sum(row["bytes"] for row in rows)
    macs = {name: sum(row[name] for row in rows) for name in _MACS}
    took_s = measured.took_s
    inside_ms = sum(row["ms"] for row in rows)
    return {
        "kind": measured.step.kind,
        "num_seqs": measured.step.num_seqs,
        "num_tokens": measured.step.num_tokens,
        "context": measured.step.context,
        "ms": 1e3 * took_s,
        "plain_ms": 1e3 * measured.plain_s,
        "plain_median_ms": 1e3 * measured.median_s,
        "bytes": num_bytes,
        **macs,
        "gb_per_s": num_bytes / took_s / 1e9,
        "gmac_per_s": sum(macs.values()) / took_s / 1e9,
        "limit_percent": sum(row["limit_ms"] for row in rows) / took_s / 10,
        "busy_percent": 100 * sum(o.busy_s for o in measured.operations) / (took_s * num_threads),
        "outside_ms": 1e3 * took_s - inside_ms,
        "operations": rows,
    }


def _row(group: list[OpProfile], limits: _Limits, num_threads: int) -> dict[str, Any]:
    first = group[0]
    seconds = sum(operation.seconds for operation in group)
    num_bytes = sum(operation.bytes for operation in group)
    macs = {name: sum(getattr(operation, name) for operation in group) for name in _MACS}
    bounds = {name.removesuffix("_macs"): amount / getattr(limits, name) for name, amount in macs.items()}
    memory_s = num_bytes / limits.read_bytes
    limit_s, bounds["memory"] = max(sum(bounds.values()), memory_s), memory_s
    types = "+".join(GGMLType(number).name for number in first.types)
    return {
        "operation": first.name,
        "weights": f"{first.rows} x {first.cols} {types}" if first.rows else None,
        "calls": sum(operation.calls for operation in group),
        "ms": 1e3 * seconds,
        "bytes": num_bytes,
        **macs,
        "gb_per_s": _rate(num_bytes, seconds),
        "gmac_per_s": _rate(sum(macs.values()), seconds),
        "bound": max(bounds, key=lambda name: bounds[name]) if limit_s else None,
        "limit_ms": 1e3 * limit_s,
        "limit_percent": 100 * limit_s / seconds if limit_s and seconds else None,
        "busy_percent": 100 * sum(o.busy_s for o in group) / (seconds * num_threads) if seconds else None,
    }


def _rate(amount: float, seconds: float) -> float | None:
    """Billions a second; None where there was nothing to count."""
    return amount / seconds / 1e9 if amount and seconds else None


def _engine_cost(loaded: LoadedModel, num_seqs: int, sampling: str, options: RooflineOptions) -> dict[str, Any]:
    """Where a decode step of the engine goes: the model's program, sampling, and the Python around both, in us."""
    engine, best = loaded.engine, None
    workload = Workload(engine, loaded.model_config.vocab_size)
    workload.sampling = _SAMPLINGS[sampling]
    for _ in range(options.repeats):
        workload.begin_decode(num_seqs, options.decode_tokens)
        before = engine.stats()
        workload.finish()
        after = engine.stats()
        us_per_step = 1e6 / (after.num_steps_total - before.num_steps_total)
        step = us_per_step * (after.step_s - before.step_s)
        model = us_per_step * (after.runner_s - before.runner_s)
        sampled = us_per_step * (after.sampling_s - before.sampling_s)
        if best is None or step < best["step_us"]:
            python = step - model - sampled
            best = {"step_us": step, "model_us": model, "sampling_us": sampled, "python_us": python}
    assert best is not None
    beside = 100 * (best["sampling_us"] + best["python_us"]) / best["step_us"]
    return {"num_seqs": num_seqs, "sampling": sampling, **best, "beside_percent": beside}


def _print(results: dict[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    limits = results["limits"]
    console.print(
        f"{results['model']}: {parameter_count(results['num_parameters'])} parameters, "
        f"{size(results['weights_bytes'])}, {results['threads']} threads, {results['kernels']} kernels, "
        f"{results['cpu']}\n"
        f"Limits measured in this run: {limits['read_gb_per_s']:.1f} GB/s read, {limits['int8_gmac_per_s']:.0f} GMAC/s "
        f"in 8 bits, {limits['int16_gmac_per_s']:.0f} in 16, {limits['float_gmac_per_s']:.0f} in floats",
        markup=False,
        highlight=False,
    )
    for step in results["steps"]:
        console.print(_step_table(step))
    console.print(_engine_table(results["engine"]))


def _shown(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _step_table(step: dict[str, Any]) -> Table:
    sequences = f"{step['num_seqs']} sequences, " if step["num_seqs"] > 1 else ""
    title = (
        f"{step['kind']} of {step['num_tokens']}, {sequences}context {step['context']}: {step['ms']:.2f} ms "
        f"({step['plain_ms']:.2f} without clocks, median {step['plain_median_ms']:.2f})"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("operation", no_wrap=True)
    table.add_column("weights", no_wrap=True)
    for name in ("calls", "ms", "% of step", "GB/s", "GMAC/s"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for name in ("% of limit", "% busy"):
        table.add_column(name, justify="right")
    for row in [*step["operations"], {"operation": "outside", "ms": step["outside_ms"]}, {"operation": "step", **step}]:
        table.add_row(
            row["operation"],
            row.get("weights") or "",
            str(row.get("calls", "")),
            _shown(row["ms"], 2),
            _shown(100 * row["ms"] / step["ms"]),
            _shown(row.get("gb_per_s")),
            _shown(row.get("gmac_per_s")),
            row.get("bound") or "",
            _shown(row.get("limit_percent"), 0),
            _shown(row.get("busy_percent"), 0),
        )
    return table


def _engine_table(costs: list[dict[str, Any]]) -> Table:
    table = Table(title="a decode step of the engine, us", title_justify="left")
    table.add_column("sequences", justify="right")
    table.add_column("sampling")
    for name in ("step", "model", "sampling", "Python", "% beside the model"):
        table.add_column(name, justify="right")
    for cost in costs:
        columns = (_shown(cost[f"{name}_us"], 0) for name in ("step", "model", "sampling", "python"))
        table.add_row(str(cost["num_seqs"]), cost["sampling"], *columns, _shown(cost["beside_percent"]))
    return table
