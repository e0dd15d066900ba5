"""The exact grids of GGUF blocks in torch: fit, round, pack, unpack, and rounding that lets gradients through.

A block type stores `value = scale * code - minimum` per group of 16 or 32 elements, where the scales and minimums
of K-quants are themselves small integers times one half-precision number a block:

    Q4_K   256 elements, groups of 32   scale = d * sc, minimum = dmin * m   code 0..15, sc and m 0..63
    Q6_K   256 elements, groups of 16   scale = d * sc                       code -32..31, sc -128..127
    Q8_0    32 elements, one group      scale = d                            code -127..127

`Grid` is everything but the codes. Every value here is computed in float32 in the order GGML's reference uses, so it
equals, bit for bit, what a reader of the packed bytes gets. Two ways to fit a grid: "fast" is a closed form whose
output is a fixed point (rounding it again changes nothing), "best" searches for the least (weighted) squared error.
Left out: the other block types; the trained model's widths need none of them.
Source of the layouts: the GGUF block definitions of GGML (block_q4_K, block_q6_K, block_q8_0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from autoglm.errors import ConfigError
from autoglm.formats.quant_types import BLOCK, GGMLType, row_bytes

Flavour = Literal["fast", "best"]
Q4_K, Q6_K, Q8_0 = GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0
GRID_TYPES = (Q4_K, Q6_K, Q8_0)

_GROUP = {Q4_K: 32, Q6_K: 16, Q8_0: 32}
_CODES = {Q4_K: (0, 15), Q6_K: (-32, 31), Q8_0: (-127, 127)}
_MAX_HALF = 65504.0
_SMALLEST_HALF = 2.0**-24
_BLOCKS_AT_ONCE = 1 << 13  # 2M weights of a K-quant: the temporaries of a search stay within some ten MB


@dataclass(frozen=True)
class Grid:
    """The values a matrix may take; N blocks of G groups, rows of the matrix one after another.

    shape  (rows, columns) of the matrix
    d      f16 [N]                 dmin  f16 [N], Q4_K only
    sc     i16 [N, G], not Q8_0    m     i16 [N, G], Q4_K only
    """

    type: GGMLType
    shape: tuple[int, int]
    d: Tensor
    dmin: Tensor | None = None
    sc: Tensor | None = None
    m: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """f32 [N, G, 1], the width of one step."""
        step = self.d.float()[:, None]
        return (step if self.sc is None else step * self.sc.float())[:, :, None]

    @property
    def minimum(self) -> Tensor | None:
        """f32 [N, G, 1], what is taken off; None for types without one."""
        if self.dmin is None or self.m is None:
            return None
        return (self.dmin.float()[:, None] * self.m.float())[:, :, None]

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest code of every element: f32 [N, G, group], whole numbers. weight f32 [rows, columns]."""
        return _codes(_grouped(weight, self.type), self.scale, self.minimum, self.type)

    def values(self, codes: Tensor) -> Tensor:
        """f32 [rows, columns] from f32 [N, G, group], bit for bit what a reader of the file computes."""
        return _values(codes, self.scale, self.minimum).reshape(self.shape)

    def round(self, weight: Tensor) -> Tensor:
        """The nearest values of the grid, f32 [rows, columns]."""
        return self.values(self.codes(weight))

    def pack(self, weight: Tensor) -> Tensor:
        """The bytes of the file, u8 [rows, row bytes], of the nearest values."""
        blocks = _PACK[self.type](self, self.codes(weight))
        return blocks.reshape(self.shape[0], row_bytes(self.type, self.shape[1]))

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are there, by name, for a checkpoint."""
        parts = {"d": self.d, "dmin": self.dmin, "sc": self.sc, "m": self.m}
        return {name: part for name, part in parts.items() if part is not None}


def fit_grid(weight: Tensor, type: GGMLType, flavour: Flavour = "best", *, importance: Tensor | None = None) -> Grid:
    """A grid for a matrix f32 [rows, columns].

    importance  f32 [columns], how much a squared error in that column counts (the mean square of its input);
                read by "best" only, None weighs all alike
    Raises ConfigError if the type has no grid here, a row is no whole number of blocks, or a weight is not finite.
    """
    weight = weight.detach().float()
    _check(weight, type)
    rows, columns = weight.shape
    groups = _grouped(weight, type)
    counts: Tensor | None = None
    if importance is not None and flavour == "best":
        # A floor keeps columns whose input was never seen from being rounded to anything at all.
        each = importance.to(weight).clamp_min(float(importance.float().mean()) * 1e-3 + 1e-30)
        counts = _grouped(each.expand(rows, columns), type)
    pieces = []
    for begin in range(0, len(groups), _BLOCKS_AT_ONCE):
        part = slice(begin, begin + _BLOCKS_AT_ONCE)
        fast = _FIT_FAST[type](groups[part])
        if flavour == "best":
            fast = _better(groups[part], None if counts is None else counts[part], fast, type)
        pieces.append(fast)
    joined = [None if part[0] is None else torch.cat(part) for part in zip(*pieces, strict=True)]
    return Grid(type, (rows, columns), *joined)  # type: ignore[arg-type]


def quantize(weight: Tensor, type: GGMLType, flavour: Flavour = "best", *, importance: Tensor | None = None) -> Tensor:
    """f32 [rows, columns] -> the file's bytes, u8 [rows, row bytes]. Arguments and errors as in `fit_grid`."""
    return fit_grid(weight, type, flavour, importance=importance).pack(weight.detach().float())


