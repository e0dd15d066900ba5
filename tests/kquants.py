"""A NumPy quantizer for the K-quants, which the gguf package can only read.

Per group a plain min/max scale, then one least-squares refinement; enough for test models and benchmarks,
not a rival of the importance-weighted search real files are made with. Layouts: GGML's block_q4_K,
block_q5_K and block_q6_K.
"""

from __future__ import annotations

import gguf
import numpy as np

QType = gguf.GGMLQuantizationType
K_TYPES = (QType.Q4_K, QType.Q5_K, QType.Q6_K)
_ROWS_AT_ONCE = 1 << 14  # blocks handled in one go: keeps the temporaries of a 9B matrix small


def _f16_bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.astype("<f2")).view(np.uint8).reshape(len(values), 2)


def _affine_groups(groups: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit x ≈ scale * q - minimum, q in 0..top, minimum >= 0, over the last axis."""
    low = np.minimum(groups.min(axis=2), 0)
    scale = (groups.max(axis=2) - low) / top
    safe = np.where(scale > 0, scale, 1)
    q = np.clip(np.rint((groups - low[:, :, None]) / safe[:, :, None]), 0, top)
    # Least squares for scale with the offset kept: sum q (x - low) / sum q^2.
    denominator = (q * q).sum(axis=2)
    refined = (q * (groups - low[:, :, None])).sum(axis=2) / np.where(denominator > 0, denominator, 1)
    return np.where(scale > 0, np.maximum(refined, 0), 0), -low, q


def _pack_scales(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """Eight 6-bit scales and minimums -> the 12 bytes."""
    low = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    mid = mins[:, :4] | ((mins[:, 4:] >> 4) << 6)
    high = (scales[:, 4:] & 15) | ((mins[:, 4:] & 15) << 4)
    return np.concatenate([low, mid, high], axis=1).astype(np.uint8)


def _quantize_q4_q5(x: np.ndarray, qtype: QType) -> np.ndarray:
    top = 15 if qtype == QType.Q4_K else 31
    groups = x.reshape(len(x), 8, 32)
    scale, minimum, _ = _affine_groups(groups, top)
    d = (scale.max(axis=1) / 63).astype(np.float16).astype(np.float32)
    dmin = (minimum.max(axis=1) / 63).astype(np.float16).astype(np.float32)
    scales = np.clip(np.rint(scale / np.where(d > 0, d, 1)[:, None]), 0, 63).astype(np.uint8)
    mins = np.clip(np.rint(minimum / np.where(dmin > 0, dmin, 1)[:, None]), 0, 63).astype(np.uint8)
    real_scale = (d[:, None] * scales)[:, :, None]
    real_min = (dmin[:, None] * mins)[:, :, None]
    q = np.rint((groups + real_min) / np.where(real_scale > 0, real_scale, 1))
    q = np.where(real_scale > 0, np.clip(q, 0, top), 0).astype(np.uint8)
    pairs = q.reshape(len(x), 4, 2, 32)
    qs = ((pairs[:, :, 0] & 15) | ((pairs[:, :, 1] & 15) << 4)).reshape(len(x), 128)
    parts = [_f16_bytes(d), _f16_bytes(dmin), _pack_scales(scales, mins)]
    if qtype == QType.Q5_K:
        parts.append(np.bitwise_or.reduce((q >> 4) << np.arange(8, dtype=np.uint8)[None, :, None], axis=1))
    return np.concatenate([*parts, qs], axis=1)


def _quantize_q6(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(len(x), 16, 16)
    index = np.abs(groups).argmax(axis=2)
    extreme = np.take_along_axis(groups, index[:, :, None], axis=2)[:, :, 0]
    scale = -extreme / 32  # the largest element lands on -32, the wider end of the range
    biggest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1)[:, None], axis=1)[:, 0]
    d = (-biggest / 128).astype(np.float16).astype(np.float32)
    sc = np.clip(np.rint(scale / np.where(d != 0, d, 1)[:, None]), -128, 127).astype(np.int8)
    real_scale = (d[:, None] * sc)[:, :, None]
    q = np.rint(groups / np.where(real_scale != 0, real_scale, 1))
    u = (np.where(real_scale != 0, np.clip(q, -32, 31), 0) + 32).astype(np.uint8).reshape(len(x), 2, 4, 32)
    low = u & 15
    ql = np.concatenate([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], axis=2)
    qh = np.bitwise_or.reduce((u >> 4) << np.array([0, 2, 4, 6], np.uint8)[None, None, :, None], axis=2)
    return np.concatenate([ql.reshape(len(x), 128), qh.reshape(len(x), 64), sc.view(np.uint8), _f16_bytes(d)], axis=1)


def quantize_k(values: np.ndarray, qtype: QType) -> np.ndarray:
    """f32 [rows, K], K a multiple of 256 -> u8 [rows, K / 256 * block bytes]."""
    rows, width = values.shape
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, 256)
    pieces = []
    for begin in range(0, len(blocks), _ROWS_AT_ONCE):
        piece = blocks[begin : begin + _ROWS_AT_ONCE]
        pieces.append(_quantize_q6(piece) if qtype == QType.Q6_K else _quantize_q4_q5(piece, qtype))
    return np.concatenate(pieces).reshape(rows, -1)


def quantize(values: np.ndarray, qtype: QType) -> np.ndarray:
    """Any supported type: u8 [rows, row bytes] from f32 [rows, K]."""
    if qtype in K_TYPES:
        return quantize_k(values, qtype)
    packed = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), qtype)
    return np.ascontiguousarray(packed).view(np.uint8).reshape(len(values), -1)
