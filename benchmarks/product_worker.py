"""The matrix products of a 9B layer at 512 rows, by oneDNN's int8 or by ours, in a process of its own.

    python benchmarks/product_worker.py onednn|autoglm MODEL THREADS

Every request runs them all once and answers with the seconds; the first reply says how many multiply-adds that is.
MODEL is the random 9B file (glm4_file.py).

autoglm   layers 0 and 1 of the file, which between them have every type of Q4_K_M, from f32 rows to f32 rows:
          activations are quantized and weights unpacked inside the clock.
onednn    the same shapes through torch's oneDNN int8, weights prepacked, f32 rows out. Tried once, the fastest is
          kept: qlinear_pointwise on rows that are in int8 already, linear_dynamic on f32 rows. (torch._int_mm and the
          fbgemm and x86 engines were slower everywhere.) q, k and v are one product for it, as gate and up are.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from engine_worker import CHUNK, serve

from autoglm.formats.gguf import GGUFFile

LAYERS = (0, 1)
PRODUCTS = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_up",), ("ffn_down",))
LEAST_COSINE = 0.999
CHECKED_ROWS = 64


def check(got: np.ndarray, truth: np.ndarray, what: str) -> None:
    """A wrong product is not worth timing."""
    a, b = np.asarray(got, np.float64).ravel(), np.asarray(truth, np.float64).ravel()
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    if not cosine > LEAST_COSINE:  # a NaN fails too
        raise SystemExit(f"{what}: the product is wrong (cosine {cosine:.4f}), nothing was timed")


class Ours:
    """One program that quantizes and multiplies, as the engine's linear layers do."""

    def __init__(self, gguf: GGUFFile, threads: int) -> None:
        from autoglm import kernels

        runtime = kernels.Runtime(threads)
        self.program = kernels.Program(runtime, CHUNK)
        rng = np.random.default_rng(0)
        self.num_macs = 0
        made = []
        for first in (f"blk.{layer}." for layer in LAYERS):
            for names in PRODUCTS:
                infos = [gguf.tensors[f"{first}{name}.weight"] for name in names]
                matrices = [kernels.Matrix.pack(runtime, gguf.data(i.name), int(i.type), *i.shape) for i in infos]
                width, rows = matrices[0].cols, sum(matrix.rows for matrix in matrices)
                x, y = self.program.buffer(width), self.program.buffer(rows)
                activation = self.program.activation(width)
                self.program.quantize(x, activation)
                self.program.linear(activation, matrices, y)
                self.program.view(x)[:] = rng.normal(0, 1, (CHUNK, width))
                self.num_macs += CHUNK * width * rows
                made.append((infos[0], x, y))
        self.program.result(made[-1][2])
        self.run()
        for info, x, y in made:
            rows, width = info.shape
            data = gguf.data(info.name)[: info.nbytes // rows * CHECKED_ROWS]
            weight = kernels.dequantize(data, int(info.type), CHECKED_ROWS * width).reshape(-1, width)
            check(self.program.view(y)[:, :CHECKED_ROWS], self.program.view(x) @ weight.T, f"autoglm {info.name}")
        self.description = {"engine": f"autoglm, {runtime.isa}", "num_macs": self.num_macs}

    def run(self) -> None:
        none, one = np.zeros(0, np.int32), np.zeros((1, 1), np.int32)
        where = np.zeros((3, CHUNK), np.int32)
        ends = np.array([0, CHUNK], np.int32)
        self.program.run(where[0], where, where[0], ends, ends[1:], one, none)


class OneDnn:
    """The layer's shapes with random int8 weights; what they are does not change how long they take."""

    def __init__(self, gguf: GGUFFile, threads: int) -> None:
        import torch

        self.torch = torch
        # torch.quantize_* warns that it will go; prepacking for linear_dynamic knows no other form yet.
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
        torch.set_num_threads(threads)
        torch.backends.quantized.engine = "onednn"
        self.num_macs = 0
        ways: dict[str, list[Callable[[], Any]]] = {"qlinear_pointwise": [], "linear_dynamic": []}
        for names in PRODUCTS:
            shapes = [gguf.tensors[f"blk.0.{name}.weight"].shape for name in names]
            width, rows = shapes[0][1], sum(shape[0] for shape in shapes)
            self.num_macs += CHUNK * width * rows
            for way, product in self._products(rows, width).items():
                ways[way].append(product)
        seconds = {}
        for way, products in ways.items():
            self.products = products
            self.run()
            seconds[way] = min(answer(self, {})["seconds"] for _ in range(3))
        best = min(seconds, key=seconds.__getitem__)
        self.products = ways[best]
        self.description = {"engine": f"torch {torch.__version__}, {best}", "num_macs": self.num_macs}

    def _products(self, rows: int, width: int) -> dict[str, Callable[[], Any]]:
        torch = self.torch
        weight = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
        x = torch.randint(0, 256, (CHUNK, width), dtype=torch.uint8)
        scale, zero = torch.full((rows,), 0.01), torch.zeros(rows, dtype=torch.int32)
        packed = torch.ops.onednn.qlinear_prepack(weight, [CHUNK, width])
        per_row = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero.long(), 0)
        dynamic = torch.ops.quantized.linear_prepack(per_row, None)
        x_float = x.float() - 128

        def pointwise() -> Any:
            return torch.ops.onednn.qlinear_pointwise(
                x, 0.01, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
            )

        def whole() -> Any:
            return torch.ops.quantized.linear_dynamic(x_float, dynamic)

        truth = x_float @ weight[:CHECKED_ROWS].float().T
        check(pointwise()[:, :CHECKED_ROWS], truth, "oneDNN qlinear_pointwise")
        check(whole()[:, :CHECKED_ROWS], truth, "oneDNN linear_dynamic")
        return {"qlinear_pointwise": pointwise, "linear_dynamic": whole}

    def run(self) -> None:
        for product in self.products:
            product()


def answer(engine: Ours | OneDnn, request: dict[str, Any]) -> dict[str, Any]:
    begin = time.perf_counter()
    engine.run()
    return {"seconds": time.perf_counter() - begin}


def main() -> None:
    kind, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with GGUFFile.open(model) as gguf:
        serve(lambda: (OneDnn if kind == "onednn" else Ours)(gguf, threads), answer)


if __name__ == "__main__":
    main()
