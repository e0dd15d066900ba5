"""Reads a written GGUF back and holds every block of every tensor against the checkpoint it was made from.

A block may be off by at most a share of its own size, which depends on the type alone. The shares are far above what
quantizing real weights does (tests show the errors it does make) and far below what a wrong row, a lost page or a
wrong scale makes: those are off by their whole size and more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoglm.errors import FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.formats.quant_types import BLOCK, GGMLType
from autoglm.kernels import dequantize

Vector = NDArray[np.float32]

# type -> largest |error| / |weights| of a block, both as root of the sum of squares.
# F16: half an ulp. Q8_0: half a step of amax / 127 in each of 32 weights whose norm is amax at least.
MAX_BLOCK_ERROR = {
    GGMLType.F32: 0.0,
    GGMLType.F16: 2.0**-11,
    GGMLType.Q8_0: 0.0228,
    GGMLType.Q6_K: 0.25,
    GGMLType.Q5_0: 0.3,
    GGMLType.Q4_K: 0.5,
}
# Weights this small are below what halves can scale; real ones are 10,000 times larger.
_TINY_WEIGHT = 2.0**-20


@dataclass(frozen=True)
class TensorError:
    """How far a written tensor is from its source: root mean square error over root mean square weight."""

    name: str
    type: GGMLType
    relative_rmse: float


def measure_tensor(
    gguf: GGUFFile, name: str, source: Iterable[tuple[int, Vector]], report: Callable[[int], None]
) -> TensorError:
    """Compare one tensor of an open file with its source.

    source  gives (first row, f32 [rows, ...]) piece by piece, in the file's row order
    report  is told the bytes of every piece compared
    Raises FormatError if a block is off by more than its type allows.
    """
    info = gguf.tensors[name]
    block, limit = BLOCK[info.type][0], MAX_BLOCK_ERROR[info.type]
    data, stride = gguf.data(name), info.nbytes // info.shape[0]
    error, power = 0.0, 0.0
    for first, wanted in source:
        width = wanted[0].size
        raw = np.ascontiguousarray(data[first * stride : (first + len(wanted)) * stride])
        flat = wanted.reshape(-1, width if block == 1 else block)
        off = dequantize(raw, int(info.type), wanted.size).reshape(flat.shape) - flat
        errors, powers = (np.einsum("ij,ij->i", x, x, dtype=np.float64) for x in (off, flat))
        allowed = limit * np.sqrt(powers)
        if limit:
            allowed += _TINY_WEIGHT * np.sqrt(flat.shape[1])
        worst = int(np.argmax(np.sqrt(errors) - allowed))
        if not np.sqrt(errors[worst]) <= allowed[worst]:
            raise FormatError(
                f"{gguf.path}: tensor {name} differs from the checkpoint, row {first + worst * flat.shape[1] // width} "
                f"is off by {np.sqrt(errors[worst] / max(powers[worst], 1e-300)):.2g} of its size, expected at most "
                f"{limit:.2g}; delete the file and run the same command again"
            )
        error += float(errors.sum())
        power += float(powers.sum())
        report(raw.nbytes)
    gguf.release(name)
    return TensorError(name, info.type, (error / power) ** 0.5 if power else 0.0)
