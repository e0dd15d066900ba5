"""Plain NumPy truth of every native kernel: slow, obvious, and what the tests hold the C++ to.

Block layouts are GGML's (ggml-common.h), every type in the one form
`value = scale * (u - zero) - minimum` per group of 16 or 32 elements, `u` unsigned.
Matrix products follow the native arithmetic (int8 activations, exact integer sums) and are then
scaled in float64, so that a difference to the native result is the native rounding alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

F32Array = npt.NDArray[np.float32]
F64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]
U8Array = npt.NDArray[np.uint8]

F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30
TYPE_NAMES = {
    F32: "F32", F16: "F16", Q4_0: "Q4_0", Q4_1: "Q4_1", Q5_0: "Q5_0", Q5_1: "Q5_1",
    Q8_0: "Q8_0", Q4_K: "Q4_K", Q5_K: "Q5_K", Q6_K: "Q6_K", BF16: "BF16",
}  # fmt: skip
# type id -> (elements, bytes) of one block
BLOCKS = {
    F32: (1, 4), F16: (1, 2), BF16: (1, 2), Q4_0: (32, 18), Q4_1: (32, 20), Q5_0: (32, 22),
    Q5_1: (32, 24), Q8_0: (32, 34), Q4_K: (256, 144), Q5_K: (256, 176), Q6_K: (256, 210),
}  # fmt: skip
FLOAT_TYPES = (F32, F16, BF16)


@dataclass(frozen=True)
class UnpackedBlocks:
    """Quantized elements as integers: value = scale * (u - zero) - minimum.

    u        u8 [num_blocks, elements]
    scale    f32 [num_blocks, elements / group]
    minimum  f32 [num_blocks, elements / group]; zeros where the type has none
    """

    u: U8Array
    zero: int
    scale: F32Array
    minimum: F32Array
    group: int

    def values(self) -> F32Array:
        """f32 [num_blocks, elements], with GGML's own order of operations (bit-exact)."""
        num_blocks, elements = self.u.shape
        centred = (self.u.astype(np.int32) - self.zero).astype(np.float32).reshape(num_blocks, -1, self.group)
        scaled: F32Array = self.scale[:, :, None] * centred - self.minimum[:, :, None]
        return np.asarray(scaled, np.float32).reshape((num_blocks, elements))


def _half(blocks: U8Array, offset: int) -> F32Array:
    """f32 [num_blocks, 1] from the little-endian IEEE half at a byte offset of every block."""
    return np.asarray(blocks[:, offset : offset + 2].copy().view("<f2"), np.float32)


def _nibbles(qs: U8Array) -> U8Array:
    """[num_blocks, n] bytes -> [num_blocks, 2n]: all the low nibbles, then all the high ones."""
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _fifth_bits(qh: U8Array) -> U8Array:
    """[num_blocks, 4] bytes, one little-endian u32 a block -> its 32 bits, bit i for element i."""
    return np.unpackbits(qh, axis=1, bitorder="little")


def _unpack_32(type_id: int, blocks: U8Array) -> UnpackedBlocks:
    scale = _half(blocks, 0)
    minimum = np.zeros_like(scale)
    if type_id in (Q4_1, Q5_1):
        minimum = -_half(blocks, 2)
    if type_id == Q8_0:
        # Signed bytes, shown as unsigned the way the dot-product instructions want them.
        flipped = np.asarray(blocks[:, 2:34] ^ np.uint8(0x80), np.uint8)
        return UnpackedBlocks(flipped, 128, scale, minimum, 32)
    body = blocks[:, 4:] if type_id in (Q4_1, Q5_1) else blocks[:, 2:]
    if type_id in (Q4_0, Q4_1):
        return UnpackedBlocks(_nibbles(body), 8 if type_id == Q4_0 else 0, scale, minimum, 32)
    u = np.asarray(_nibbles(body[:, 4:]) | (_fifth_bits(body[:, :4]) << 4), np.uint8)
    return UnpackedBlocks(u, 16 if type_id == Q5_0 else 0, scale, minimum, 32)


