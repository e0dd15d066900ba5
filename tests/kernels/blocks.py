"""Random weight blocks: every code occurs, scales stay finite."""

from __future__ import annotations

import numpy as np

from autoglm.kernels import reference

_HALF_OFFSETS = {reference.Q6_K: (208,), reference.Q4_0: (0,), reference.Q5_0: (0,), reference.Q8_0: (0,)}


def random_weights(type_id: int, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """u8 [rows * row bytes] of GGML blocks; quantized types have every byte random but the half-precision scales."""
    rng = np.random.default_rng(seed)
    if type_id in reference.FLOAT_TYPES:
        values = rng.normal(0, 1, rows * cols).astype(np.float32)
        if type_id == reference.BF16:
            return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        return values.astype("<f4" if type_id == reference.F32 else "<f2").view(np.uint8)
    elements, block_bytes = reference.BLOCKS[type_id]
    num_blocks = rows * cols // elements
    data = rng.integers(0, 256, (num_blocks, block_bytes), np.uint8)
    for offset in _HALF_OFFSETS.get(type_id, (0, 2)):
        data[:, offset : offset + 2] = rng.normal(0, 0.01, (num_blocks, 1)).astype("<f2").view(np.uint8)
    return data.reshape(-1)


def random_activations(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """f32 [rows, cols] with outliers, a zero row and a zero block, as real activations have."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (rows, cols)).astype(np.float32)
    x[:, 5 % cols] *= 40
    if rows > 3:
        x[2] = 0
        x[3, :32] = 0
    return x
