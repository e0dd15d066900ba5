"""Decode and prefill beside other programs that want the processor too: autoglm and llama.cpp on one file, in turn.

    python benchmarks/busy_machine.py [--quick] [--threads N] [--repeats N] [--model smollm2 glm4]

A person's machine runs more than a model: a browser, or the emulated phone the agent acts on. Beside the engines run
none, one or two programs that do nothing but compute, each as much as a whole core if it gets one. Tokens per second,
medians; llama.cpp with flash attention or without, whichever is faster.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compare_llamacpp import (
    HERE,
    SHORT_PROMPT,
    WAYS,
    Worker,
    Workload,
    install_missing,
    machine,
    parse_run,
    run_options,
    save_figure,
    workloads,
)
from compare_report import COLORS

OTHERS = (0, 1, 2)
PHASES = ("prefill", "decode")
ENGINES = {"autoglm": {}, **{name: way for name, way in WAYS.items() if not way["unified"]}}


@contextlib.contextmanager
def others(count: int) -> Iterator[None]:
    """So many programs at work."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


def rates(worker: Worker, load: Workload, way: dict[str, bool]) -> dict[str, float]:
    """Tokens a second of a prompt, and of what is decoded behind a short one."""
    request = {"op": "run", "max_tokens": load.context, **way}
    prompt = worker.ask(token_ids=[load.token_ids[: load.prefill]], **request)["prefill_s"]
    answer = worker.ask(token_ids=[load.token_ids[:SHORT_PROMPT]], steps=[load.steps], **request)["decode_s"]
    return {"prefill": load.prefill / prompt, "decode": len(load.steps) / answer}


def measure(load: Workload, threads: int, repeats: int) -> dict[str, Any]:
    """Medians by phase, number of other programs and engine, and all samples."""
    ours, theirs = (
        Worker("engine_worker.py", kind, load.path, threads, load.context) for kind in ("autoglm", "llama.cpp")
    )
    samples: dict[str, dict[int, dict[str, list[float]]]] = {p: {n: {} for n in OTHERS} for p in PHASES}
    for turn in range(repeats + 1):
        for count in OTHERS:
            with others(count):
                for engine, way in ENGINES.items():
                    for phase, value in rates(ours if engine == "autoglm" else theirs, load, way).items():
                        if turn:  # the first is for page faults, clocks and caches
                            samples[phase][count].setdefault(engine, []).append(value)
        print(f"{load.name}: turn {turn} of {repeats}", file=sys.stderr)
    for worker in (ours, theirs):
        worker.close()
    medians: dict[str, dict[int, dict[str, float]]] = {phase: {} for phase in PHASES}
    for phase, counts in samples.items():
        for count, engines in counts.items():
            found = {engine: statistics.median(values) for engine, values in engines.items()}
            alone = found.pop("autoglm")
            medians[phase][count] = {"llama.cpp": max(found.values()), "autoglm": alone}
    return {"model": load.path.name, "median_tokens_per_s": medians, "samples_tokens_per_s": samples}


def table(results: dict[str, Any]) -> str:
    rows = [f"{'model':<10}{'phase':<10}{'other programs':>15}{'llama.cpp':>12}{'autoglm':>12}{'ratio':>8}"]
    for name, result in results["models"].items():
        for phase, counts in result["median_tokens_per_s"].items():
            for count, found in counts.items():
                theirs, ours = found["llama.cpp"], found["autoglm"]
                rows.append(f"{name:<10}{phase:<10}{count:>15}{theirs:>12.1f}{ours:>12.1f}{ours / theirs:>8.2f}")
    return "\n".join([*rows, "tokens per second, medians"])


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(name, phase) for name in results["models"] for phase in PHASES]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3 * len(panels), 3.4), squeeze=False)
    for axis, (name, phase) in zip(axes[0], panels, strict=True):
        counts = results["models"][name]["median_tokens_per_s"][phase]
        for shift, (engine, color) in zip((-0.2, 0.2), COLORS.items(), strict=True):
            values = [found[engine] for found in counts.values()]
            drawn = axis.bar([count + shift for count in counts], values, 0.38, color=color, label=engine)
            axis.bar_label(drawn, fmt="%.0f", fontsize=7)
        axis.set_title(f"{name}, {phase}", fontsize=10)
        axis.set_xticks(list(counts))
        axis.set_xlabel("other programs at work")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("tokens per second")
    axes[0][-1].legend(frameon=False, fontsize=8)
    save_figure(figure, results, path)


def main() -> None:
    parser = run_options(__doc__)
    parser.add_argument("--model", nargs="+", choices=["smollm2", "glm4"], default=["smollm2", "glm4"])
    arguments = parse_run(parser)
    sys.path[:0] = [str(HERE.parent)]
    install_missing(not arguments.no_install)
    repeats = 1 if arguments.quick else arguments.repeats
    loads = workloads(arguments.model)
    results: dict[str, Any] = {"machine": machine(), "threads": arguments.threads}
    results["models"] = {load.name: measure(load, arguments.threads, repeats) for load in loads}
    print(table(results))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "busy_machine.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, arguments.output / "busy_machine.png")


if __name__ == "__main__":
    main()