def _scales_and_mins(sc: U8Array) -> tuple[U8Array, U8Array]:
    """The 12 packed bytes of Q4_K and Q5_K -> eight 6-bit scales and eight 6-bit minimums."""
    low, mid, high = sc[:, 0:4], sc[:, 4:8], sc[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    mins = np.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=1)
    return scales, mins


def _unpack_q4_q5_k(type_id: int, blocks: U8Array) -> UnpackedBlocks:
    num_blocks = len(blocks)
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    qs = blocks[:, 16:] if type_id == Q4_K else blocks[:, 48:]
    chunks = qs.reshape(num_blocks, 4, 32)  # 32 bytes hold the nibbles of 64 elements
    u = np.stack([chunks & 15, chunks >> 4], axis=2).reshape(num_blocks, 256)
    if type_id == Q5_K:
        shift = np.arange(8, dtype=np.uint8)[None, :, None]
        u = u | (((blocks[:, None, 16:48] >> shift) & 1) << 4).reshape(num_blocks, 256)
    scale = _half(blocks, 0) * scales.astype(np.float32)
    minimum = _half(blocks, 2) * mins.astype(np.float32)
    return UnpackedBlocks(u, 0, scale, minimum, 32)


def _unpack_q6_k(blocks: U8Array) -> UnpackedBlocks:
    num_blocks = len(blocks)
    ql = blocks[:, :128].reshape(num_blocks, 2, 1, 64)
    qh = blocks[:, 128:192].reshape(num_blocks, 2, 1, 32)
    low = (ql >> np.array([0, 4], np.uint8)[None, None, :, None]) & 15
    high = (qh >> np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]) & 3
    u = np.asarray(low.reshape(num_blocks, 256) | (high.reshape(num_blocks, 256) << 4), np.uint8)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return UnpackedBlocks(u, 32, scale, np.zeros_like(scale), 16)


def unpack(type_id: int, data: U8Array, num_elements: int) -> UnpackedBlocks:
    """Take the blocks of a quantized tensor apart.

    data  u8 [num_elements / block elements * block bytes], GGML block layout
    Raises ValueError if the type is not quantized or the byte count is wrong.
    Source: ggml-common.h and ggml-quants.c (dequantize_row_*).
    """
    elements, block_bytes = BLOCKS[type_id]
    if type_id in FLOAT_TYPES:
        raise ValueError(f"{TYPE_NAMES[type_id]} has no blocks to unpack")
    if num_elements % elements or data.nbytes != num_elements // elements * block_bytes:
        raise ValueError(f"{num_elements} elements of {TYPE_NAMES[type_id]} do not fit {data.nbytes} bytes")
    blocks = np.ascontiguousarray(data).view(np.uint8).reshape(-1, block_bytes)
    if type_id in (Q4_K, Q5_K):
        return _unpack_q4_q5_k(type_id, blocks)
    return _unpack_q6_k(blocks) if type_id == Q6_K else _unpack_32(type_id, blocks)


def dequantize(type_id: int, data: U8Array, num_elements: int) -> F32Array:
    """Weights of any supported type as f32 [num_elements], bit for bit what GGML gives.

    data  u8 [bytes], GGML block layout
    Raises ValueError if the byte count is wrong.
    """
    if type_id not in FLOAT_TYPES:
        return unpack(type_id, data, num_elements).values().reshape(-1)
    raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    if raw.nbytes != num_elements * BLOCKS[type_id][1]:
        raise ValueError(f"{num_elements} elements of {TYPE_NAMES[type_id]} do not fit {raw.nbytes} bytes")
    if type_id == F32:
        return raw.view("<f4").astype(np.float32)
    if type_id == F16:
        with np.errstate(invalid="ignore"):  # ARM flags a signalling NaN
            return raw.view("<f2").astype(np.float32)
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def activation_block(type_id: int) -> int:
    """Elements that share one activation scale for this weight type; 0 means float activations."""
    if type_id in FLOAT_TYPES:
        return 0
    return 256 if type_id in (Q4_K, Q5_K, Q6_K) else 32


