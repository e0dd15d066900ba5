"""autoglm beside llama.cpp: the same files, tokens, threads and hour; a table, a JSON file and a plot.

    python benchmarks/compare_llamacpp.py [--quick] [--threads N] [--model NAME ...] [--repeats N] [--readme]

Each engine lives in its own process (engine_worker.py) and they take turns inside one run, so a noisy minute hits
both; the medians are compared, the spread is printed. Before anything is timed both must give a sane answer:
SmolLM2 the same greedy text, the random glm4 file logits that point the same way, alone and in eight streams.
llama.cpp runs through its C API with n_batch = n_ubatch = 512 and as many threads as we have, with flash attention
and without, streams with one cache for all of them and with one each; for each phase the best of its ways stands for
it. Both caches hold 16 bits a number, theirs f16, ours i16, each the default. Phases:

    prefill          512 tokens in one go
    prefill_long     4,096 tokens in steps of 512 (glm4; half the repeats: it takes minutes)
    decode           right behind a prompt of 16 tokens, in three rounds a turn, the engines after each other in each
    decode_deep      behind those 512
    decode_streams   8 streams at once, each behind a prompt of its own of 16 tokens; tokens in all

Beside them: what the machine's memory gives when it is only read, before and after each decode (which reads every
matrix but the token table once a token), and oneDNN's int8 products of the layers' shapes (product_worker.py; needs
torch). The speed of a shared machine's memory may change within seconds, so decode's ratio is the median of what its
rounds have each.
Memory: fresh processes with one context of 4,096 + 32 tokens (or 512 + 32), after filling it, against file size +
KV + 15%. --readme writes the table into both READMEs (compare_report.py).

What is missing of the [bench] extra is installed first; llama-cpp-python is built for this very CPU, which takes
minutes (--no-install stops instead).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from compare_report import draw_pair as draw_pair
from compare_report import plot, table, write_readmes
from compare_report import save_figure as save_figure

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
GLM4_NAME = "glm4-9b-shapes-8-layers-Q4_K_M.gguf"
PHASES = ("prefill", "prefill_long", "decode", "decode_deep", "decode_streams")
SHORT_PROMPT = 16
DECODE_ROUNDS = 3
STREAMS, STREAM_STEPS = 8, 16
LONG_PREFILL = 4096
ENGINES = {"autoglm": ["autoglm"], "llama.cpp": ["llama.cpp"], "llama.cpp flash": ["llama.cpp", "flash"]}
# How llama.cpp may run; those with one cache for all streams differ from the others only where there are several.
WAYS = {
    "llama.cpp": {"flash": False, "unified": False},
    "llama.cpp flash": {"flash": True, "unified": False},
    "llama.cpp unified": {"flash": False, "unified": True},
    "llama.cpp flash unified": {"flash": True, "unified": True},
}
TARGETS = {
    "smollm2": {"prefill": 8.0, "decode": 2.0},
    "glm4": {"prefill": 4.0, "prefill_long": 3.5, "decode": 1.45, "decode_streams": 4.0},
}
TARGET_LIMITS = {"smollm2": {}, "glm4": {"bandwidth": 0.9, "onednn": 0.75}}  # of decode, of the layers' products
TARGET_MEMORY = 1.15  # of file size + KV
LEAST_COSINE = 0.99


@dataclass(frozen=True)
class Workload:
    """One model: its prompt, which is prefilled to 512 tokens or whole, what is decoded after it, and 8 streams."""

    name: str
    path: Path
    prefill: int
    token_ids: list[int]
    steps: list[int]
    prompts: list[list[int]]
    stream_steps: list[list[int]]

    @classmethod
    def draw(cls, name: str, path: Path, last_id: int, num_tokens: int, num_steps: int) -> Workload:
        rng = np.random.default_rng(0)

        def ids(*shape: int) -> Any:
            return rng.integers(100, last_id, shape).tolist()

        streams = ids(STREAMS, SHORT_PROMPT), ids(STREAMS, STREAM_STEPS)
        return cls(name, path, 512, ids(num_tokens), ids(num_steps), *streams)

    @property
    def context(self) -> int:
        """Tokens a cache of one stream holds."""
        return len(self.token_ids) + len(self.steps)


class Worker:
    """One engine in its own process, running a script of this folder; see engine_worker.py for the protocol."""

    def __init__(self, script: str, *arguments: object, **variables: str) -> None:
        environment = {
            **os.environ,
            **variables,
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.description = self._read()["ready"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine's process ended with code {self.process.wait()}; its message is above")
        return dict(json.loads(line))

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def install_missing(allowed: bool, *, with_llama: bool = True) -> None:
    """The [bench] extra, llama.cpp compiled with the instructions of this CPU."""
    needs = {"gguf": "gguf>=0.17,<1", "matplotlib": "matplotlib>=3.9,<4"}
    if with_llama:
        needs["llama_cpp"] = "llama-cpp-python>=0.3.36,<0.4"
    missing = [package for module, package in needs.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return
    if not allowed:
        raise SystemExit(
            f"missing: {', '.join(missing)}; run again without --no-install, or pip install 'autoglm[bench]'"
        )
    environment = {**os.environ, "CMAKE_ARGS": f"{os.environ.get('CMAKE_ARGS', '')} -DGGML_NATIVE=ON"}
    print(f"installing {', '.join(missing)}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "install", "--no-binary", "llama-cpp-python", *missing]
    if subprocess.run(command, env=environment, check=False).returncode:
        raise SystemExit("pip could not install what the benchmark needs; its message is above")
    importlib.invalidate_caches()


def cache_folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("autoglm")) / "benchmarks"


def workloads(names: list[str]) -> list[Workload]:
    """The files, fetched or written where they are not there yet."""
    found = []
    if "smollm2" in names:
        from autoglm.deploy.pull import pull

        found.append(Workload.draw("smollm2", pull("smollm2-135m").path, 48_000, 512, 128))
    if "glm4" in names:
        path = cache_folder() / GLM4_NAME
        if not path.exists():
            from glm4_file import write_glm4_file

            print(f"writing {path} (1.9 GB, once)", file=sys.stderr)
            write_glm4_file(path)
        found.append(Workload.draw("glm4", path, 150_000, LONG_PREFILL, 32))
    return found


def check_smollm2(ours: Worker, theirs: Worker, path: Path) -> str:
    """Both engines answer a question; the first words must be the same and right."""
    from autoglm.chat.tokenizer import Tokenizer
    from autoglm.formats.gguf import GGUFFile

    with GGUFFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = [tokenizer.encode(prompt)]
    texts = [tokenizer.decode(w.ask(op="greedy", token_ids=ids, num_tokens=8)["greedy"]) for w in (ours, theirs)]
    if any("Paris" not in text for text in texts):
        raise SystemExit(f"an engine gives nonsense, nothing was timed: {texts}")
    return f"both answer {texts[0]!r}" if texts[0] == texts[1] else f"autoglm {texts[0]!r}, llama.cpp {texts[1]!r}"


def check_logits(ours: Worker, theirs: Worker, token_ids: list[list[int]], steps: list[list[int]]) -> str:
    """Random weights say nothing in words, so every stream's logits must point the same way, whatever the way."""
    cosines, steps = [], [stream[:2] for stream in steps]
    for way, streams in [(way, count) for way in WAYS.values() for count in (1, STREAMS)]:
        request = {"op": "run", "token_ids": token_ids[:streams], "steps": steps[:streams], **way}
        request |= {"logits": True, "max_tokens": SHORT_PROMPT + STREAM_STEPS}
        a, b = (np.array(worker.ask(**request)["logits"]) for worker in (ours, theirs))
        cosines += list((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
    if not min(cosines) > LEAST_COSINE:  # a NaN fails too
        raise SystemExit(f"the engines disagree, nothing was timed: cosine of their logits {min(cosines):.4f}")
    return f"cosine of the two engines' logits at least {min(cosines):.5f}"


def measure(worker: Worker, load: Workload, way: dict[str, bool], is_long: bool) -> dict[str, float]:
    """Tokens per second of each phase, once; of streams alone where the way differs only for them."""
    several = worker.ask(op="run", token_ids=load.prompts, steps=load.stream_steps, **way)
    rates = {"decode_streams": STREAMS * STREAM_STEPS / several["decode_s"]}
    if way.get("unified"):
        return rates
    alone = {"op": "run", "steps": [load.steps], "max_tokens": load.context, **way}
    deep = worker.ask(token_ids=[load.token_ids[: load.prefill]], **alone)
    rates["prefill"] = load.prefill / deep["prefill_s"]
    rates["decode_deep"] = len(load.steps) / deep["decode_s"]
    if is_long:
        rates["prefill_long"] = (
            len(load.token_ids) / worker.ask(**{**alone, "token_ids": [load.token_ids]})["prefill_s"]
        )
    return rates


def decode_rate(worker: Worker, load: Workload, way: dict[str, bool]) -> float:
    """Tokens a second of one stream behind a short prompt."""
    request = {"token_ids": [load.token_ids[:SHORT_PROMPT]], "steps": [load.steps], "max_tokens": load.context}
    return len(load.steps) / float(worker.ask(op="run", **request, **way)["decode_s"])


def measure_memory(load: Workload, threads: int) -> dict[str, Any]:
    """Peak of a fresh process of each engine that has filled one context, beside file size + KV."""
    found: dict[str, Any] = {"context_tokens": load.context, "file_bytes": load.path.stat().st_size}
    for engine, (kind, *flash) in ENGINES.items():
        worker = Worker("engine_worker.py", kind, load.path, threads, load.context)
        worker.ask(op="run", token_ids=[load.token_ids], steps=[load.steps], flash=bool(flash))
        found[engine] = worker.ask(op="memory")
        worker.close()
    found["kv_bytes"] = found["autoglm"]["kv_token_bytes"] * load.context
    found["target_bytes"] = TARGET_MEMORY * (found["file_bytes"] + found["kv_bytes"])
    return found


def run(load: Workload, threads: int, repeats: int, with_onednn: bool) -> dict[str, Any]:
    """All repeats of one model, the engines in turn, and the medians."""
    from engine_limits import Memory, measure_products, shares, start_products

    pool = max(load.context, STREAMS * (SHORT_PROMPT + STREAM_STEPS))
    ours, theirs = (Worker("engine_worker.py", kind, load.path, threads, pool) for kind in ("autoglm", "llama.cpp"))
    if load.name == "smollm2":
        check = check_smollm2(ours, theirs, load.path)
    else:
        check = check_logits(ours, theirs, load.prompts, load.stream_steps)
    print(f"{load.name}: {check}", file=sys.stderr)
    ways = {"autoglm": (ours, {}), **{name: (theirs, way) for name, way in WAYS.items()}}
    samples: dict[str, dict[str, list[float]]] = {engine: {} for engine in ways}
    beside: dict[str, list[float]] = {}  # GB a second that the memory gave beside each decode
    bounds: dict[str, list[float]] = {}
    memory = Memory(threads)
    # The products are the 9B's; of a small model the layers would fit the cache.
    products = start_products(load.path, threads, Worker) if with_onednn and load.name == "glm4" else {}
    for worker, way in ways.values():  # one round nobody counts: page faults, clocks, caches
        request = {"op": "run", "steps": [load.steps[:4]], "max_tokens": load.context, **way}
        worker.ask(token_ids=[load.token_ids[:128]], **request)
    for turn in range(repeats):
        for engine, (worker, way) in ways.items():
            for phase, value in measure(worker, load, way, load.prefill < len(load.token_ids) and not turn % 2).items():
                samples[engine].setdefault(phase, []).append(value)
        before = memory.gb_per_s()
        for _ in range(DECODE_ROUNDS):
            for engine, (worker, way) in ways.items():
                if way.get("unified"):
                    continue
                samples[engine].setdefault("decode", []).append(decode_rate(worker, load, way))
                after = memory.gb_per_s()
                beside.setdefault(engine, []).append((before + after) / 2)
                before = after
        for name, value in measure_products(products).items():
            bounds.setdefault(name, []).append(value)
        print(f"{load.name}: turn {turn + 1} of {repeats}", file=sys.stderr)
    for worker in (ours, theirs, *products.values()):
        worker.close()
    medians = {e: {p: statistics.median(v) for p, v in phases.items()} for e, phases in samples.items()}
    alone = medians["autoglm"]
    peer = {p: max((e for e in WAYS if p in medians[e]), key=lambda e: medians[e][p]) for p in alone}
    ratio = {p: alone[p] / medians[peer[p]][p] for p in peer}
    engines = {"autoglm": "autoglm", "llama.cpp": peer["decode"]}
    decode = {name: samples[engine]["decode"] for name, engine in engines.items()}
    ratio["decode"] = statistics.median(a / b for a, b in zip(*decode.values(), strict=True))
    return {
        "model": load.path.name,
        "prefill_tokens": load.prefill,
        "prefill_long_tokens": len(load.token_ids),
        "decode_tokens": len(load.steps),
        "streams": STREAMS,
        "check": check,
        "engines": {"autoglm": ours.description, "llama.cpp": theirs.description}
        | {name: worker.description["engine"] for name, worker in products.items() if name == "onednn"},
        "samples_tokens_per_s": samples,
        "median_tokens_per_s": medians,
        "best_llama_cpp": peer,
        "ratio": ratio,
        "target_ratio": TARGETS[load.name],
        "target_limits": TARGET_LIMITS[load.name],
        "limits": {
            "samples": {"memory_gb_s": beside, **bounds},
            **shares(
                load.path,
                alone["prefill"],
                decode,
                {name: beside[engine] for name, engine in engines.items()},
                bounds,
            ),
        },
        "memory": measure_memory(load, threads),
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    has_llama = importlib.util.find_spec("llama_cpp") is not None
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit,
        "python": platform.python_version(),
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python") if has_llama else None,
        "load_average": os.getloadavg()[0],
    }


def run_options(description: str | None) -> argparse.ArgumentParser:
    """The options of every comparison with another engine."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-install", action="store_true", help="stop if something is missing")
    parser.add_argument("--quick", action="store_true", help="one repeat: a smoke test, not a result")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the plot")
    return parser


def parse_run(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What run_options and its caller asked for, counts checked."""
    arguments = parser.parse_args()
    if min(arguments.repeats, arguments.threads) < 1:
        parser.error("--repeats and --threads must be 1 or more")
    return arguments


def main() -> None:
    parser = run_options(__doc__)
    parser.add_argument("--model", nargs="+", choices=["smollm2", "glm4"], default=["smollm2", "glm4"])
    parser.add_argument("--no-onednn", action="store_true", help="leave out the products of oneDNN, which need torch")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md and README.zh.md")
    arguments = parse_run(parser)
    sys.path[:0] = [str(HERE.parent)]
    install_missing(not arguments.no_install)
    results: dict[str, Any] = {"machine": machine(), "threads": arguments.threads, "workloads": {}}
    repeats = 1 if arguments.quick else arguments.repeats
    for load in workloads(arguments.model):
        results["workloads"][load.name] = run(load, arguments.threads, repeats, not arguments.no_onednn)
    print(table(results))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "compare_llamacpp.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, arguments.output / "compare_llamacpp.png")
    print(f"written: {arguments.output}/compare_llamacpp.json and .png")
    if arguments.readme:
        write_readmes(results)


if __name__ == "__main__":
    main()
