"""Rounding in training equals what the file holds, bit for bit, and what the kernels compute with it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm.errors import ConfigError
from autoglm.formats.quant_types import BLOCK, GGMLType
from autoglm.kernels import Matrix, Runtime, matmul, reference
from autoglm.kernels import dequantize as native_dequantize
from autoglm.train import grids
from autoglm.train.grids import GRID_TYPES, Flavour, fit_grid

FLAVOURS: tuple[Flavour, ...] = ("fast", "best")
ROWS, COLUMNS = 24, 512


def hard_matrix(seed: int, scale: float = 0.05) -> torch.Tensor:
    """f32 [24, 512]: normal rows, and rows of each kind that breaks a quantizer."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(ROWS, COLUMNS, generator=generator) * scale
    w[4] = 0
    w[5] = w[5].abs() + scale  # above 0 throughout: there is no minimum to take off
    w[6] = -w[6].abs() - scale
    w[7] = scale
    w[8, ::37] *= 1000  # outliers: most groups become a tiny part of their block's scale
    w[9] *= 1e-6  # half precision of the block scale is subnormal here
    w[10] *= 1e-12
    w[11, 32:64] = 0
    w[12, 16:] *= 1e-3
    w[13] = w[13].sign() * scale
    return w


def bits(x: torch.Tensor | np.ndarray) -> np.ndarray:
    values = x.numpy() if isinstance(x, torch.Tensor) else x
    return np.ascontiguousarray(values, np.float32).reshape(ROWS, COLUMNS).view(np.uint32)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("type_", GRID_TYPES, ids=lambda t: t.name)
def test_rounded_weight_is_the_dequantized_file_bit_for_bit(type_: GGMLType, flavour: Flavour) -> None:
    w = hard_matrix(1)
    grid = fit_grid(w, type_, flavour)
    rounded, data = grids.fake_quantize(w, grid), grid.pack(w).numpy()
    assert data.dtype == np.uint8 and data.shape == (ROWS, COLUMNS // BLOCK[type_][0] * BLOCK[type_][1])
    by_gguf = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(int(type_)))
    np.testing.assert_array_equal(bits(rounded), bits(by_gguf))
    np.testing.assert_array_equal(bits(rounded), bits(native_dequantize(data.reshape(-1), int(type_), w.numel())))
    np.testing.assert_array_equal(bits(rounded), bits(reference.dequantize(int(type_), data, w.numel())))
    np.testing.assert_array_equal(bits(rounded), bits(grids.dequantize(torch.from_numpy(data), type_)))
    if flavour == "fast":
        np.testing.assert_array_equal(bits(rounded), bits(grids.fake_quantize(w, type_)))


@pytest.mark.parametrize("type_", GRID_TYPES, ids=lambda t: t.name)
def test_any_bytes_are_read_as_gguf_reads_them(type_: GGMLType) -> None:
    """Scales, minimums and codes no quantizer of ours would choose, negative d among them."""
    rng = np.random.default_rng(3)
    elements, block_bytes = BLOCK[type_]
    data = rng.integers(0, 256, (ROWS, COLUMNS // elements, block_bytes), dtype=np.uint8)
    halves = {GGMLType.Q4_K: (0, 2), GGMLType.Q6_K: (208,), GGMLType.Q8_0: (0,)}[type_]
    for offset in halves:
        values = rng.normal(size=data.shape[:2]).astype("<f2")
        data[..., offset : offset + 2] = values[..., None].view(np.uint8)
    data = data.reshape(ROWS, -1)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(int(type_)))
    np.testing.assert_array_equal(bits(grids.dequantize(torch.from_numpy(data), type_)), bits(expected))


@pytest.mark.parametrize("type_", GRID_TYPES, ids=lambda t: t.name)
@given(seed=st.integers(0, 2**32 - 1), power=st.floats(-8, 3))
@settings(max_examples=40, deadline=None)
def test_fast_grid_rounds_its_own_result_to_itself(type_: GGMLType, seed: int, power: float) -> None:
    once = grids.fake_quantize(hard_matrix(seed, 10.0**power), type_)
    np.testing.assert_array_equal(bits(grids.fake_quantize(once, type_)), bits(once))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("type_", GRID_TYPES, ids=lambda t: t.name)
def test_a_file_read_back_packs_to_the_same_values(type_: GGMLType, flavour: Flavour) -> None:
    w = hard_matrix(4)
    data = fit_grid(w, type_, flavour).pack(w)
    grid, codes = grids.unpack(data, type_)
    values = grid.values(codes)
    np.testing.assert_array_equal(bits(grid.round(values)), bits(values))
    np.testing.assert_array_equal(bits(grids.dequantize(grid.pack(values), type_)), bits(values))


@pytest.mark.parametrize("type_", GRID_TYPES, ids=lambda t: t.name)
def test_search_never_loses_to_the_closed_form(type_: GGMLType) -> None:
    w = hard_matrix(5)
    each = [
        (grids.fake_quantize(w, fit_grid(w, type_, flavour)) - w).pow(2).reshape(-1, BLOCK[type_][0]).sum(1)
        for flavour in FLAVOURS
    ]
    assert bool((each[1] <= each[0] * (1 + 1e-5)).all())
    plain = 4 * COLUMNS // BLOCK[type_][0]  # the blocks of four normal rows
    assert each[1][:plain].sum() < 0.98 * each[0][:plain].sum()


@pytest.mark.parametrize("type_", GRID_TYPES, ids=lambda t: t.name)
def test_search_spends_its_precision_where_it_counts(type_: GGMLType) -> None:
    w = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(6)) * 0.05
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(7)) ** 6

    def error(grid: grids.Grid) -> float:
        return float(((grid.round(w) - w).pow(2) * importance).sum())

    assert error(fit_grid(w, type_, importance=importance)) < 0.95 * error(fit_grid(w, type_))