@dataclass(frozen=True)
class QuantizedActivations:
    """x ≈ q * scale of the element's block.

    q        i8 [T, K], -127..127
    scale    f32 [T, ceil(K / block)]
    sums_16  i32 [T, ceil(K / 16)]; sums_32 i32 [T, ceil(K / 32)]: sums of q, for minimums and zero points
    """

    q: npt.NDArray[np.int8]
    scale: F32Array
    sums_16: IntArray
    sums_32: IntArray
    block: int


def _padded(x: npt.NDArray[np.generic], block: int) -> npt.NDArray[np.generic]:
    pad = -x.shape[1] % block
    return np.pad(x, ((0, 0), (0, pad))) if pad else x


def quantize_activations(x: F32Array, block: int) -> QuantizedActivations:
    """int8 with one scale per `block` elements of a row; the last block of a row may be short.

    x  f32 [T, K]
    amax = max |x|, scale = amax / 127, q = round_half_even(x * (127 / amax)), all in f32. A block whose
    amax is 0 (or so small that 127 / amax overflows) is all zeros with scale 0.
    """
    num_rows, width = x.shape
    blocks = np.asarray(_padded(x.astype(np.float32), block)).reshape(num_rows, -1, block)
    amax = np.abs(blocks).max(axis=2)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(127) / amax
    usable = np.isfinite(inverse)
    inverse = np.where(usable, inverse, np.float32(0)).astype(np.float32)
    scale = np.where(usable, amax / np.float32(127), np.float32(0)).astype(np.float32)
    q = np.clip(np.rint(blocks * inverse[:, :, None]), -127, 127).astype(np.int8)
    q = q.reshape(num_rows, -1)[:, :width]

    def sums(group: int) -> IntArray:
        grouped = np.asarray(_padded(q.astype(np.int32), group)).reshape(num_rows, -1, group)
        return np.asarray(grouped.sum(axis=2, dtype=np.int32))

    return QuantizedActivations(q, scale, sums(16), sums(32), block)


def quantize_activations_256(x: F32Array) -> QuantizedActivations:
    """The activation format of Q4_K, Q5_K and Q6_K weights."""
    return quantize_activations(x, 256)


def quantize_activations_32(x: F32Array) -> QuantizedActivations:
    """The activation format of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 weights."""
    return quantize_activations(x, 32)


def matmul(type_id: int, data: U8Array, num_rows: int, x: F32Array) -> F64Array:
    """y = x @ W.T the way the native kernels define it, scaled in float64.

    data  u8 [bytes]: W [num_rows, K] in its GGML blocks
    x     f32 [T, K]
    Returns f64 [T, num_rows]. Float weights multiply x as it is; quantized ones multiply the 8-bit
    activations of `activation_block`, integers summed exactly inside each scale group.
    """
    num_tokens, width = x.shape
    block = activation_block(type_id)
    if block == 0:
        weights = dequantize(type_id, data, num_rows * width).reshape(num_rows, width)
        return np.asarray(x.astype(np.float64) @ weights.astype(np.float64).T)
    w = unpack(type_id, data, num_rows * width)
    activations = quantize_activations(x, block)
    group = w.group
    num_groups = width // group
    u = (w.u.astype(np.int32) - w.zero).astype(np.float64).reshape(num_rows, num_groups, group)
    q = activations.q.astype(np.float64).reshape(num_tokens, num_groups, group)
    # Integers up to 256 * 127 * 32 are exact in float64, so these are the exact integer sums.
    dots = np.einsum("rgk,tgk->trg", u, q, optimize=True)
    sums = q.sum(axis=2)
    scale = w.scale.astype(np.float64).reshape(num_rows, num_groups)
    minimum = w.minimum.astype(np.float64).reshape(num_rows, num_groups)
    x_scale = np.repeat(activations.scale.astype(np.float64), block // group, axis=1)[:, :num_groups]
    return np.asarray(((dots * scale - sums[:, None, :] * minimum) * x_scale[:, None, :]).sum(axis=2))


def round_to_length(x: F32Array) -> tuple[IntArray, F64Array]:
    """16-bit whole numbers in steps of 1/32767 of each block's length: i32 [..., 64] and the steps f64 [...]."""
    step = np.sqrt(np.square(x, dtype=np.float64).sum(axis=-1)) / 32767
    q = np.rint(x / np.where(step > 0, step, 1)[..., None]).astype(np.int32)
    return np.asarray(q), np.asarray(step)


def matmul_i16(weights: F32Array, x: F32Array) -> F64Array:
    """y = x @ W.T with both in 16-bit whole numbers and a scale for each 64 columns of a row: f64 [T, rows].

    weights f32 [rows, K], x f32 [T, K], K a multiple of 64
    """
    (w, w_step), (q, q_step) = (round_to_length(a.reshape(len(a), -1, 64)) for a in (weights, x))
    dots = np.einsum("rbk,tbk->trb", w.astype(np.float64), q.astype(np.float64), optimize=True)
    return np.asarray((dots * w_step * q_step[:, None, :]).sum(axis=2))


def rms_norm(x: F32Array, weight: F32Array, eps: float) -> F64Array:
    """x / sqrt(mean(x^2) + eps) * weight per row. x f32 [T, hidden] -> f64. Source: Zhang, Sennrich 2019."""
    wide = x.astype(np.float64)
    return np.asarray(wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + eps) * weight)


