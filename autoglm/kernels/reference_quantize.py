"""Plain NumPy truth of the native quantizers: float32 rows to GGML blocks, equal to the C++ bit for bit.

Every value is float32 and every sum is taken in one order (halves added to halves), so that a compiler's vector width
changes nothing. The search minimises the squared error of each group: some starting grids, the least-squares scale
(and minimum) for the codes each of them gives, the best of these rounded to what the block can hold, and its
neighbours tried. All elements weigh alike: without measured activations that is the least expected error of a product.
Q8_0 is the format's closed form, so that our files have the bytes everyone's have.
Source of the layouts: the GGUF block definitions of GGML; the formulas are the normal equations of a line.
"""

from __future__ import annotations

import numpy as np

from autoglm.kernels.reference import BLOCKS, Q4_K, Q5_0, Q6_K, Q8_0, TYPE_NAMES, F32Array, U8Array

QUANTIZERS = (Q8_0, Q5_0, Q4_K, Q6_K)
# Code steps that the range of a group is laid over to start with, and least-squares rounds after the best of them.
# Tried on Gaussian and heavy-tailed rows: 17 starts gain 0.1 %, no rounds lose 0.2 to 1 %, one start loses 2 %.
Q4_K_STARTS = (13.2, 13.8, 14.4, 15.0, 15.6, 16.2, 16.8, 17.4, 18.0)
REFITS = 2
# Where the element of largest magnitude is put to start with.
Q5_0_STARTS = (-16.0, -15.5, -16.6, -17.2, -17.8, 15.0, 15.6, 16.2)
Q6_K_STARTS = (-32.0, -31.4, -32.6, -33.2, 31.0, 31.6)
_STEPS = (0, -1, 1)  # neighbours of a rounded scale or minimum
_MAX_HALF = np.float32(65504)
_TINY = np.float32(2.0**-100)  # below it an inverse would overflow
_F0, _F1 = np.float32(0), np.float32(1)


def quantize(type_id: int, x: F32Array) -> U8Array:
    """Rows of weights as the blocks of a file.

    x  f32 [rows, cols], finite, cols a multiple of the type's block
    Returns u8 [rows * cols / block elements * block bytes]. Raises ValueError for another type or width.
    """
    if type_id not in QUANTIZERS:
        raise ValueError(f"{TYPE_NAMES.get(type_id, type_id)} has no quantizer here")
    elements, _ = BLOCKS[type_id]
    if x.shape[1] % elements:
        raise ValueError(f"rows of {x.shape[1]} are not whole blocks of {TYPE_NAMES[type_id]}")
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, elements)
    return np.ascontiguousarray(_QUANTIZE[type_id](blocks)).reshape(-1)