def dequantize(data: Tensor, type: GGMLType) -> Tensor:
    """The file's bytes u8 [rows, row bytes] -> f32 [rows, columns]."""
    grid, codes = unpack(data, type)
    return grid.values(codes)


def unpack(data: Tensor, type: GGMLType) -> tuple[Grid, Tensor]:
    """The file's bytes u8 [rows, row bytes] -> their grid and codes f32 [N, G, group]."""
    elements, block_bytes = BLOCK[type]
    if type not in GRID_TYPES or data.dim() != 2 or data.shape[1] % block_bytes:
        raise ConfigError(f"rows of {data.shape[-1]} bytes are not whole {type.name} blocks this trainer reads")
    shape = (data.shape[0], data.shape[1] // block_bytes * elements)
    return _UNPACK[type](data.reshape(-1, block_bytes), shape)


class _RoundWeight(torch.autograd.Function):
    """Forward the rounded weight, backward the gradient as it is (straight-through; Bengio 2013)."""

    @staticmethod
    def forward(context: Any, weight: Tensor, grid: Grid) -> Tensor:
        return grid.round(weight)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _RoundActivations(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, block: int) -> Tensor:
        return round_activations(x, block)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def fake_quantize(weight: Tensor, type: GGMLType | Grid) -> Tensor:
    """The weight as the file will hold it; gradients pass as if nothing had been rounded.

    type  a block type (the closed-form grid of this very weight) or a grid fitted before
    """
    grid = type if isinstance(type, Grid) else fit_grid(weight, type, "fast")
    result: Tensor = _RoundWeight.apply(weight, grid)  # type: ignore[no-untyped-call]
    return result


def fake_quantize_activations(x: Tensor, block: int) -> Tensor:
    """`round_activations`, through which gradients pass as if nothing had been rounded."""
    result: Tensor = _RoundActivations.apply(x, block)  # type: ignore[no-untyped-call]
    return result


def round_activations(x: Tensor, block: int) -> Tensor:
    """Activations as the CPU kernels read them: int8 with one scale for each `block` elements of a row.

    x  f32 [..., K], K a multiple of block (256 before K-quants, 32 before Q8_0)
    q = round_half_even(x * (127 / max |x|)), value q * (max |x| / 127), all in float32.
    Source: quantize_span of native/activations.h.
    """
    blocks = x.float().reshape(*x.shape[:-1], -1, block)
    top = blocks.abs().amax(-1, keepdim=True)
    inverse = 127.0 / top
    usable = torch.isfinite(inverse)
    codes = torch.round(blocks * torch.where(usable, inverse, 0.0)) + 0.0
    return (codes * torch.where(usable, top / 127.0, 0.0)).flatten(-2).to(x.dtype)


def activation_block(type: GGMLType) -> int:
    """Elements that share one activation scale before a matrix of this type; 0 for float types."""
    elements = BLOCK[type][0]
    return 0 if elements == 1 else elements


# --- shared arithmetic -------------------------------------------------------------------------------------


def _check(weight: Tensor, type: GGMLType) -> None:
    if type not in GRID_TYPES:
        raise ConfigError(f"{type.name} has no grid here, expected one of {', '.join(t.name for t in GRID_TYPES)}")
    if weight.dim() != 2 or weight.shape[1] % BLOCK[type][0]:
        raise ConfigError(
            f"a matrix of shape {list(weight.shape)} cannot be {type.name}: "
            f"its rows must be whole blocks of {BLOCK[type][0]}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError(f"a matrix of shape {list(weight.shape)} holds NaN or infinity and cannot be quantized")


def _grouped(weight: Tensor, type: GGMLType) -> Tensor:
    return weight.reshape(-1, BLOCK[type][0] // _GROUP[type], _GROUP[type])


def _codes(groups: Tensor, scale: Tensor, minimum: Tensor | None, type: GGMLType) -> Tensor:
    low, high = _CODES[type]
    shifted = groups if minimum is None else groups + minimum
    # A group of scale 0 holds one value only, whatever its codes: 0 * inf would be NaN, 0 / 1 is a code in range.
    codes = torch.round(shifted / torch.where(scale == 0, torch.inf, scale)).clamp_(low, high)
    return codes + 0.0  # integers in the file know no -0.0


def _values(codes: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    return codes * scale if minimum is None else codes * scale - minimum


def _half_below(x: Tensor) -> Tensor:
    """The largest half not above x (x f32 [N] >= 0); the smallest positive one for anything tinier but not 0.

    Rounding down makes the group that sets d use the last step of its scale, hence a second fit finds the same d.
    """
    slack = (x * (1 + 2.0**-18)).clamp(max=_MAX_HALF)  # a d that was exact may come back some float32 ulp lower
    half = slack.to(torch.float16)
    half = torch.where(half.float() > slack, (half.view(torch.int16) - 1).view(torch.float16), half)
    return torch.where((half == 0) & (x > 0), torch.full_like(half, _SMALLEST_HALF), half)


def _ratio(x: Tensor, d: Tensor) -> Tensor:
    """x [N, G] in units of the half d [N]; 0 where d is 0."""
    step = d.float()[:, None]
    return x / torch.where(step == 0, torch.inf, step)


_Parts = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # d, dmin, sc, m of some blocks


# --- closed forms ------------------------------------------------------------------------------------------


def _fit_fast_q4(groups: Tensor) -> _Parts:
    """The lowest element lands on code 0 and the highest on 15, both really used: that makes it a fixed point."""
    low, high = groups.amin(2).clamp(max=0), groups.amax(2)
    dmin = _half_below(low.amin(1).abs() / 63)
    wanted = _ratio(-low, dmin)
    m = torch.round(wanted).clamp_(max=63)
    # Rounded up by more than a quarter step of the group, no element would reach code 0: then round down.
    too_far = dmin.float()[:, None] * m + low > (high - low) / 60
    m = torch.where(too_far, torch.floor(wanted).clamp_(max=63), m)
    reach = (high + dmin.float()[:, None] * m).clamp_(min=0)
    d = _half_below(reach.amax(1) / (15 * 63))
    sc = torch.minimum(torch.round(_ratio(reach / 15, d)), torch.floor(_ratio(reach / 14.6, d))).clamp_(max=63)
    return d, dmin, sc.to(torch.int16), m.to(torch.int16)


def _fit_fast_q6(groups: Tensor) -> _Parts:
    """The highest element lands on code 31 or the lowest on -32, whichever asks for the wider steps."""
    top = torch.maximum(groups.amax(2), groups.amin(2) * (-31 / 32)).abs()  # abs: no -0.0
    d = _half_below(top.amax(1) / (31 * 127))
    sc = torch.minimum(torch.round(_ratio(top / 31, d)), torch.floor(_ratio(top / 30.6, d))).clamp_(max=127)
    return d, None, sc.to(torch.int16), None


def _fit_fast_q8(groups: Tensor) -> _Parts:
    return _half_below(groups.abs().amax(2)[:, 0] / 127), None, None, None


_FIT_FAST = {Q4_K: _fit_fast_q4, Q6_K: _fit_fast_q6, Q8_0: _fit_fast_q8}


# --- searches ----------------------------------------------------------------------------------------------


def _error(groups: Tensor, counts: Tensor | None, scale: Tensor, minimum: Tensor | None, type: GGMLType) -> Tensor:
    """Weighted squared error of every group, f32 [N, G]."""
    off = _values(_codes(groups, scale, minimum, type), scale, minimum) - groups
    off = off * off
    return (off if counts is None else off * counts).sum(2)


def _better(groups: Tensor, counts: Tensor | None, fast: _Parts, type: GGMLType) -> _Parts:
    """The searched fit, block by block, wherever it beats the closed form."""
    searched = _SEARCH[type](groups, counts)

    def error(parts: _Parts) -> Tensor:
        grid = Grid(type, (len(groups), BLOCK[type][0]), *parts)
        return _error(groups, counts, grid.scale, grid.minimum, type).sum(1)

    wins = error(searched) < error(fast)

    def choose(new: Tensor | None, old: Tensor | None) -> Tensor | None:
        if new is None or old is None:
            return None
        return torch.where(wins if new.dim() == 1 else wins[:, None], new, old)

    d, dmin, sc, m = (choose(new, old) for new, old in zip(searched, fast, strict=True))
    assert d is not None
    return d, dmin, sc, m


def _weighted(counts: Tensor | None, x: Tensor) -> Tensor:
    return (x if counts is None else x * counts).sum(2, keepdim=True)


def _search_q4(groups: Tensor, counts: Tensor | None) -> _Parts:
    """Per group: shrink the range step by step, each time solve for scale and minimum by least squares."""
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True)
    ones = torch.ones_like(groups) if counts is None else counts
    total, sum_x = ones.sum(2, keepdim=True), _weighted(counts, groups)
    best = torch.full_like(low[:, :, 0], torch.inf)
    scale, minimum = torch.zeros_like(low), -low
    for levels in torch.linspace(13.6, 18.4, 13).tolist():
        first = (high - low).clamp_min(0) / levels
        codes = _codes(groups, first, -low, Q4_K)
        sum_q, sum_qq = _weighted(counts, codes), _weighted(counts, codes * codes)
        sum_qx = _weighted(counts, codes * groups)
        spread = total * sum_qq - sum_q * sum_q
        solved = (total * sum_qx - sum_q * sum_x) / torch.where(spread > 0, spread, torch.inf)
        offset = (solved * sum_q - sum_x) / total
        # A minimum cannot be negative: then it is 0, and the scale alone is fitted.
        alone = sum_qx / torch.where(sum_qq > 0, sum_qq, torch.inf)
        solved = torch.where(offset < 0, alone, solved).clamp_min(0)
        offset = offset.clamp_min(0)
        error = _error(groups, counts, solved, offset, Q4_K)
        wins = error < best
        best = torch.where(wins, error, best)
        scale = torch.where(wins[:, :, None], solved, scale)
        minimum = torch.where(wins[:, :, None], offset, minimum)
    d = _nearest_half(scale.amax((1, 2)) / 63)
    dmin = _nearest_half(minimum.amax((1, 2)) / 63)
    sc = torch.round(_ratio(scale[:, :, 0], d)).clamp_(0, 63)
    m = torch.round(_ratio(minimum[:, :, 0], dmin)).clamp_(0, 63)
    steps = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    sc, refined = _refine(groups, counts, Q4_K, d, sc, steps, dmin, m)
    assert refined is not None
    return d, dmin, sc.to(torch.int16), refined.to(torch.int16)


def _search_q6(groups: Tensor, counts: Tensor | None) -> _Parts:
    """Per group: put the element of largest magnitude on -32, 31 or nearby, then solve for the scale."""
    index = groups.abs().argmax(2, keepdim=True)
    extreme = groups.gather(2, index)
    best = torch.full_like(extreme[:, :, 0], torch.inf)
    scale = torch.zeros_like(extreme)
    for level in [*torch.linspace(-35, -29, 7).tolist(), *torch.linspace(28, 34, 7).tolist()]:
        codes = _codes(groups, extreme / level, None, Q6_K)
        sum_qq = _weighted(counts, codes * codes)
        solved = _weighted(counts, codes * groups) / torch.where(sum_qq > 0, sum_qq, torch.inf)
        error = _error(groups, counts, solved, None, Q6_K)
        wins = error < best
        best = torch.where(wins, error, best)
        scale = torch.where(wins[:, :, None], solved, scale)
    d = _nearest_half(scale.abs().amax((1, 2)) / 127)
    sc = torch.round(_ratio(scale[:, :, 0], d)).clamp_(-128, 127)
    sc, _ = _refine(groups, counts, Q6_K, d, sc, [(-1, 0), (0, 0), (1, 0)])
    return d, None, sc.to(torch.int16), None


def _search_q8(groups: Tensor, counts: Tensor | None) -> _Parts:
    top = groups.abs().amax(2)[:, 0]
    best = torch.full_like(top, torch.inf)
    d = torch.zeros_like(top, dtype=torch.float16)
    for levels in (127.0, 127.4, 128.0, 128.7, 129.5):
        trial = _nearest_half(top / levels)
        error = _error(groups, counts, trial.float()[:, None, None], None, Q8_0)[:, 0]
        wins = error < best
        best, d = torch.where(wins, error, best), torch.where(wins, trial, d)
    return d, None, None, None


_SEARCH = {Q4_K: _search_q4, Q6_K: _search_q6, Q8_0: _search_q8}


def _nearest_half(x: Tensor) -> Tensor:
    half = x.clamp(max=_MAX_HALF).to(torch.float16)
    return torch.where((half == 0) & (x > 0), torch.full_like(half, _SMALLEST_HALF), half)


def _refine(
    groups: Tensor,
    counts: Tensor | None,
    type: GGMLType,
    d: Tensor,
    sc: Tensor,
    steps: list[tuple[int, int]],
    dmin: Tensor | None = None,
    m: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Try the neighbours of every rounded scale (and minimum) of the block; keep the least error."""
    limits = (0, 63) if type == Q4_K else (-128, 127)
    best = torch.full_like(sc, torch.inf)
    kept, kept_m = sc, m
    for step, step_m in steps:
        trial = (sc + step).clamp(*limits)
        trial_m = None if m is None else (m + step_m).clamp(0, 63)
        low = None if trial_m is None or dmin is None else (dmin.float()[:, None] * trial_m)[:, :, None]
        error = _error(groups, counts, (d.float()[:, None] * trial)[:, :, None], low, type)
        wins = error < best
        best, kept = torch.where(wins, error, best), torch.where(wins, trial, kept)
        if trial_m is not None and kept_m is not None:
            kept_m = torch.where(wins, trial_m, kept_m)
    return kept, kept_m


# --- bytes -------------------------------------------------------------------------------------------------


def _half_bytes(half: Tensor) -> Tensor:
    return half.reshape(-1, 1).contiguous().view(torch.uint8)


def _half_at(blocks: Tensor, offset: int) -> Tensor:
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16)[:, 0]


def _pack_q8(grid: Grid, codes: Tensor) -> Tensor:
    return torch.cat([_half_bytes(grid.d), codes.flatten(1).to(torch.int8).view(torch.uint8)], 1)


def _unpack_q8(blocks: Tensor, shape: tuple[int, int]) -> tuple[Grid, Tensor]:
    codes = blocks[:, 2:].contiguous().view(torch.int8).float()[:, None]
    return Grid(Q8_0, shape, _half_at(blocks, 0)), codes


def _pack_q4(grid: Grid, codes: Tensor) -> Tensor:
    assert grid.dmin is not None and grid.sc is not None and grid.m is not None
    sc, m = grid.sc.to(torch.uint8), grid.m.to(torch.uint8)
    twelve = torch.cat(
        [
            sc[:, :4] | ((sc[:, 4:] >> 4) << 6),
            m[:, :4] | ((m[:, 4:] >> 4) << 6),
            (sc[:, 4:] & 15) | ((m[:, 4:] & 15) << 4),
        ],
        1,
    )
    pairs = codes.to(torch.uint8).reshape(-1, 4, 2, 32)  # 32 bytes hold the nibbles of 64 elements
    nibbles = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)
    return torch.cat([_half_bytes(grid.d), _half_bytes(grid.dmin), twelve, nibbles], 1)


def _unpack_q4(blocks: Tensor, shape: tuple[int, int]) -> tuple[Grid, Tensor]:
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    sc = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], 1).to(torch.int16)
    m = torch.cat([mid & 63, (high >> 4) | ((mid >> 6) << 4)], 1).to(torch.int16)
    chunks = blocks[:, 16:].reshape(-1, 4, 1, 32)
    codes = torch.cat([chunks & 15, chunks >> 4], 2).reshape(-1, 8, 32).float()
    return Grid(Q4_K, shape, _half_at(blocks, 0), _half_at(blocks, 2), sc, m), codes


def _pack_q6(grid: Grid, codes: Tensor) -> Tensor:
    assert grid.sc is not None
    u = (codes + 32).to(torch.uint8).reshape(-1, 2, 4, 32)  # two halves of four rows of 32
    low, top = u & 15, u >> 4
    ql = torch.stack([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], 2)
    qh = top[:, :, 0] | (top[:, :, 1] << 2) | (top[:, :, 2] << 4) | (top[:, :, 3] << 6)
    scales = grid.sc.to(torch.int8).view(torch.uint8)
    return torch.cat([ql.flatten(1), qh.flatten(1), scales, _half_bytes(grid.d)], 1)


def _unpack_q6(blocks: Tensor, shape: tuple[int, int]) -> tuple[Grid, Tensor]:
    ql, qh = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = torch.cat([ql & 15, ql >> 4], 2)
    high = torch.cat([(qh >> shift) & 3 for shift in (0, 2, 4, 6)], 2)
    codes = (low | (high << 4)).reshape(-1, 16, 16).float() - 32
    sc = blocks[:, 192:208].contiguous().view(torch.int8).to(torch.int16)
    return Grid(Q6_K, shape, _half_at(blocks, 208), None, sc), codes


_PACK = {Q4_K: _pack_q4, Q6_K: _pack_q6, Q8_0: _pack_q8}
_UNPACK = {Q4_K: _unpack_q4, Q6_K: _unpack_q6, Q8_0: _unpack_q8}
