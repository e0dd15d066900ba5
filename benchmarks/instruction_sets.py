"""Speed of every set of kernels this machine can run: AVX-512 VNNI, AVX-VNNI, AVX2, NEON and portable C++.

    python benchmarks/instruction_sets.py [--quick] [--threads N] [--model NAME ...] [--repeats N] [--docs]

autoglm alone, a process for each set (AUTOGLM_ISA) and all of them in turn: prefill of 512 tokens (64 with the
portable kernels, which are slow) and decode behind a prompt of 16, medians of tokens a second. Before anything is
timed every set must give the same logits: AVX-512, AVX-VNNI and AVX2 the same bits, the portable kernels the same
direction and the same most likely token (without a fused multiply-add they round differently in the last place).
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

import numpy as np
from compare_llamacpp import (
    HERE,
    SHORT_PROMPT,
    Worker,
    Workload,
    install_missing,
    machine,
    parse_run,
    run_options,
    workloads,
)
from compare_report import conditions, fill_between

SETS = {"avx512": 512, "avxvnni": 512, "avx2": 512, "neon": 512, "scalar": 64}  # tokens prefilled
LEAST_COSINE = 0.9999


def runnable() -> list[str]:
    """Those of SETS this machine has, the fastest first."""
    from autoglm.kernels import Runtime

    found = []
    for name in SETS:
        try:
            Runtime(1, name)
        except ValueError:
            print(f"this machine cannot run the {name} kernels", file=sys.stderr)
        else:
            found.append(name)
    return found


def check(workers: dict[str, Worker], prompt: list[int]) -> dict[str, str]:
    """How like the first set's logits every other's are; a set that computes something else is not timed."""
    logits = {
        name: np.array(worker.ask(op="run", token_ids=[prompt], steps=[], logits=True)["logits"][0])
        for name, worker in workers.items()
    }
    first, *others = logits
    found = {}
    for name in others:
        a, b = logits[first], logits[name]
        cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        if not (cosine > LEAST_COSINE and a.argmax() == b.argmax()):
            raise SystemExit(f"{name} and {first} disagree, nothing was timed: cosine of their logits {cosine:.6f}")
        found[name] = f"{'the same bits as' if (a == b).all() else f'cosine {cosine:.7f} with'} {first}"
    return found


def measure(load: Workload, sets: list[str], threads: int, repeats: int) -> dict[str, Any]:
    """All repeats of one model, the sets in turn."""
    workers = {
        name: Worker("engine_worker.py", "autoglm", load.path, threads, load.context, AUTOGLM_ISA=name) for name in sets
    }
    alike = check(workers, load.token_ids[:SHORT_PROMPT])
    samples: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in sets}
    for _ in range(repeats):
        for name, worker in workers.items():
            prompt, steps = load.token_ids[: SETS[name]], load.steps[: max(4, SETS[name] // 16)]
            prefill = worker.ask(op="run", token_ids=[prompt], steps=[])
            decode = worker.ask(op="run", token_ids=[prompt[:SHORT_PROMPT]], steps=[steps])
            samples[name]["prefill"].append(len(prompt) / prefill["prefill_s"])
            samples[name]["decode"].append(len(steps) / decode["decode_s"])
    kernels = {name: worker.description for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    medians = {name: {phase: statistics.median(v) for phase, v in phases.items()} for name, phases in samples.items()}
    return {
        "model": load.path.name,
        "kernels": kernels,
        "check": alike,
        "samples_tokens_per_s": samples,
        "median_tokens_per_s": medians,
    }


def table(results: dict[str, Any]) -> str:
    """Markdown, as docs/performance.md has it."""
    rows = ["| model | kernels | prefill, tokens/s | decode, tokens/s |", "| --- | --- | ---: | ---: |"]
    for model, result in results["models"].items():
        for name, rates in result["median_tokens_per_s"].items():
            rows.append(f"| {model} | {name} | {rates['prefill']:.1f} | {rates['decode']:.1f} |")
    return "\n".join(rows)


def main() -> None:
    parser = run_options(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--model", nargs="+", choices=["smollm2", "glm4"], default=["smollm2", "glm4"])
    parser.add_argument("--docs", action="store_true", help="write the table into docs/performance.md")
    arguments = parse_run(parser)
    sys.path[:0] = [str(HERE.parent)]
    install_missing(not arguments.no_install, with_llama=False)
    results: dict[str, Any] = {"machine": machine(), "threads": arguments.threads, "models": {}}
    sets, repeats = runnable(), 1 if arguments.quick else arguments.repeats
    for load in workloads(arguments.model):
        results["models"][load.name] = measure(load, sets, arguments.threads, repeats)
        print(f"{load.name}: {results['models'][load.name]['check']}", file=sys.stderr)
    print(table(results))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "instruction_sets.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {arguments.output}/instruction_sets.json")
    if arguments.docs:
        text = f"{conditions(results)}:\n\n{table(results)}"
        fill_between(HERE.parent / "docs" / "performance.md", "instruction_sets", text)


if __name__ == "__main__":
    main()
