"""Layers of the small encoders as plain functions: products on native kernels, the rest in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoglm.formats.quant_types import GGMLType
from autoglm.kernels import Matrix, Program, Runtime, matmul
from autoglm.model.encoder import key_value_room, run_slices, start_whole
from autoglm.model.loader import Vector, WeightReader


@dataclass(frozen=True)
class Linear:
    """y = W x + b over rows [N, in] -> [N, out]."""

    runtime: Runtime
    weight: Matrix
    bias: Vector | None

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        y: NDArray[np.float32] = matmul(self.runtime, self.weight, np.ascontiguousarray(x, np.float32))
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis."""

    weight: Vector
    bias: Vector
    eps: float

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(self.eps))
        return np.asarray(centred / deviation * self.weight + self.bias, np.float32)


def read_linear(reader: WeightReader, name: str, rows: int, cols: int, *, bias: bool = True) -> Linear:
    """`name`.weight [rows, cols] and `name`.bias."""
    weight = reader.matrix(f"{name}.weight", rows, cols)
    return Linear(reader.runtime, weight, reader.vector(f"{name}.bias", rows) if bias else None)


def read_layer_norm(reader: WeightReader, name: str, width: int, eps: float) -> LayerNorm:
    return LayerNorm(reader.vector(f"{name}.weight", width), reader.vector(f"{name}.bias", width), eps)


def float_matrix(runtime: Runtime, values: NDArray[np.float32]) -> Matrix:
    """f32 [rows, cols] as a matrix for the kernels."""
    data = np.ascontiguousarray(values, np.float32)
    return Matrix.pack(runtime, data.view(np.uint8).ravel(), int(GGMLType.F32), *data.shape)


I16_TYPE_ID = 256  # of kernels/: no GGUF type
_I16_COLUMNS = 64  # that share a scale
_I16_LENGTH = 32767  # of a block's whole numbers, at most: so that no sum of products can pass 2^31


def i16_matrix(runtime: Runtime, values: NDArray[np.float32]) -> Matrix:
    """f32 [rows, cols] in 16-bit whole numbers, a scale for 64 columns: products twice as fast as in floats.

    Its error is about a third of what half floats make, and as much as theirs where one number of a block is thirty
    times the others. Columns of zeros fill up the last block of a row: `cols` counts them. Values that are not all
    finite stay floats.
    """
    if not np.isfinite(values).all():
        return float_matrix(runtime, values)
    whole = np.pad(values.astype(np.float32), ((0, 0), (0, -values.shape[1] % _I16_COLUMNS)))
    blocks = whole.reshape(-1, _I16_COLUMNS)
    packed = np.empty(len(blocks), [("scale", "<f4"), ("values", "<i2", _I16_COLUMNS)])
    packed["scale"] = np.sqrt(np.square(blocks, dtype=np.float64).sum(axis=1)) / _I16_LENGTH
    packed["values"] = np.rint(blocks / np.maximum(packed["scale"], np.float32(1e-38))[:, None])
    return Matrix.pack(runtime, packed.view(np.uint8), I16_TYPE_ID, *whole.shape)


class Convolution:
    """A convolution over one or two axes with padding of half the kernel: [*places, in] -> [*places / stride, out]."""

    def __init__(self, reader: WeightReader, name: str, shape: tuple[int, ...], stride: int) -> None:
        """shape: torch's [out, in, *kernel] of `name`.weight."""
        kernel = reader.array(f"{name}.weight", shape)
        self._linear = Linear(
            reader.runtime,
            float_matrix(reader.runtime, kernel.reshape(shape[0], -1)),
            reader.vector(f"{name}.bias", shape[0]),
        )
        self._kernel, self._stride = shape[2:], stride

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        axes = tuple(range(len(self._kernel)))
        padded = np.pad(x, [(size // 2, size // 2) for size in self._kernel] + [(0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, self._kernel, axis=axes)  # [*places, in, *kernel]
        windows = windows[tuple(slice(None, None, self._stride) for _ in axes)]
        places = windows.shape[: len(axes)]
        result: NDArray[np.float32] = self._linear(windows.reshape(int(np.prod(places)), -1)).reshape(*places, -1)
        return result


def relu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(np.maximum(x, np.float32(0)), np.float32)


def sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
    # tanh does not overflow where exp does.
    return np.asarray(np.float32(0.5) * (np.tanh(np.float32(0.5) * x) + np.float32(1)), np.float32)


def silu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x * sigmoid(x)


class Projector:
    """Features -> decoder tokens: W2 gelu(W1 LN(x) + b1) + b2."""

    def __init__(self, norm: LayerNorm, first: Linear, second: Linear) -> None:
        self._norm, self._first, self._second = norm, first, second

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        program = Program(self._first.runtime, len(x))
        inputs, hidden = program.buffer(x.shape[1]), program.buffer(self._first.weight.rows)
        tokens = program.buffer(self._second.weight.rows)
        normed, bent = program.activation(x.shape[1]), program.activation(self._first.weight.rows)
        program.layer_norm(inputs, normed, self._norm.weight, self._norm.bias, self._norm.eps)
        program.linear(normed, [self._first.weight], hidden, biases=[self._first.bias])
        program.quantize(hidden, bent, gelu=True)
        program.linear(bent, [self._second.weight], tokens, biases=[self._second.bias])
        program.result(tokens)
        program.view(inputs)[:] = x
        start_whole(program, len(x))
        for _ in run_slices(program):
            pass
        result: NDArray[np.float32] = program.view(tokens).copy()
        return result


def attend(
    runtime: Runtime, q: NDArray[np.float32], k: NDArray[np.float32], v: NDArray[np.float32]
) -> NDArray[np.float32]:
    """softmax(q k^T) v for heads [N, H, d], every row seeing all others, never holding all scores: [N, H, d].

    d is a multiple of 16 up to 256; q is already scaled.
    """
    count, heads, size = q.shape
    program = Program(runtime, count)
    # Turned by no angle: the rotation is part of writing keys.
    program.set_attention(key_value_room(count, heads, size), heads, 2, False, (1, 0, 0), size, np.zeros(1, np.float32))
    qkv, out = program.buffer(3 * heads * size), program.buffer(heads * size)
    program.rope_cache(qkv, 0)
    program.attention(qkv, 0, out)
    program.result(out)
    # The kernel scales queries by 1 / sqrt(d) as a decoder wants it.
    parts = (q * np.float32(size**0.5), k, v)
    program.view(qkv)[:] = np.concatenate([part.reshape(count, -1) for part in parts], axis=1)
    start_whole(program, count)
    for _ in run_slices(program):
        pass
    result: NDArray[np.float32] = program.view(out).reshape(count, heads, size).copy()
    return result
