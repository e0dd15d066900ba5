"""The quantizers: native equal to NumPy bit for bit, and errors held against ggml's own quantizers."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from autoglm.kernels import Runtime, quantize, reference, reference_quantize
from autoglm.kernels.reference_quantize import QUANTIZERS

WIDTH = 768
IDS = reference.TYPE_NAMES.get


def heavy(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.standard_t(4, (rows, WIDTH)) * 0.02


def outliers(rng: np.random.Generator, rows: int) -> np.ndarray:
    return np.where(rng.random((rows, WIDTH)) < 0.003, 30, 1) * rng.normal(0, 0.02, (rows, WIDTH))


# As matrices of transformers are: Gaussian, heavy-tailed, with a few weights far out, and off centre.
ROWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "gaussian": lambda rng, rows: rng.normal(0, 0.02, (rows, WIDTH)),
    "heavy": heavy,
    "laplace": lambda rng, rows: rng.laplace(0, 0.02, (rows, WIDTH)),
    "uniform": lambda rng, rows: rng.uniform(-0.05, 0.05, (rows, WIDTH)),
    "shifted": lambda rng, rows: rng.normal(0.03, 0.02, (rows, WIDTH)),
    "outliers": outliers,
}


def rows_of(kind: str, rows: int = 64) -> np.ndarray:
    return ROWS[kind](np.random.default_rng(5), rows).astype(np.float32)


def odd_rows() -> np.ndarray:
    """What a search could trip over: nothing, constants, one weight alone, the smallest and largest numbers."""
    x = np.zeros((14, WIDTH), np.float32)
    x[1] = 0.5
    x[2] = -0.5
    x[3, ::256] = 3
    x[4, 100::256] = -3
    x[5] = np.float32(1e-42)
    x[6] = np.random.default_rng(0).normal(0, 1e-7, WIDTH)
    x[7] = np.random.default_rng(1).normal(0, 1e-31, WIDTH)
    x[8] = np.random.default_rng(2).normal(0, 1e5, WIDTH)
    x[9] = np.abs(np.random.default_rng(3).normal(1, 0.1, WIDTH))
    x[10] = -x[9]
    x[11] = np.where(np.arange(WIDTH) % 2, 1, -1)
    x[12] = np.arange(WIDTH) - 300
    x[13, :32] = np.random.default_rng(4).normal(0, 1, 32)
    return x


def back(type_id: int, data: np.ndarray, x: np.ndarray) -> np.ndarray:
    return reference.dequantize(type_id, data, x.size).reshape(x.shape)


def rmse(type_id: int, data: np.ndarray, x: np.ndarray) -> float:
    return float(np.sqrt(np.mean((back(type_id, data, x).astype(np.float64) - x) ** 2)))


@pytest.mark.parametrize("type_id", QUANTIZERS, ids=IDS)
def test_native_equals_reference_bit_for_bit(type_id: int) -> None:
    x = np.concatenate([odd_rows(), *(rows_of(kind, 16) for kind in ROWS)])
    ours = quantize(Runtime(1, "scalar"), x, type_id)
    np.testing.assert_array_equal(ours, reference_quantize.quantize(type_id, x))
    np.testing.assert_array_equal(ours, quantize(Runtime(2), x, type_id))


@pytest.mark.parametrize("kind", ROWS)
def test_q8_0_has_everyones_bytes(kind: str) -> None:
    x = rows_of(kind)
    x[0, :32] = (np.arange(32) - 16) * 0.75
    x[0, 0] = 63.5  # a step of 0.5: every other one of the rest is a tie, which goes away from zero
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0).reshape(-1)
    np.testing.assert_array_equal(quantize(Runtime(1), x, reference.Q8_0), theirs)


@pytest.mark.parametrize("kind", ROWS)
def test_q5_0_is_better_than_the_closed_form(kind: str) -> None:
    x = rows_of(kind)
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q5_0).reshape(-1)
    ratio = rmse(reference.Q5_0, quantize(Runtime(1), x, reference.Q5_0), x) / rmse(reference.Q5_0, theirs, x)
    assert ratio < (1.0 if kind == "outliers" else 0.98), ratio


@pytest.fixture(scope="module")
def ggml() -> Callable[[int, np.ndarray], np.ndarray]:
    """ggml's quantizer without an importance matrix, out of llama-cpp-python's library."""
    spec = importlib.util.find_spec("llama_cpp")
    found = sorted(Path(spec.origin or "").parent.glob("lib/libggml-base.*")) if spec else []
    if not found:
        pytest.skip("llama-cpp-python is not installed: it brings the reference quantizer")
    function = ctypes.CDLL(str(found[0])).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def chunk(type_id: int, x: np.ndarray) -> np.ndarray:
        elements, nbytes = reference.BLOCKS[type_id]
        out = np.zeros(x.size // elements * nbytes, np.uint8)
        assert function(type_id, x.ctypes.data, out.ctypes.data, 0, *x.shape, None) == out.nbytes
        return out

    return chunk


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("type_id", QUANTIZERS, ids=IDS)
def test_error_is_at_most_the_references(type_id: int, kind: str, ggml: Callable[..., np.ndarray]) -> None:
    """Root mean square error at most 1.02 times that of ggml; on Gaussian rows K-quants are better than it."""
    x = rows_of(kind)
    ratio = rmse(type_id, quantize(Runtime(1), x, type_id), x) / rmse(type_id, ggml(type_id, x), x)
    print(f"{reference.TYPE_NAMES[type_id]} {kind}: {ratio:.4f}")
    better = type_id in (reference.Q4_K, reference.Q6_K) and kind == "gaussian"
    assert ratio <= (0.99 if better else 1.02), ratio


@pytest.mark.parametrize("type_id", QUANTIZERS, ids=IDS)
def test_odd_rows_come_back(type_id: int) -> None:
    x = odd_rows()
    y = back(type_id, quantize(Runtime(1), x, type_id), x)
    assert np.isfinite(y).all()
    assert not y[0].any() and not y[5].any() and not y[7].any()
    for row in (1, 2, 11):
        np.testing.assert_allclose(y[row], x[row], rtol=0.02)
    for row in (3, 4):
        np.testing.assert_allclose(y[row], x[row], rtol=0.02, atol=1e-3)
    size = np.sqrt((x * x).mean(1))
    error = np.sqrt(((y - x) ** 2).mean(1))
    for row in (8, 9, 10, 12, 13):
        assert error[row] < 0.12 * size[row], row


def test_what_cannot_be_quantized_is_refused() -> None:
    x = np.zeros((2, 96), np.float32)
    for type_id, width, message in ((reference.Q4_K, 96, "whole"), (reference.Q5_K, 96, "no quantizer")):
        with pytest.raises(ValueError, match=message):
            quantize(Runtime(1), x[:, :width], type_id)
        with pytest.raises(ValueError, match=message):
            reference_quantize.quantize(type_id, x[:, :width])
    assert quantize(Runtime(1), x[:0], reference.Q8_0).size == 0