def _sum(x: F32Array) -> F32Array:
    """Over the last axis, a power of two long: halves are added to halves until one is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return np.asarray(x[..., 0], np.float32)


def _inverse(x: F32Array) -> F32Array:
    """1 / x, and 0 where x is as good as 0."""
    is_tiny = np.abs(x) < _TINY
    return np.asarray(np.where(is_tiny, _F0, _F1 / np.where(is_tiny, _F1, x)), np.float32)


def _codes(x: F32Array, low: int, high: int) -> F32Array:
    return np.asarray(np.rint(np.clip(x, np.float32(low), np.float32(high))) + _F0, np.float32)


def _half(x: F32Array) -> F32Array:
    """The nearest half, never infinity."""
    return np.clip(x, -_MAX_HALF, _MAX_HALF).astype(np.float16).astype(np.float32)


def _half_above(x: F32Array) -> F32Array:
    """The least half not below x >= 0: what is counted in units of it then never exceeds the code it must fit."""
    half = _half(x)
    bits = half.astype(np.float16).view(np.uint16)
    return np.where((half < x) & (half < _MAX_HALF), (bits + np.uint16(1)).view(np.float16), half).astype(np.float32)


def _half_bytes(x: F32Array) -> U8Array:
    return np.ascontiguousarray(x.astype("<f2")).view(np.uint8).reshape(-1, 2)


def _fit_symmetric(groups: F32Array, starts: tuple[float, ...], low: int, high: int) -> F32Array:
    """The scale of x ≈ scale * code with the least squared error among the starts: f32 [..., n] -> [...]."""
    index = np.abs(groups).argmax(-1)[..., None]
    extreme = np.take_along_axis(groups, index, -1)[..., 0]
    inverse = _inverse(extreme)
    best, scale = np.zeros_like(extreme), np.zeros_like(extreme)
    for start in starts:
        codes = _codes(groups * (np.float32(start) * inverse)[..., None], low, high)
        solved = _sum(codes * groups) * _inverse(_sum(codes * codes))
        explained = solved * _sum(codes * groups)
        wins = explained > best
        best, scale = np.where(wins, explained, best), np.where(wins, solved, scale)
    return scale


def _fit_affine(groups: F32Array, starts: tuple[float, ...], high: int) -> tuple[F32Array, F32Array]:
    """Scale and minimum, both >= 0, of x ≈ scale * code - minimum: f32 [..., n] -> twice [...]."""
    count = np.float32(groups.shape[-1])
    bottom, top = np.minimum(groups.min(-1), _F0), np.maximum(groups.max(-1), _F0)
    inverse, sum_x = _inverse(top - bottom), _sum(groups)
    best, scale, minimum = np.zeros_like(sum_x), np.zeros_like(sum_x), np.zeros_like(sum_x)
    for step in range(len(starts) + REFITS):
        by, low = (np.float32(starts[step]) * inverse, -bottom) if step < len(starts) else (_inverse(scale), minimum)
        codes = _codes((groups + low[..., None]) * by[..., None], 0, high)
        sum_q, sum_qq, sum_qx = _sum(codes), _sum(codes * codes), _sum(codes * groups)
        solved = (count * sum_qx - sum_q * sum_x) * _inverse(count * sum_qq - sum_q * sum_q)
        offset = (solved * sum_q - sum_x) / count
        # A minimum cannot be negative: then it is 0, and the scale alone is fitted.
        solved = np.where(offset > 0, solved, sum_qx * _inverse(sum_qq))
        offset = np.where(offset > 0, offset, _F0)
        explained = solved * sum_qx - offset * sum_x
        wins = (solved >= 0) & (explained > best)
        best, scale = np.where(wins, explained, best), np.where(wins, solved, scale)
        minimum = np.where(wins, offset, minimum)
    return scale, minimum


def _quantize_q8_0(blocks: F32Array) -> U8Array:
    step = np.abs(blocks).max(1) / np.float32(127)
    scaled = blocks * _inverse(step)[:, None]
    whole = np.trunc(scaled)  # ties go away from zero, as in the format's reference
    codes = whole + np.copysign((np.abs(scaled - whole) >= np.float32(0.5)).astype(np.float32), scaled)
    return np.concatenate([_half_bytes(_half(step)), codes.astype(np.int8).view(np.uint8)], 1)


def _quantize_q5_0(blocks: F32Array) -> U8Array:
    d = _half(_fit_symmetric(blocks, Q5_0_STARTS, -16, 15))
    u = (_codes(blocks * _inverse(d)[:, None], -16, 15) + np.float32(16)).astype(np.uint8)
    fifth = np.packbits(u >> 4, axis=1, bitorder="little")
    return np.concatenate([_half_bytes(d), fifth, (u[:, :16] & 15) | ((u[:, 16:] & 15) << 4)], 1)


def _quantize_q4_k(blocks: F32Array) -> U8Array:
    groups = blocks.reshape(-1, 8, 32)
    scale, minimum = _fit_affine(groups, Q4_K_STARTS, 15)
    d, dmin = _half_above(scale.max(1) / np.float32(63)), _half_above(minimum.max(1) / np.float32(63))
    wanted, wanted_m = _codes(scale * _inverse(d)[:, None], 0, 63), _codes(minimum * _inverse(dmin)[:, None], 0, 63)

    def values(sc: F32Array, m: F32Array) -> tuple[F32Array, F32Array]:
        step, low = d[:, None] * sc, dmin[:, None] * m
        codes = _codes((groups + low[..., None]) * _inverse(step)[..., None], 0, 15)
        return codes, step[..., None] * codes - low[..., None] - groups

    best = np.full_like(scale, np.inf)
    sc, m = wanted, wanted_m
    for step in _STEPS:
        for step_m in _STEPS:
            trial = np.clip(wanted + np.float32(step), _F0, np.float32(63))
            trial_m = np.clip(wanted_m + np.float32(step_m), _F0, np.float32(63))
            off = values(trial, trial_m)[1]
            error = _sum(off * off)
            wins = error < best
            best, sc, m = np.where(wins, error, best), np.where(wins, trial, sc), np.where(wins, trial_m, m)
    u = values(sc, m)[0].astype(np.uint8).reshape(-1, 4, 2, 32)
    s, t = sc.astype(np.uint8), m.astype(np.uint8)
    twelve = [s[:, :4] | ((s[:, 4:] >> 4) << 6), t[:, :4] | ((t[:, 4:] >> 4) << 6), (s[:, 4:] & 15) | (t[:, 4:] << 4)]
    return np.concatenate(
        [_half_bytes(d), _half_bytes(dmin), *twelve, (u[:, :, 0] | (u[:, :, 1] << 4)).reshape(-1, 128)], 1
    )


def _quantize_q6_k(blocks: F32Array) -> U8Array:
    groups = blocks.reshape(-1, 16, 16)
    scale = _fit_symmetric(groups, Q6_K_STARTS, -32, 31)
    d = _half_above(np.abs(scale).max(1) / np.float32(127))
    wanted = _codes(scale * _inverse(d)[:, None], -127, 127)

    def values(sc: F32Array) -> tuple[F32Array, F32Array]:
        step = d[:, None] * sc
        codes = _codes(groups * _inverse(step)[..., None], -32, 31)
        return codes, step[..., None] * codes - groups

    best, sc = np.full_like(scale, np.inf), wanted
    for step in _STEPS:
        trial = np.clip(wanted + np.float32(step), np.float32(-128), np.float32(127))
        off = values(trial)[1]
        error = _sum(off * off)
        wins = error < best
        best, sc = np.where(wins, error, best), np.where(wins, trial, sc)
    u = (values(sc)[0] + np.float32(32)).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, top = u & 15, u >> 4
    ql = np.concatenate([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], 2)
    qh = top[:, :, 0] | (top[:, :, 1] << 2) | (top[:, :, 2] << 4) | (top[:, :, 3] << 6)
    scales = sc.astype(np.int8).view(np.uint8)
    return np.concatenate([ql.reshape(-1, 128), qh.reshape(-1, 64), scales, _half_bytes(d)], 1)


_QUANTIZE = {Q8_0: _quantize_q8_0, Q5_0: _quantize_q5_0, Q4_K: _quantize_q4_k, Q6_K: _quantize_q6_k}
