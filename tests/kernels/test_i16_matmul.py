"""Products in 16-bit whole numbers: against the NumPy truth, exact values and half floats, and row by row."""

from __future__ import annotations

import numpy as np
import pytest

from autoglm import kernels
from autoglm.kernels import reference
from autoglm.model.layers import I16_TYPE_ID, i16_matrix
from tests.kernels.blocks import random_activations
from tests.kernels.conftest import ISAS, make_runtime

SHAPES = [(1, 64), (33, 192), (97, 256), (40, 320), (64, 1024)]


def random_weights(rows: int, cols: int) -> np.ndarray:
    weights = np.random.default_rng(3).normal(0, 1, (rows, cols)).astype(np.float32)
    weights[:, 7] *= 30
    weights[0, :64] = 0
    return weights


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_product_against_reference(runtime: kernels.Runtime, rows: int, cols: int) -> None:
    """As the truth on the same grids but for what falls on an edge of them: a step of one number, here and there."""
    weights, x = random_weights(rows, cols), random_activations(13, cols)
    ours = kernels.matmul(runtime, i16_matrix(runtime, weights), x)
    error = np.abs(ours - reference.matmul_i16(weights, x))
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weights, axis=1) + 1e-30
    assert np.median(error / size) < 3e-7
    assert (error / size).max() < 4e-5


@pytest.mark.parametrize(("outlier", "most"), [(1, 0.5), (30, 0.95)])
def test_it_loses_less_than_half_floats(runtime: kernels.Runtime, outlier: float, most: float) -> None:
    """Half floats are what such weights are stored as, and what others multiply their activations as. One number in
    sixty-four far larger than the rest costs the rest digits, but no more than halves have."""
    rng = np.random.default_rng(4)
    weights, x = (rng.normal(0, 1, (rows, 1024)).astype(np.float32) for rows in (64, 40))
    weights[:, 7::64] *= outlier
    x[:, 5::64] *= outlier
    exact = x.astype(np.float64) @ weights.astype(np.float64).T
    halves = x.astype(np.float16).astype(np.float64) @ weights.astype(np.float16).astype(np.float64).T

    def error(y: np.ndarray) -> float:
        return float(np.sqrt(np.square(y - exact).mean()))

    assert error(kernels.matmul(runtime, i16_matrix(runtime, weights), x)) < most * error(halves)


def test_rows_do_not_depend_on_each_other(runtime: kernels.Runtime) -> None:
    matrix, x = i16_matrix(runtime, random_weights(97, 320)), random_activations(64, 320)
    whole = kernels.matmul(runtime, matrix, x)
    for count in (*range(1, 14), 31):
        for begin in (0, 1, 64 - count):
            part = kernels.matmul(runtime, matrix, x[begin : begin + count].copy())
            np.testing.assert_array_equal(part, whole[begin : begin + count], err_msg=f"{count} rows at {begin}")


def test_instruction_sets_and_threads_agree() -> None:
    weights, x, results = random_weights(97, 320), random_activations(13, 320), {}
    for isa, threads in (*((isa, 1) for isa in ISAS), ("", 3)):
        try:
            runtime = make_runtime(isa, threads)
        except (ValueError, pytest.skip.Exception):
            continue
        results[isa] = kernels.matmul(runtime, i16_matrix(runtime, weights), x)
    for isa in results.keys() - {"scalar"}:
        np.testing.assert_array_equal(results[isa], results[""], err_msg=isa)
    np.testing.assert_allclose(results["scalar"], results[""], rtol=0, atol=1e-5 * np.abs(results[""]).max())


def test_the_largest_sums_fit(runtime: kernels.Runtime) -> None:
    """A row times itself, all of its length in one number or spread over all: sums just under 2^30."""
    one, all_equal = np.zeros((2, 64), np.float32), np.full((2, 64), 5.0, np.float32)
    one[:, 9] = [3.0, -3.0]
    for rows in (one, all_equal):
        ours = kernels.matmul(runtime, i16_matrix(runtime, rows), rows)
        np.testing.assert_allclose(ours, rows.astype(np.float64) @ rows.T.astype(np.float64), rtol=2e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen(runtime: kernels.Runtime, bad: float) -> None:
    matrix, x = i16_matrix(runtime, random_weights(33, 128)), random_activations(3, 128)
    x[1, 70] = bad
    with np.errstate(invalid="ignore"):
        ours = kernels.matmul(runtime, matrix, x)
    assert np.isnan(ours[1]).all()
    assert np.isfinite(ours[[0, 2]]).all()


def test_columns_are_filled_up(runtime: kernels.Runtime) -> None:
    weights, x = random_weights(33, 100), random_activations(5, 100)
    matrix = i16_matrix(runtime, weights)
    assert (matrix.type_id, matrix.cols) == (I16_TYPE_ID, 128)
    padded = np.pad(x, ((0, 0), (0, 28)))
    whole = i16_matrix(runtime, np.pad(weights, ((0, 0), (0, 28))))
    np.testing.assert_array_equal(kernels.matmul(runtime, matrix, padded), kernels.matmul(runtime, whole, padded))


def test_what_is_not_finite_stays_float(runtime: kernels.Runtime) -> None:
    weights = random_weights(33, 128)
    weights[5, 5] = np.inf
    assert i16_matrix(runtime, weights).type_id == 0
