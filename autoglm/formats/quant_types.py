"""GGML block types: type ids, elements and bytes per block.

Only the types whose values this package can read. UNSUPPORTED_TYPE_NAMES lets an error name the
others. Source: GGUF specification and ggml's public type table.
"""

from __future__ import annotations

from enum import IntEnum


class GGMLType(IntEnum):
    """Tensor element types, numbered as GGUF stores them."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30


FLOAT_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
# type -> (elements, bytes) of one block; a block never spans two rows.
BLOCK: dict[GGMLType, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.BF16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
}

UNSUPPORTED_TYPE_NAMES: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


def row_bytes(type: GGMLType, num_elements: int) -> int:
    """Bytes of one row of num_elements values; ValueError if the row is not a whole number of blocks."""
    elements, block_bytes = BLOCK[type]
    if num_elements < 0 or num_elements % elements:
        raise ValueError(f"a {type.name} row holds whole blocks of {elements} elements, got {num_elements}")
    return num_elements // elements * block_bytes
