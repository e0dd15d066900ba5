"""autoglm beside llama.cpp: the same files, tokens, threads and hour; a table, a JSON file and a plot.

    python benchmarks/compare_llamacpp.py [--quick] [--threads N] [--model NAME ...] [--repeats N]

Each engine lives in its own process (engine_worker.py) and they take turns inside one run, so a noisy minute hits
both; the medians are compared, the spread is printed. Before anything is timed both must give a sane answer:
SmolLM2 the same greedy text, the random glm4 file logits that point the same way. llama.cpp runs through its C API
with n_batch = n_ubatch = 512 and as many threads as we have, once with flash attention and once without; for each
phase the better of the two stands for it. Phases: prefill of 512 tokens in one go; decode right behind a prompt of
16 tokens; decode_deep behind those 512.

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

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
GLM4_NAME = "glm4-9b-shapes-8-layers-Q4_K_M.gguf"
CONTEXT = 1024
PHASES = ("prefill", "decode", "decode_deep")
SHORT_PROMPT = 16
ENGINES = {"autoglm": ["autoglm"], "llama.cpp": ["llama.cpp"], "llama.cpp flash": ["llama.cpp", "flash"]}
TARGETS = {
    "smollm2": {"prefill": 4.0, "decode": 1.3, "decode_deep": 1.3},
    "glm4": {"prefill": 2.5, "decode": 1.3, "decode_deep": 1.3},
}


@dataclass(frozen=True)
class Workload:
    """One model: what is prefilled, how many tokens are decoded after it, how many token ids to draw from."""

    name: str
    path: Path
    prefill: int
    decode: int
    first_id: int
    last_id: int


class Worker:
    """One engine in its own process, running a script of this folder; see engine_worker.py for the protocol."""

    def __init__(self, script: str, *arguments: object) -> None:
        environment = {
            **os.environ,
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


def install_missing(allowed: bool) -> None:
    """The [bench] extra, llama.cpp compiled with the instructions of this CPU."""
    needs = {"llama_cpp": "llama-cpp-python>=0.3.36,<0.4", "gguf": "gguf>=0.17,<1", "matplotlib": "matplotlib>=3.9,<4"}
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

        found.append(Workload("smollm2", pull("smollm2-135m").path, 512, 128, 100, 48_000))
    if "glm4" in names:
        path = cache_folder() / GLM4_NAME
        if not path.exists():
            from glm4_file import write_glm4_file

            print(f"writing {path} (1.9 GB, once)", file=sys.stderr)
            write_glm4_file(path)
        found.append(Workload("glm4", path, 512, 32, 100, 150_000))
    return found


def check_smollm2(ours: Worker, theirs: Worker, path: Path) -> str:
    """Both engines answer a question; the first words must be the same and right."""
    from autoglm.chat.tokenizer import Tokenizer
    from autoglm.formats.gguf import GGUFFile

    with GGUFFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt)
    texts = [tokenizer.decode(w.ask(op="greedy", token_ids=ids, num_tokens=8)["greedy"]) for w in (ours, theirs)]
    if any("Paris" not in text for text in texts):
        raise SystemExit(f"an engine gives nonsense, nothing was timed: {texts}")
    return f"both answer {texts[0]!r}" if texts[0] == texts[1] else f"autoglm {texts[0]!r}, llama.cpp {texts[1]!r}"


def check_logits(ours: Worker, theirs: Worker, token_ids: list[int]) -> str:
    """Random weights say nothing in words, so the logits after 48 tokens must point the same way."""
    a, b = (np.array(w.ask(op="prefill", token_ids=token_ids[:48], logits=True)["logits"]) for w in (ours, theirs))
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    if not (np.isfinite(a).all() and np.isfinite(b).all() and cosine > 0.99):
        raise SystemExit(f"the engines disagree, nothing was timed: cosine of their logits {cosine:.4f}")
    return f"cosine of the two engines' logits {cosine:.5f}"


def measure(worker: Worker, token_ids: list[int], steps: list[int]) -> dict[str, float]:
    """Tokens per second of each phase, once."""
    deep = worker.ask(op="decode", token_ids=token_ids, steps=steps)
    short = worker.ask(op="decode", token_ids=token_ids[:SHORT_PROMPT], steps=steps)
    return {
        "prefill": len(token_ids) / deep["prefill_s"],
        "decode": len(steps) / short["decode_s"],
        "decode_deep": len(steps) / deep["decode_s"],
    }


def run(load: Workload, threads: int, repeats: int) -> dict[str, Any]:
    """All repeats of one model, the engines in turn, and the medians."""
    rng = np.random.default_rng(0)
    token_ids = rng.integers(load.first_id, load.last_id, load.prefill).tolist()
    steps = rng.integers(load.first_id, load.last_id, load.decode).tolist()
    workers = {
        engine: Worker("engine_worker.py", kind, load.path, threads, CONTEXT, *flash)
        for engine, (kind, *flash) in ENGINES.items()
    }
    ours, theirs = workers["autoglm"], workers["llama.cpp"]
    check = check_smollm2(ours, theirs, load.path) if load.name == "smollm2" else check_logits(ours, theirs, token_ids)
    print(f"{load.name}: {check}", file=sys.stderr)
    samples: dict[str, dict[str, list[float]]] = {engine: {phase: [] for phase in PHASES} for engine in workers}
    for worker in workers.values():  # one round nobody counts: page faults, clocks, caches
        worker.ask(op="decode", token_ids=token_ids[:128], steps=steps[:4])
    for _ in range(repeats):
        for engine, worker in workers.items():
            for phase, value in measure(worker, token_ids, steps).items():
                samples[engine][phase].append(value)
    medians = {e: {p: statistics.median(v) for p, v in phases.items()} for e, phases in samples.items()}
    peer = {p: max(("llama.cpp", "llama.cpp flash"), key=lambda e: medians[e][p]) for p in PHASES}
    descriptions = {engine: worker.description for engine, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    return {
        "model": load.path.name,
        "prefill_tokens": load.prefill,
        "decode_tokens": load.decode,
        "check": check,
        "engines": descriptions,
        "samples_tokens_per_s": samples,
        "median_tokens_per_s": medians,
        "best_llama_cpp": peer,
        "ratio": {p: medians["autoglm"][p] / medians[peer[p]][p] for p in PHASES},
        "target_ratio": TARGETS[load.name],
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
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit,
        "python": platform.python_version(),
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
        "load_average": os.getloadavg()[0],
    }


def table(results: dict[str, Any]) -> str:
    rows = [f"{'model':<10}{'phase':<13}{'autoglm':>18}{'llama.cpp':>18}{'ratio':>8}{'target':>8}"]
    for name, result in results["workloads"].items():
        for phase in PHASES:
            cells = []
            for engine in ("autoglm", result["best_llama_cpp"][phase]):
                values = result["samples_tokens_per_s"][engine][phase]
                spread = (max(values) - min(values)) / 2
                cells.append(f"{result['median_tokens_per_s'][engine][phase]:.1f} ± {spread:.1f}")
            ratio, target = result["ratio"][phase], result["target_ratio"][phase]
            flash = "  flash" if result["best_llama_cpp"][phase].endswith("flash") else ""
            rows.append(f"{name:<10}{phase:<13}{cells[0]:>18}{cells[1]:>18}{ratio:>8.2f}{target:>8.1f}{flash}")
    return (
        "\n".join(rows) + "\n(tokens per second, median ± half the range; flash: where that was llama.cpp's better way)"
    )


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [(name, phase) for name in results["workloads"] for phase in PHASES]
    figure, axes = pyplot.subplots(1, len(bars), figsize=(2.1 * len(bars), 3.6), squeeze=False)
    for axis, (name, phase) in zip(axes[0], bars, strict=True):
        result = results["workloads"][name]
        medians = result["median_tokens_per_s"]
        values = [medians[result["best_llama_cpp"][phase]][phase], medians["autoglm"][phase]]
        draw_pair(axis, values, f"{name}\n{phase.replace('_', ' ')}: {result['ratio'][phase]:.2f} times")
    axes[0][0].set_ylabel("tokens per second")
    save_figure(figure, results, path)


def draw_pair(axis: Any, values: list[float], title: str) -> None:
    """Two bars with their values: llama.cpp's and ours."""
    drawn = axis.bar(["llama.cpp", "autoglm"], values, color=["#9aa5b1", "#1f7a8c"], width=0.65)
    axis.bar_label(drawn, fmt="%.0f" if min(values) >= 20 else "%.1f", padding=2)
    axis.set_title(title, fontsize=10)
    axis.set_ylim(0, max(values) * 1.18)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, results: dict[str, Any], path: Path) -> None:
    """Write the plot with the machine, threads and day under it."""
    about = results["machine"]
    caption = f"{about['cpu']}, {results['threads']} threads, {about['date'][:10]}"
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.text(0.5, 0.02, caption, ha="center", fontsize=9)
    figure.savefig(path, dpi=150)


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


def main() -> None:
    parser = run_options(__doc__)
    parser.add_argument("--model", nargs="+", choices=["smollm2", "glm4"], default=["smollm2", "glm4"])
    arguments = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    install_missing(not arguments.no_install)
    results: dict[str, Any] = {"machine": machine(), "threads": arguments.threads, "workloads": {}}
    for load in workloads(arguments.model):
        results["workloads"][load.name] = run(load, arguments.threads, 1 if arguments.quick else arguments.repeats)
    print(table(results))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "compare_llamacpp.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, arguments.output / "compare_llamacpp.png")
    print(f"written: {arguments.output}/compare_llamacpp.json and .png")


if __name__ == "__main__":
    main()
