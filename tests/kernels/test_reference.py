"""The NumPy reference against the gguf package and the published block vectors."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from autoglm.kernels import reference

TYPES = sorted(reference.BLOCKS)

# type -> y[0], y[1], y[last], sum, sum of i * y[i], for the bytes (37 k + 11) & 255 with d = 0.25, m = 0.125
KNOWN_ANSWERS = {
    reference.Q4_0: (-0.75, 0.5, 0.0, -5.25, -124.25),
    reference.Q4_1: (3.875, 1.125, 3.125, 65.25, 996.5),
    reference.Q5_0: (2.25, -0.5, 0.25, 3.75, 24.25),
    reference.Q5_1: (4.875, 6.125, 1.375, 130.25, 1911.0),
    reference.Q8_0: (21.25, 30.5, -12.0, -44.0, -1976.0),
    reference.Q4_K: (78.875, -6.375, 12.125, 13610.0, 1879600.0),
    reference.Q5_K: (202.875, -6.375, 27.125, 29054.0, 3977808.0),
    reference.Q6_K: (-357.75, 424.0, -15.0, 1153.0, 194952.0),
}
HALF_OFFSETS = {reference.Q6_K: (208,), reference.Q4_0: (0,), reference.Q5_0: (0,), reference.Q8_0: (0,)}


def random_blocks(type_id: int, num_blocks: int, seed: int = 0) -> np.ndarray:
    """Every byte random, except that the half-precision scales are finite."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (num_blocks, reference.BLOCKS[type_id][1]), np.uint8)
    if type_id in reference.FLOAT_TYPES:
        return data.reshape(-1)
    for offset in HALF_OFFSETS.get(type_id, (0, 2)):
        data[:, offset : offset + 2] = rng.normal(0, 0.01, (num_blocks, 1)).astype("<f2").view(np.uint8)
    return data.reshape(-1)


@pytest.mark.parametrize("type_id", TYPES, ids=reference.TYPE_NAMES.get)
def test_dequantize_equals_gguf_package_bit_for_bit(type_id: int) -> None:
    elements = reference.BLOCKS[type_id][0]
    data = random_blocks(type_id, 4096)
    ours = reference.dequantize(type_id, data, 4096 * elements)
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(type_id)).astype(np.float32).reshape(-1)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("type_id", KNOWN_ANSWERS, ids=reference.TYPE_NAMES.get)
def test_dequantize_known_answers(type_id: int) -> None:
    elements, block_bytes = reference.BLOCKS[type_id]
    data = ((37 * np.arange(block_bytes) + 11) & 255).astype(np.uint8)
    for offset, half in zip(HALF_OFFSETS.get(type_id, (0, 2)), (0x3400, 0x3000), strict=False):
        data[offset : offset + 2] = (half & 255, half >> 8)
    y = reference.dequantize(type_id, data, elements).astype(np.float64)
    assert (y[0], y[1], y[-1], y.sum(), (np.arange(elements) * y).sum()) == KNOWN_ANSWERS[type_id]


def test_dequantize_refuses_a_wrong_byte_count() -> None:
    with pytest.raises(ValueError, match="Q4_K"):
        reference.dequantize(reference.Q4_K, np.zeros(143, np.uint8), 256)


@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize("width", [32, 288, 576, 640])
def test_activation_quantization_error_is_half_a_step(block: int, width: int) -> None:
    x = np.random.default_rng(1).normal(0, 3, (5, width)).astype(np.float32)
    x[2] = 0
    quantized = reference.quantize_activations(x, block)
    scale = np.repeat(quantized.scale, block, axis=1)[:, :width]
    assert np.all(np.abs(quantized.q * scale - x) <= scale * 0.5 * (1 + 1e-4))
    assert not quantized.q[2].any() and not quantized.scale[2].any()
    assert np.array_equal(quantized.sums_32, quantized.q.reshape(5, -1, 32).sum(2, dtype=np.int32))
    assert np.array_equal(quantized.sums_16, quantized.q.reshape(5, -1, 16).sum(2, dtype=np.int32))


@pytest.mark.parametrize("type_id", TYPES, ids=reference.TYPE_NAMES.get)
def test_matmul_equals_dequantized_product(type_id: int) -> None:
    """With activations that int8 holds exactly, the product is that of the dequantized weights."""
    width, rows = 768, 7
    elements, _ = reference.BLOCKS[type_id]
    rng = np.random.default_rng(2)
    if type_id in reference.FLOAT_TYPES:
        values = rng.normal(0, 1, rows * width).astype(np.float32)
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType(type_id)).view(np.uint8).reshape(-1)
    else:
        data = random_blocks(type_id, rows * width // elements)
    x = rng.integers(-126, 127, (3, width)).astype(np.float32)
    x[:, ::32] = 127  # amax of every block, so that the scale is exactly 1
    weights = reference.dequantize(type_id, data, rows * width).astype(np.float64).reshape(rows, width)
    y = reference.matmul(type_id, data, rows, x)
    np.testing.assert_allclose(y, x.astype(np.float64) @ weights.T, rtol=1e-4, atol=1e-4 * np.abs(y).max())


def test_rope_pairings_agree_after_permutation() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(5, 3, 12)).astype(np.float32)
    angles = reference.rope_angles(np.tile(np.arange(5, dtype=np.int32), (3, 1)), 8, 10000.0)
    order = np.concatenate([np.arange(0, 8, 2), np.arange(1, 8, 2), np.arange(8, 12)])
    interleaved = reference.rope(x, angles, interleaved=True)
    half_split = reference.rope(x[..., order], angles, interleaved=False)
    np.testing.assert_allclose(interleaved[..., order], half_split)
    np.testing.assert_array_equal(interleaved[..., 8:], x[..., 8:])


def test_rope_sections_pick_their_axis() -> None:
    positions = np.array([[5], [7], [11]], np.int32)
    angles = reference.rope_angles(positions, 8, 10000.0, (1, 1, 2))
    frequency = 10000.0 ** (-2 * np.arange(4) / 8)
    np.testing.assert_allclose(angles[0], np.array([5, 7, 11, 11]) * frequency)


def test_attention_equals_dense_attention() -> None:
    """Two sequences in scattered blocks, one of them mid-way, against an unpaged formula."""
    rng = np.random.default_rng(4)
    num_blocks, block_size, kv_heads, heads, dim = 9, 4, 2, 6, 8
    k_cache = rng.normal(size=(num_blocks, block_size, kv_heads, dim)).astype(np.float16)
    v_cache = rng.normal(size=(num_blocks, block_size, kv_heads, dim)).astype(np.float16)
    tables = np.array([[7, 2, 0], [1, 8, 4]], np.int32)
    lengths = np.array([6, 11], np.int32)
    cu_seqlens_q = np.array([0, 6, 9], np.int32)
    q = rng.normal(size=(9, heads, dim)).astype(np.float32)
    out = reference.attention(q, k_cache, v_cache, cu_seqlens_q, lengths, tables, 0.5)
    for s in range(2):
        keys = k_cache[tables[s]].reshape(-1, kv_heads, dim).astype(np.float64)
        values = v_cache[tables[s]].reshape(-1, kv_heads, dim).astype(np.float64)
        for t in range(cu_seqlens_q[s], cu_seqlens_q[s + 1]):
            seen = lengths[s] - (cu_seqlens_q[s + 1] - t) + 1
            for h in range(heads):
                weights = reference.softmax(0.5 * keys[:seen, h // 3] @ q[t, h])
                np.testing.assert_allclose(out[t, h], weights @ values[:seen, h // 3], atol=1e-12)
