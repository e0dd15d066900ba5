"""The block table equals the gguf package's, type for type."""

from __future__ import annotations

import gguf
import pytest

from autoglm.formats.quant_types import BLOCK, UNSUPPORTED_TYPE_NAMES, GGMLType, row_bytes


def test_ids_and_sizes_equal_the_gguf_package() -> None:
    for kind in GGMLType:
        theirs = gguf.GGMLQuantizationType[kind.name]
        assert theirs == kind
        assert gguf.GGML_QUANT_SIZES[theirs] == BLOCK[kind]
    assert set(BLOCK) == set(GGMLType)


def test_every_other_type_of_the_gguf_package_can_be_named() -> None:
    for theirs in gguf.GGMLQuantizationType:
        if theirs.value not in set(GGMLType) and theirs.value in UNSUPPORTED_TYPE_NAMES:
            assert UNSUPPORTED_TYPE_NAMES[theirs.value] == theirs.name
    assert not set(UNSUPPORTED_TYPE_NAMES) & set(GGMLType)


def test_row_bytes() -> None:
    assert row_bytes(GGMLType.F32, 3) == 12
    assert row_bytes(GGMLType.Q8_0, 13696) == 428 * 34
    assert row_bytes(GGMLType.Q4_K, 4096) == 16 * 144
    assert row_bytes(GGMLType.Q6_K, 0) == 0


@pytest.mark.parametrize("kind, elements", [(GGMLType.Q4_K, 13696), (GGMLType.Q4_0, 31), (GGMLType.F16, -1)])
def test_row_bytes_refuses_half_blocks(kind: GGMLType, elements: int) -> None:
    with pytest.raises(ValueError, match=kind.name):
        row_bytes(kind, elements)
