"""Native matrix products against the NumPy truth: every weight type, instruction set, tail and row count."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from autoglm import kernels
from autoglm.kernels import reference
from tests.kernels.blocks import random_activations, random_weights
from tests.kernels.conftest import ISAS, make_runtime

TYPES = sorted(reference.BLOCKS)
ROWS = (1, 31, 33, 97)
NUM_TOKENS = 64
QUANTIZED = [t for t in TYPES if t not in reference.FLOAT_TYPES]
type_ids = pytest.mark.parametrize("type_id", TYPES, ids=reference.TYPE_NAMES.get)
quantized_type_ids = pytest.mark.parametrize("type_id", QUANTIZED, ids=reference.TYPE_NAMES.get)


def columns(type_id: int) -> tuple[int, ...]:
    """Widths with every kind of tail. 640 and 896 are 128 mod 256, as the 9B model's 13696 is."""
    elements = reference.BLOCKS[type_id][0]
    if elements == 256:
        return (256, 512, 1280)
    return (32, 64, 96, 256, 288, 576, 640) + ((1, 7, 33) if elements == 1 else ())


def pack(runtime: kernels.Runtime, type_id: int, rows: int, cols: int, seed: int = 0) -> kernels.Matrix:
    return kernels.Matrix.pack(runtime, random_weights(type_id, rows, cols, seed), type_id, rows, cols)


@type_ids
def test_dequantize_bit_for_bit(type_id: int) -> None:
    data = random_weights(type_id, 16, 1024)
    ours = kernels.dequantize(data, type_id, 16 * 1024)
    truth = reference.dequantize(type_id, data, 16 * 1024)
    np.testing.assert_array_equal(ours.view(np.uint32), truth.view(np.uint32))


@quantized_type_ids
def test_dequantize_every_half_scale(type_id: int) -> None:
    """Subnormal, infinite and NaN scales are read as the file has them, not trapped or flushed."""
    elements, block_bytes = reference.BLOCKS[type_id]
    data = np.full((65536, block_bytes), 0x5A, np.uint8)
    offset = 208 if type_id == reference.Q6_K else 0
    data[:, offset : offset + 2] = np.arange(65536, dtype="<u2").view(np.uint8).reshape(-1, 2)
    with np.errstate(invalid="ignore"):
        truth = reference.dequantize(type_id, data.reshape(-1), 65536 * elements)
    ours = kernels.dequantize(data.reshape(-1), type_id, 65536 * elements)
    np.testing.assert_array_equal(ours, truth)


@type_ids
def test_matmul_against_reference(runtime: kernels.Runtime, type_id: int) -> None:
    """The integer sums are exact on both sides, so only float rounding of the per-group steps is left:
    a few units in the last place of the sum of absolute terms."""
    for rows, cols in product(ROWS, columns(type_id)):
        data = random_weights(type_id, rows, cols)
        x = random_activations(NUM_TOKENS, cols)
        ours = kernels.matmul(runtime, kernels.Matrix.pack(runtime, data, type_id, rows, cols), x)
        truth = reference.matmul(type_id, data, rows, x)
        size = np.abs(reference.dequantize(type_id, data, rows * cols)).reshape(rows, cols).astype(np.float64)
        # Types with an offset or a minimum form the product as a difference of two larger sums.
        size = size + size.max(axis=1, keepdims=True)
        bound = 2e-6 * (np.abs(x).astype(np.float64) @ size.T) + 1e-30
        worst = np.max(np.abs(ours - truth) / bound)
        assert worst < 1, f"{rows} x {cols}: {worst:.2f} times the bound"


@type_ids
def test_matmul_is_row_invariant(runtime: kernels.Runtime, type_id: int) -> None:
    """A row's result has the same bits alone, in any group of 1 to 13 rows, and among 64."""
    for rows, cols in ((33, columns(type_id)[-1]), (97, columns(type_id)[0])):
        matrix = pack(runtime, type_id, rows, cols)
        x = random_activations(NUM_TOKENS, cols)
        whole = kernels.matmul(runtime, matrix, x)
        for count in (*range(1, 14), 31):
            for begin in (0, 1, NUM_TOKENS - count):
                part = kernels.matmul(runtime, matrix, x[begin : begin + count].copy())
                np.testing.assert_array_equal(part, whole[begin : begin + count], err_msg=f"{count} rows at {begin}")


@type_ids
def test_instruction_sets_agree(type_id: int) -> None:
    """All give the same bits; portable C++ but for the last bit where it has no fused multiply-add."""
    cols, rows = columns(type_id)[-1], 97
    x = random_activations(13, cols)
    results = {}
    for isa in ISAS:
        try:
            runtime = kernels.Runtime(1, isa)
        except ValueError:
            continue
        results[isa] = kernels.matmul(runtime, pack(runtime, type_id, rows, cols), x)
    portable = results.pop("scalar")
    if not results:
        pytest.skip("this machine has no instruction set but the portable one")
    expected, *others = results.values()
    for other in others:
        np.testing.assert_array_equal(other, expected, err_msg=str(list(results)))
    spread = np.abs(portable - expected)
    assert spread.max() <= 1e-5 * np.abs(expected).max()
    assert (spread > 0).mean() < 0.01


