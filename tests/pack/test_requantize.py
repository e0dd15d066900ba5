"""A GGUF in other weight types: the values stay, what must be a float stays one, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.errors import ConfigError
from autoglm.formats.gguf import GGUFFile
from autoglm.formats.quant_types import GGMLType
from autoglm.kernels import dequantize
from autoglm.pack.requantize import requantize
from autoglm.pack.type_plan import FileType

NANO = SHIPPED_MODELS["nano"]


def values(gguf: GGUFFile, name: str) -> np.ndarray:
    info = gguf.tensors[name]
    return dequantize(np.ascontiguousarray(gguf.data(name)).reshape(-1), int(info.type), int(np.prod(info.shape)))


@pytest.mark.parametrize("source", [NANO.path, NANO.mmproj], ids=["text", "mmproj"])
def test_floats_hold_the_very_values(source: Path, tmp_path: Path) -> None:
    requantize(source, tmp_path / "f32.gguf", FileType.F32)
    with GGUFFile.open(source) as before, GGUFFile.open(tmp_path / "f32.gguf") as after:
        assert list(before.tensors) == list(after.tensors)
        assert {info.type for info in after.tensors.values()} == {GGMLType.F32}
        for name in before.tensors:
            assert before.tensors[name].shape == after.tensors[name].shape
            assert np.array_equal(values(before, name), values(after, name)), name
        assert after.metadata == {**before.metadata, "general.file_type": 0}


@pytest.mark.parametrize(("source", "type_"), [(NANO.path, FileType.Q4_K_M), (NANO.mmproj, FileType.Q8_0)])
def test_a_type_it_has_already_gives_the_same_bytes(source: Path, type_: FileType, tmp_path: Path) -> None:
    requantize(source, tmp_path / "same.gguf", type_)
    assert (tmp_path / "same.gguf").read_bytes() == source.read_bytes()


def test_every_type_takes_the_tensors_the_plan_gives_it(tmp_path: Path) -> None:
    requantize(NANO.path, tmp_path / "q8.gguf", FileType.Q8_0)
    requantize(NANO.mmproj, tmp_path / "mmproj.gguf", FileType.F16)
    with GGUFFile.open(tmp_path / "q8.gguf") as text, GGUFFile.open(tmp_path / "mmproj.gguf") as mmproj:
        assert text.tensors["token_embd.weight"].type == text.tensors["output.weight"].type == GGMLType.Q8_0
        assert text.tensors["output_norm.weight"].type == GGMLType.F32
        assert mmproj.tensors["v.blk.0.attn_qkv.weight"].type == GGMLType.F16
        # Kernels of convolutions and two-dimensional biases are no matrices.
        assert mmproj.tensors["v.conv_stem.0.weight"].type == GGMLType.F32
        assert mmproj.tensors["a.blk.0.pos_bias_u"].type == GGMLType.F32
    with GGUFFile.open(NANO.path) as before, GGUFFile.open(tmp_path / "q8.gguf") as after:
        wanted, got = (values(file, "output.weight") for file in (before, after))
        assert 0 < np.abs(got - wanted).max() <= np.abs(wanted).max() / 127


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an mmproj can be Q8_0, F16, F32, not Q4_K_M"):
        requantize(NANO.mmproj, tmp_path / "x.gguf", FileType.Q4_K_M)
    with pytest.raises(ConfigError, match="is the file to be read"):
        requantize(NANO.path, NANO.path, FileType.F32)
    assert list(tmp_path.iterdir()) == []
