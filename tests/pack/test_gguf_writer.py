"""Our writer against the gguf package's: the same bytes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from autoglm.formats.quant_types import GGMLType
from autoglm.pack.gguf_writer import MetadataValue, StoredTensor, write_gguf

KEYS: dict[str, MetadataValue] = {
    "general.name": "名 x", "a.flag": True, "a.count": 7, "a.share": 0.1, "a.words": ["", "ab", "字"],
    "a.numbers": [3, -1], "a.floats": [0.5, 1e-7], "a.nothing": [],
}  # fmt: skip


def tensors() -> dict[str, StoredTensor]:
    rng = np.random.default_rng(0)
    return {
        "norm.weight": StoredTensor(rng.normal(size=5).astype(np.float32), GGMLType.F32),
        "blocks.weight": StoredTensor(rng.integers(0, 256, (3, 2 * 34), np.uint8), GGMLType.Q8_0),
        "kernel.weight": StoredTensor(rng.normal(size=(2, 3, 5, 5)).astype(np.float16), GGMLType.F16),
    }


def test_equal_to_the_gguf_package(tmp_path: Path) -> None:
    stored = tensors()
    write_gguf(tmp_path / "ours.gguf", "glm4", KEYS, stored)
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "glm4")
    writer.add_string("general.name", "名 x")
    writer.add_bool("a.flag", True)
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.share", 0.1)
    for key in ("a.words", "a.numbers", "a.floats"):
        writer.add_array(key, KEYS[key])
    for name, tensor in stored.items():
        blocks = gguf.GGMLQuantizationType.Q8_0 if tensor.type == GGMLType.Q8_0 else None
        writer.add_tensor(name, tensor.data, raw_dtype=blocks, raw_shape=tensor.data.shape if blocks else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_shapes_are_in_elements() -> None:
    assert [tensor.shape for tensor in tensors().values()] == [(5,), (3, 64), (2, 3, 5, 5)]