def silu_mul(gate: F32Array, up: F32Array) -> F64Array:
    """silu(gate) * up, elementwise, f64."""
    wide = gate.astype(np.float64)
    return np.asarray(wide / (1 + np.exp(-np.maximum(wide, -700))) * up)


def softmax(x: npt.NDArray[np.floating]) -> F64Array:
    """Over the last axis, f64, maximum taken out first."""
    wide = np.asarray(x, np.float64)
    exp = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True))


def rope_angles(
    positions: IntArray,
    rotary_dim: int,
    theta: float,
    mrope_section: tuple[int, int, int] | None = None,
    freq_factors: F32Array | None = None,
) -> F64Array:
    """Rotation angle of every pair: f64 [T, rotary_dim / 2].

    positions  i32 [3, T]: (t, h, w) of each token, equal for text
    Pair j turns by p_axis(j) * theta^(-2j / rotary_dim); its axis comes from contiguous sections while
    the frequency index keeps running. freq_factors divides the angles (Llama 3 files).
    """
    pairs = np.arange(rotary_dim // 2)
    frequency = theta ** (-2.0 * pairs / rotary_dim)
    if freq_factors is not None:
        frequency = frequency / freq_factors.astype(np.float64)
    axis = np.zeros(rotary_dim // 2, np.int64)
    if mrope_section is not None:
        axis = np.repeat(np.arange(3), mrope_section)
    return np.asarray(positions.astype(np.float64)[axis].T * frequency)


def rope(x: F32Array, angles: F64Array, *, interleaved: bool) -> F64Array:
    """Rotate the first 2 * pairs dims of every head, pass the rest through.

    x       f32 [T, H, D]
    angles  f64 [T, pairs]
    Pair j is dims (2j, 2j + 1) if interleaved, else (j, j + pairs). Source: Su 2021; GGUF notes of glm4.
    """
    pairs = angles.shape[1]
    out = x.astype(np.float64)
    first = np.arange(pairs) * 2 if interleaved else np.arange(pairs)
    second = first + (1 if interleaved else pairs)
    a, b = out[..., first], out[..., second]
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


def round_kv(x: F32Array, cache_type: str, part: Literal["keys", "values"]) -> F32Array:
    """Keys or values f32 [..., D] as a cache of type "f16", "i16" or "q8_0" gives them back.

    i16 and q8_0 here are q * scale, scale kept in f32 and q = round_half_even(x / scale). i16: a scale per token and
    head, |x| / 32767 of keys (|x| their Euclidean length), max |x| / 8191 of values. q8_0: per token, head and 32 dims
    (fewer at the end), max |x| / 127.
    """
    if cache_type == "f16":
        return x.astype(np.float16).astype(np.float32)
    if cache_type == "i16":
        size = np.linalg.norm(x, axis=-1, keepdims=True) if part == "keys" else np.abs(x).max(-1, keepdims=True)
        step = (size / np.float32(32767 if part == "keys" else 8191)).astype(np.float32)
        return np.asarray(np.rint(x / np.where(step > 0, step, np.float32(1))) * step, np.float32)
    width = x.shape[-1]
    group = min(32, width)
    groups = np.asarray(_padded(x.reshape(-1, width), group)).reshape(-1, group)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    q = np.rint(groups / np.where(scale > 0, scale, np.float32(1)))
    rows = np.asarray(q * scale, np.float32).reshape(x.size // width, -1)
    return rows[:, :width].reshape(x.shape)


def attention(
    q: F32Array,
    k_cache: npt.NDArray[np.floating],
    v_cache: npt.NDArray[np.floating],
    cu_seqlens_q: IntArray,
    context_lens: IntArray,
    block_tables: IntArray,
    scale: float,
) -> F64Array:
    """Causal grouped-query attention over a paged KV cache.

    q                 f32 [T, H, D], rotated; a sequence's rows are its last positions
    k_cache, v_cache  f16 or f32 [num_blocks, block_size, num_kv_heads, D]
    cu_seqlens_q      i32 [S + 1]; context_lens i32 [S]; block_tables i32 [S, max_blocks]
    Returns f64 [T, H, D]. Query head h reads KV head h // (H / num_kv_heads).
    """
    out = np.zeros(q.shape, np.float64)
    num_heads, block_size, num_kv_heads = q.shape[1], k_cache.shape[1], k_cache.shape[2]
    heads = np.arange(num_heads) // (num_heads // num_kv_heads)
    for s in range(len(context_lens)):
        begin, end, length = int(cu_seqlens_q[s]), int(cu_seqlens_q[s + 1]), int(context_lens[s])
        blocks = block_tables[s, : -(-length // block_size)]
        keys = k_cache[blocks].reshape(-1, num_kv_heads, q.shape[2])[:length].astype(np.float64)[:, heads]
        values = v_cache[blocks].reshape(-1, num_kv_heads, q.shape[2])[:length].astype(np.float64)[:, heads]
        scores = np.einsum("thd,chd->htc", q[begin:end].astype(np.float64), keys) * scale
        position = length - (end - begin) + np.arange(end - begin)
        scores = np.where(np.arange(length)[None, None, :] > position[None, :, None], -np.inf, scores)
        out[begin:end] = np.einsum("htc,chd->thd", softmax(scores), values)
    return out


def hadamard(x: npt.NDArray[np.floating]) -> F64Array:
    """Rows times the Hadamard matrix of the largest power of two that divides their width, span by span, f64."""
    width = x.shape[-1]
    power = width & -width
    matrix = np.ones((1, 1))
    while len(matrix) < power:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray((x.reshape(*x.shape[:-1], -1, power) @ matrix).reshape(x.shape), np.float64)


def full_attention(q: F32Array, k: F32Array, v: F32Array) -> F64Array:
    """Every row attends to every row, on the grids of native/full_attention.h; q, k, v f32 [T, H, D], rotated.

    Queries and keys are 8 bits a row after hadamard(), values 12 bits a dim and span of 64 keys, weights 14 bits of the
    row's largest score so far. Returns f64 [T, H, D].
    """
    num_rows, _, dim = q.shape

    def rows_of(x: F32Array) -> F64Array:
        mixed = hadamard(x)
        scale = np.abs(mixed).max(axis=-1, keepdims=True) / 127
        return np.asarray(np.rint(mixed / np.where(scale > 0, scale, 1)) * scale)

    scores = np.einsum("thd,chd->htc", rows_of(q), rows_of(k)) / (dim**0.5 * (dim & -dim))
    top = np.full((*scores.shape[:2], 1), -np.inf)
    total, out = np.zeros_like(top), np.zeros((*scores.shape[:2], dim))
    for start in range(0, num_rows, 64):
        span = scores[:, :, start : start + 64]
        higher = np.maximum(top, span.max(axis=-1, keepdims=True))
        weights = np.rint(np.exp(span - higher) * 16384)
        values = v[start : start + 64].astype(np.float64)
        scale = np.abs(values).max(axis=0) / 2047
        values = np.rint(values / np.where(scale > 0, scale, 1)) * scale
        fade = np.exp(top - higher)
        total = total * fade + weights.sum(axis=-1, keepdims=True)
        out = out * fade + np.einsum("htc,chd->htd", weights, values)
        top = higher
    return np.asarray((out / total).transpose(1, 0, 2))
