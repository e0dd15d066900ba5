"""Speed of the native matrix product by weight type and number of rows, beside the machine's memory bandwidth.

    python benchmarks/bench_kernels.py [--threads N] [--isa NAME] [--type NAME ...] [--mbytes 256]

One row (decode) is bound by reading the weights: compare its GB/s with the measured memory read. Many rows
(prefill) are bound by arithmetic: GOPS counts 2 * rows * columns * tokens, quantizing the activations included.
Every product is compared with the NumPy reference before it is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from glm4_file import random_matrix  # noqa: E402

from autoglm import kernels  # noqa: E402
from autoglm.deploy.machine import read_test_bytes  # noqa: E402
from autoglm.kernels import reference  # noqa: E402

COLUMNS = 4096
TOKENS = (1, 8, 64, 512)


def best_of(run: Callable[[], None], seconds: float) -> float:
    """Shortest time of one call, over as many calls as fit in `seconds`, at least three."""
    best, calls, end = float("inf"), 0, time.perf_counter() + seconds
    while calls < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
        calls += 1
    return best


class Product:
    """One packed matrix and a program that quantizes and multiplies, as the engine's linear layers do."""

    def __init__(self, runtime: kernels.Runtime, type_id: int, num_bytes: int) -> None:
        elements, block_bytes = reference.BLOCKS[type_id]
        self.rows = max(64, num_bytes // (COLUMNS // elements * block_bytes) // 32 * 32)
        rng = np.random.default_rng(0)
        qtype = gguf.GGMLQuantizationType(type_id)
        self.data = random_matrix(qtype, self.rows, COLUMNS, 0.02, rng).reshape(-1)
        self.type_id = type_id
        self.matrix = kernels.Matrix.pack(runtime, self.data, type_id, self.rows, COLUMNS)
        self.program = kernels.Program(runtime, max(TOKENS))
        self.x, self.y = self.program.buffer(COLUMNS), self.program.buffer(self.rows)
        activation = self.program.activation(COLUMNS)
        self.program.quantize(self.x, activation)
        self.program.linear(activation, [self.matrix], self.y)
        self.program.result(self.y)
        self.program.view(self.x)[:] = rng.normal(0, 1, (max(TOKENS), COLUMNS)).astype(np.float32)

    def run(self, num_tokens: int) -> None:
        none = np.zeros(0, np.int32)
        where = np.zeros((3, num_tokens), np.int32)
        self.program.run(
            where[0], where, where[0], np.array([0, num_tokens], np.int32), np.array([num_tokens], np.int32),
            np.zeros((1, 1), np.int32), none,
        )  # fmt: skip

    def check(self, num_tokens: int) -> None:
        """Compare the first 40 rows with the reference; a wrong product is not worth timing."""
        self.run(num_tokens)
        x = np.array(self.program.view(self.x)[:num_tokens])
        rows = min(40, self.rows)
        truth = reference.matmul(self.type_id, self.data[: self.data.size // self.rows * rows], rows, x)
        error = np.abs(self.program.view(self.y)[:num_tokens, :rows] - truth).max()
        if not error < 1e-4 * np.abs(truth).max():
            raise SystemExit(f"{reference.TYPE_NAMES[self.type_id]}: product is off by {error:.2e}; nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--isa", default="", help="a kernel table by name; the best this CPU has if not given")
    parser.add_argument("--type", nargs="+", choices=sorted(reference.TYPE_NAMES.values()), help="weight types")
    parser.add_argument("--mbytes", type=int, default=256, help="size of the matrix; far larger than the last cache")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each number")
    arguments = parser.parse_args()
    runtime = kernels.Runtime(arguments.threads, arguments.isa)
    limits = kernels.measure_limits(runtime, read_test_bytes(), arguments.seconds)
    bandwidth = limits.read_bytes_per_s / 1e9
    print(
        f"{runtime.isa}, {arguments.threads} threads; memory read {bandwidth:.1f} GB/s, at most "
        f"{2e-9 * limits.int8_macs_per_s:.0f} GOPS in 8 bits and {2e-9 * limits.float_macs_per_s:.0f} in floats"
    )
    print(f"{'type':<6}" + "".join(f"{f'T={t} GB/s':>12}{'GOPS':>8}" for t in TOKENS))
    results: dict[str, dict[str, float]] = {}
    for type_id, name in reference.TYPE_NAMES.items():
        if arguments.type and name not in arguments.type:
            continue
        product = Product(runtime, type_id, arguments.mbytes << 20)
        line, results[name] = f"{name:<6}", {}
        for tokens in TOKENS:
            product.check(min(tokens, 64))
            duration = best_of(lambda p=product, t=tokens: p.run(t), arguments.seconds)  # type: ignore[misc]
            rate, gops = product.data.nbytes / duration / 1e9, 2e-9 * product.rows * COLUMNS * tokens / duration
            results[name][f"gb_s_{tokens}"], results[name][f"gops_{tokens}"] = round(rate, 2), round(gops, 1)
            line += f"{rate:>12.1f}{gops:>8.0f}"
        print(line, flush=True)
    facts = {
        "memory_gb_s": bandwidth,
        "int8_gops": 2e-9 * limits.int8_macs_per_s,
        "float_gops": 2e-9 * limits.float_macs_per_s,
    }
    print(json.dumps({"isa": runtime.isa, "threads": arguments.threads, **facts, "types": results}))


if __name__ == "__main__":
    main()