@type_ids
def test_thread_count_changes_nothing(type_id: int) -> None:
    x = random_activations(9, 512)
    results = []
    for num_threads in (1, 2, 5):
        runtime = make_runtime("", num_threads)
        results.append(kernels.matmul(runtime, pack(runtime, type_id, 200, 512), x))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@quantized_type_ids
def test_sums_do_not_saturate(runtime: kernels.Runtime, type_id: int) -> None:
    """All weight codes at one end and all activations at ±127: the largest integer sums there can be."""
    elements, block_bytes = reference.BLOCKS[type_id]
    cols = max(elements, 256)
    for code, sign in product((0x00, 0x7F, 0x80, 0xFF), (1.0, -1.0)):
        data = np.full((33 * cols // elements, block_bytes), code, np.uint8)
        one = np.array([1.0], "<f2").view(np.uint8)
        data[:, 208:210] = one if type_id == reference.Q6_K else data[:, 208:210]
        if type_id != reference.Q6_K:
            data[:, 0:2] = one
            if type_id not in (reference.Q4_0, reference.Q5_0, reference.Q8_0):
                data[:, 2:4] = one
        x = np.full((20, cols), 127.0 * sign, np.float32)
        x[1::3, ::2] *= -1
        truth = reference.matmul(type_id, data.reshape(-1), 33, x)
        matrix = kernels.Matrix.pack(runtime, data.reshape(-1), type_id, 33, cols)
        for rows in (3, 20):  # straight from the packed bytes, and unpacked
            ours = kernels.matmul(runtime, matrix, x[:rows])
            np.testing.assert_allclose(ours, truth[:rows], rtol=1e-5, atol=1e-5 * np.abs(truth).max() + 1e-3)


@pytest.mark.parametrize("top", [1e-44, 1e-39, 1e-36, 1e30])
def test_extreme_activations(runtime: kernels.Runtime, top: float) -> None:
    """Subnormal and huge rows neither become NaN nor swamp the result."""
    x = (np.random.default_rng(0).uniform(-1, 1, (2, 256)) * top).astype(np.float32)
    for type_id in (reference.Q4_K, reference.Q6_K, reference.Q4_1, reference.Q8_0):
        data = random_weights(type_id, 33, 256)
        ours = kernels.matmul(runtime, kernels.Matrix.pack(runtime, data, type_id, 33, 256), x)
        weights = reference.dequantize(type_id, data, 33 * 256).reshape(33, 256)
        bound = np.abs(x).astype(np.float64).max() * np.abs(weights).sum(axis=1)
        assert np.isfinite(ours).all()
        assert np.all(np.abs(ours) <= bound * 1.05 + 1e-36)


def test_pack_refuses_bad_arguments() -> None:
    runtime = make_runtime("scalar", 1)
    with pytest.raises(ValueError, match="row length"):
        kernels.Matrix.pack(runtime, np.zeros(144, np.uint8), reference.Q4_K, 1, 255)
    with pytest.raises(ValueError, match="row_bytes"):
        kernels.Matrix.pack(runtime, np.zeros(143, np.uint8), reference.Q4_K, 1, 256)
    with pytest.raises(ValueError, match="type"):
        kernels.Matrix.pack(runtime, np.zeros(144, np.uint8), 99, 1, 256)
    with pytest.raises(ValueError, match="cannot run"):
        kernels.Runtime(1, "sse9")


def test_random_shapes(runtime: kernels.Runtime) -> None:
    """Sixty random combinations of type, rows, columns and tokens, so that no tail is only covered by luck."""
    rng = np.random.default_rng(13)
    for i in range(60):
        type_id = int(rng.choice(TYPES))
        elements = reference.BLOCKS[type_id][0]
        step = max(elements, 1)
        rows, cols = int(rng.integers(1, 140)), step * int(rng.integers(1, 1 + 800 // step))
        x = random_activations(int(rng.integers(1, 40)), cols, seed=i)
        data = random_weights(type_id, rows, cols, seed=i)
        ours = kernels.matmul(runtime, kernels.Matrix.pack(runtime, data, type_id, rows, cols), x)
        truth = reference.matmul(type_id, data, rows, x)
        size = np.abs(reference.dequantize(type_id, data, rows * cols)).reshape(rows, cols).astype(np.float64)
        bound = 2e-6 * (np.abs(x).astype(np.float64) @ (size + size.max(axis=1, keepdims=True)).T) + 1e-30
        assert np.all(np.abs(ours - truth) < bound), (reference.TYPE_NAMES[type_id], rows, cols, len(x))


@type_ids
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_stays_visible(runtime: kernels.Runtime, type_id: int, bad: float) -> None:
    """One NaN or infinity makes its own row non-finite, so that the engine notices, and no other row."""
    x = np.random.default_rng(14).normal(size=(3, 256)).astype(np.float32)
    x[1, 77] = bad
    y = kernels.matmul(runtime, pack(runtime, type_id, 33, 256), x)
    assert np.isfinite(y[[0, 2]]).all()
    assert not np.isfinite(y[1]).any()
