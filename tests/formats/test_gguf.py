"""The reader agrees with the gguf package on files written by it and by the community's converter."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from autoglm.errors import FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.formats.quant_types import BLOCK, GGMLType
from tests.formats.gguf_bytes import SAMPLE_DATA_BYTES, sample

FIXTURES = Path(__file__).resolve().parents[2].parent / "shared" / "fixtures" / "glm4v-tiny"


def assert_equals_reference(path: Path) -> None:
    reference = gguf.GGUFReader(path)
    with GGUFFile.open(path) as ours:
        assert ours.path == path and ours.file_bytes == path.stat().st_size
        theirs = {key: item.contents() for key, item in reference.fields.items() if not key.startswith("GGUF.")}
        assert ours.metadata == theirs
        assert [*ours.tensors] == [tensor.name for tensor in reference.tensors]
        for tensor in reference.tensors:
            info = ours.tensors[tensor.name]
            assert info.shape == tuple(int(dim) for dim in reversed(tensor.shape))
            assert info.type == tensor.tensor_type
            assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
            data = ours.data(tensor.name)
            assert data.dtype == np.uint8 and data.ndim == 1
            assert data.tobytes() == tensor.data.tobytes()
            del data


def write_every_type(path: Path, alignment: int | None) -> None:
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    values: list[tuple[str, object]] = [
        ("uint8", 250), ("int8", -5), ("uint16", 65000), ("int16", -30000), ("uint32", 4_000_000_000),
        ("int32", -2_000_000_000), ("uint64", 1 << 60), ("int64", -(1 << 60)), ("float32", 0.25), ("float64", 0.1),
        ("bool", True), ("string", "grüße, 世界"),
    ]  # fmt: skip
    for kind, value in values:
        getattr(writer, f"add_{kind}")(f"test.{kind}", value)
    writer.add_array("test.strings", ["a", "b b", "", "c" * 1000])
    writer.add_array("test.integers", [1, 2, -3])
    writer.add_array("test.floats", [0.5, -1.25])
    writer.add_array("test.bools", [True, False, True])
    for kind, (elements, block_bytes) in BLOCK.items():
        rows, blocks = 3, 2
        raw = generator.integers(0, 256, (rows, blocks * block_bytes), np.uint8)
        if kind in (GGMLType.F32, GGMLType.F16):
            dtype = np.float32 if kind == GGMLType.F32 else np.float16
            writer.add_tensor(kind.name, generator.normal(size=(rows, blocks * elements)).astype(dtype))
        else:
            writer.add_tensor(kind.name, raw, raw_dtype=gguf.GGMLQuantizationType(kind))
    writer.add_tensor("four.dims", generator.normal(size=(2, 3, 4, 5)).astype(np.float32))
    writer.add_tensor("vector", np.arange(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [None, 64, 4096])
def test_every_value_and_tensor_type(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "all.gguf"
    write_every_type(path, alignment)
    assert_equals_reference(path)


@pytest.mark.skipif(not FIXTURES.exists(), reason="the shared fixtures are not beside this checkout")
@pytest.mark.parametrize("name", ["main-f32", "mmproj-f32", "mmproj-f16", "mmproj-bf16", "mmproj-q8_0"])
def test_files_of_the_communitys_converter(name: str) -> None:
    assert_equals_reference(FIXTURES / f"{name}.gguf")


def test_a_real_model(smollm2_path: Path) -> None:
    assert_equals_reference(smollm2_path)


@pytest.fixture
def sample_path(tmp_path: Path) -> Path:
    path = tmp_path / "sample.gguf"
    path.write_bytes(sample().finish(SAMPLE_DATA_BYTES))
    return path


def test_version_2_has_the_same_layout(sample_path: Path) -> None:
    data = bytearray(sample_path.read_bytes())
    data[4] = 2
    sample_path.write_bytes(data)
    with GGUFFile.open(sample_path) as file:
        assert file.metadata["a.u8"] == 7


def test_get_takes_integers_of_every_width(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    write_every_type(path, None)
    with GGUFFile.open(path) as file:
        for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
            assert isinstance(file.get(f"test.{kind}", int), int)
        assert file.get("test.float32", float) == 0.25
        assert file.get("test.int8", float) == -5.0
        assert file.get("test.bool", bool) is True
        assert file.get("test.integers", list) == [1, 2, -3]
        assert file.get("test.absent", int, None) is None
        assert file.get("test.absent", str, "x") == "x"


@pytest.mark.parametrize(
    "key, type_, words",
    [
        ("a.missing", int, "'a.missing' is missing, expected an integer"),
        ("a.bool", int, "is a bool, expected an integer"),
        ("a.u8", bool, "is an integer, expected a bool"),
        ("a.f32", int, "is a number, expected an integer"),
        ("a.strings", str, "is an array, expected a string"),
        ("general.architecture", list, "is a string, expected an array"),
    ],
)
def test_get_says_what_is_wrong(sample_path: Path, key: str, type_: type, words: str) -> None:
    with GGUFFile.open(sample_path) as file, pytest.raises(FormatError, match=words):
        file.get(key, type_)


def test_a_default_does_not_hide_a_wrong_type(sample_path: Path) -> None:
    with GGUFFile.open(sample_path) as file, pytest.raises(FormatError, match="expected a string"):
        file.get("a.u8", str, "default")


def test_data_is_a_read_only_view_that_outlives_the_file(sample_path: Path) -> None:
    with GGUFFile.open(sample_path) as file:
        data = file.data("second.weight")
        assert not data.flags.writeable and not data.flags.owndata
    assert data.tobytes() == bytes(i % 251 for i in range(160, 192))
    with pytest.raises(ValueError, match="closed"):
        file.data("second.weight")


def test_a_missing_tensor_is_named(sample_path: Path) -> None:
    with GGUFFile.open(sample_path) as file, pytest.raises(FormatError, match=r"'third\.weight' is missing"):
        file.data("third.weight")


def test_metadata_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("test.key", "value")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with GGUFFile.open(str(path)) as file:
        assert file.get("test.key", str) == "value" and file.tensors == {}