def test_errors_are_as_small_as_the_block_types_allow() -> None:
    """Relative RMS error on normal weights; what an exhaustive search gives is about a twentieth below "best"."""
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(8))
    bounds = {GGMLType.Q4_K: (0.080, 0.0715), GGMLType.Q6_K: (0.0195, 0.0172), GGMLType.Q8_0: (0.0055, 0.0054)}
    for type_, of_type in bounds.items():
        for flavour, bound in zip(FLAVOURS, of_type, strict=True):
            assert (fit_grid(w, type_, flavour).round(w) - w).pow(2).mean().sqrt() < bound, (type_, flavour)


@pytest.mark.parametrize("type_", GRID_TYPES, ids=lambda t: t.name)
def test_gradients_pass_as_if_nothing_were_rounded(type_: GGMLType) -> None:
    w = hard_matrix(9).requires_grad_()
    factor = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(10))
    (grids.fake_quantize(w, type_) * factor).sum().backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, factor, rtol=0, atol=0)
    x = hard_matrix(11).requires_grad_()
    (grids.fake_quantize_activations(x, 32) * factor).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, factor, rtol=0, atol=0)


@pytest.mark.parametrize("block", [32, 256])
def test_activations_are_rounded_as_the_kernels_do(block: int) -> None:
    x = hard_matrix(12, 3.0)
    expected = reference.quantize_activations(x.numpy(), block)
    values = expected.q.astype(np.float32) * np.repeat(expected.scale, block, axis=1)
    np.testing.assert_array_equal(bits(grids.round_activations(x, block)), bits(values))


@pytest.mark.parametrize("type_", GRID_TYPES, ids=lambda t: t.name)
def test_a_product_in_training_is_the_engine_s_product(type_: GGMLType) -> None:
    """The two differ by float32 summation order alone; unrounded activations would be off a hundred times more."""
    w, x = hard_matrix(13), torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(14))
    grid, runtime = fit_grid(w, type_), Runtime(1)
    packed = Matrix.pack(runtime, grid.pack(w).numpy().reshape(-1), int(type_), ROWS, COLUMNS)
    engine = torch.from_numpy(matmul(runtime, packed, x.numpy()).copy())
    weight = grids.fake_quantize(w, grid)
    rounded = grids.fake_quantize_activations(x, grids.activation_block(type_))
    ours = rounded.double() @ weight.double().T
    size = rounded.double().abs() @ weight.double().abs().T + 1e-30
    assert float(((ours - engine).abs() / size).max()) < 1e-6
    assert float(((x.double() @ weight.double().T - engine).abs() / size).max()) > 1e-5


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[4, 96\].*blocks of 256"):
        grids.quantize(torch.zeros(4, 96), GGMLType.Q4_K)
    with pytest.raises(ConfigError, match="NaN or infinity"):
        grids.quantize(torch.full((4, 256), torch.nan), GGMLType.Q8_0)
    with pytest.raises(ConfigError, match="Q5_0 has no grid"):
        grids.quantize(torch.zeros(4, 256), GGMLType.Q5_0)
    with pytest.raises(ConfigError, match="not whole Q6_K blocks"):
        grids.dequantize(torch.zeros(4, 100, dtype=torch.uint8), GGMLType.Q6_K)
