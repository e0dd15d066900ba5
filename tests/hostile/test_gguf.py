"""Broken and hostile GGUF files: each is one FormatError that says what is wrong, and costs no memory."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoglm.errors import FormatError
from autoglm.formats.gguf import MAX_KEYS, MAX_TENSORS, GGUFFile
from tests.formats.gguf_bytes import SAMPLE_DATA_BYTES, GGUFBytes, sample

MAX_ALLOCATION_BYTES = 32 << 20


def write(folder: Path, data: bytes) -> Path:
    path = folder / "broken.gguf"
    path.write_bytes(data)
    return path


def refusal(path: Path) -> str:
    """The one error a file ends in; it names the file, is one bounded line, and cost no memory."""
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            GGUFFile.open(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message and len(message) < len(str(path)) + 500
    assert peak < MAX_ALLOCATION_BYTES
    return message


def survives(path: Path) -> None:
    """A file that is refused cleanly, or opens with every tensor readable to its last byte."""
    try:
        with GGUFFile.open(path) as gguf:
            for name, info in gguf.tensors.items():
                data = gguf.data(name)
                assert data.nbytes == info.nbytes
                int(data.max())
                del data
    except FormatError as error:
        assert str(error).startswith(f"{path}: ")


def test_the_sound_sample_opens(tmp_path: Path) -> None:
    with GGUFFile.open(write(tmp_path, sample().finish(SAMPLE_DATA_BYTES))) as gguf:
        assert gguf.metadata["a.strings"] == ["one", "zwei", "三"]
        assert gguf.tensors["first.weight"].shape == (4, 32)


def numbers_for(width: int) -> list[int]:
    top = 1 << (8 * width)
    return sorted(
        {0, 1, 2, 3, 4, 9, 13, 99, top // 2 - 1, top // 2, top - 2, top - 1} | {top >> k for k in range(1, 40, 3)}
    )


def test_every_header_field_fuzzed(tmp_path: Path) -> None:
    file = sample()
    sound = file.finish(SAMPLE_DATA_BYTES)
    generator = random.Random(1)
    path = tmp_path / "broken.gguf"
    tracemalloc.start()
    for field in file.fields:
        if field.code:
            values = [
                number.to_bytes(field.width, "little")
                for number in numbers_for(field.width)
                if number < 1 << (8 * field.width)
            ]
        else:
            values = [bytes(field.width), b"\xff" * field.width, b"\x80" * field.width]
        values += [generator.randbytes(field.width) for _ in range(6)]
        for value in values:
            path.write_bytes(sound[: field.offset] + value + sound[field.offset + field.width :])
            survives(path)
    assert tracemalloc.get_traced_memory()[1] < MAX_ALLOCATION_BYTES
    tracemalloc.stop()


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    sound = sample().finish(SAMPLE_DATA_BYTES)
    for size in range(len(sound)):
        refusal(write(tmp_path, sound[:size]))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=12))
def test_random_byte_edits(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    data = bytearray(sample().finish(SAMPLE_DATA_BYTES))
    for position, value in edits:
        data[position % len(data)] = value
    survives(write(tmp_path, bytes(data)))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rest=st.binary(max_size=400))
def test_random_bytes_after_the_magic(tmp_path: Path, rest: bytes) -> None:
    survives(write(tmp_path, b"GGUF\x03\x00\x00\x00" + rest))


@pytest.mark.parametrize("field, limit", [("number of tensors", MAX_TENSORS), ("number of keys", MAX_KEYS)])
@pytest.mark.parametrize("count", [1 << 16, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1])
def test_absurd_counts(tmp_path: Path, field: str, limit: int, count: int) -> None:
    file = GGUFBytes()
    file.header(count if "tensors" in field else 0, count if "keys" in field else 0)
    assert "number of" in refusal(write(tmp_path, file.finish(4096)))


def one_key(build: Callable[[GGUFBytes], None]) -> bytes:
    file = GGUFBytes()
    file.header(0, 1)
    build(file)
    return file.finish(64)


@pytest.mark.parametrize("length", [1 << 20, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1])
def test_absurd_string_lengths(tmp_path: Path, length: int) -> None:
    def build(file: GGUFBytes) -> None:
        file.text("key", "k")
        file.number("type", "I", 8)
        file.number("length", "Q", length)

    assert "metadata key" in refusal(write(tmp_path, one_key(build)))
    assert "metadata key 0" in refusal(write(tmp_path, one_key(lambda file: file.number("key length", "Q", length))))


@pytest.mark.parametrize("element_type", [0, 4, 7, 8, 12])
@pytest.mark.parametrize("count", [1 << 22, 1 << 32, (1 << 61) + 1, (1 << 64) - 1])
def test_absurd_array_counts(tmp_path: Path, element_type: int, count: int) -> None:
    def build(file: GGUFBytes) -> None:
        file.text("key", "k")
        file.number("type", "I", 9)
        file.number("element type", "I", element_type)
        file.number("count", "Q", count)

    assert "number of elements" in refusal(write(tmp_path, one_key(build)))


def sparse(folder: Path, start: bytes, size: int) -> Path:
    """A file of that size whose rest is a hole: costs its maker nothing, so it must cost us nothing."""
    path = write(folder, start)
    os.truncate(path, size)
    return path


def test_huge_sparse_file_with_a_huge_string(tmp_path: Path) -> None:
    def build(file: GGUFBytes) -> None:
        file.text("key", "k")
        file.number("type", "I", 8)
        file.number("length", "Q", 1 << 33)

    start = one_key(build)
    assert "268435456" in refusal(sparse(tmp_path, start, 1 << 34))


def test_huge_sparse_file_with_huge_strings_in_an_array(tmp_path: Path) -> None:
    def build(file: GGUFBytes) -> None:
        file.text("key", "k")
        file.number("type", "I", 9)
        file.number("element type", "I", 8)
        file.number("count", "Q", 4)
        file.number("length", "Q", 1 << 33)

    assert "268435456" in refusal(sparse(tmp_path, one_key(build), 1 << 34))


def test_elements_are_counted_over_all_arrays(tmp_path: Path) -> None:
    file = GGUFBytes()
    file.header(0, 3)
    for name in "abc":
        file.text("key", name)
        file.number("type", "I", 9)
        file.number("element type", "I", 0)
        file.number("count", "Q", 2_000_000)
        file.data += bytes(2_000_000)
    path = write(tmp_path, file.finish(64))
    with pytest.raises(FormatError, match="number of elements of metadata key 'c'"):
        GGUFFile.open(path)


def one_tensor(dims: list[int], type_id: int = 0, offset: int = 0, data_bytes: int = 256) -> bytes:
    file = GGUFBytes()
    file.header(1, 0)
    file.tensor("w", dims, type_id, offset)
    return file.finish(data_bytes)


@pytest.mark.parametrize(
    "data, words",
    [
        (one_tensor([8], offset=256), "end of tensor 'w'"),
        (one_tensor([8], offset=1 << 40), "end of tensor 'w'"),
        (one_tensor([8], offset=(1 << 64) - 32), "end of tensor 'w'"),
        (one_tensor([8], offset=1), "multiple of the alignment 32"),
        (one_tensor([8], offset=(1 << 64) - 1), "multiple of the alignment 32"),
        (one_tensor([1 << 62]), "size of tensor 'w'"),
        (one_tensor([1 << 32, 1 << 32]), "size of tensor 'w'"),  # the product is 2**64, 0 in 64 bits
        (one_tensor([1 << 31, 1 << 31, 4, 1]), "size of tensor 'w'"),
        (one_tensor([(1 << 64) - 1] * 4), "size of tensor 'w'"),
        (one_tensor([0]), "dimensions of at least 1"),
        (one_tensor([8, 0]), "dimensions of at least 1"),
        (one_tensor([]), "number of dimensions"),
        (one_tensor([2, 2, 2, 2, 2]), "number of dimensions"),
        (one_tensor([33], type_id=8), "a multiple of 32 for Q8_0"),
        (one_tensor([128], type_id=12), "a multiple of 256 for Q4_K"),
        (one_tensor([8], type_id=10), "Q2_K (10)"),
        (one_tensor([8], type_id=23), "IQ4_XS (23)"),
        (one_tensor([8], type_id=26), "I32 (26)"),
        (one_tensor([8], type_id=999), "unknown (999)"),
        (one_tensor([8], type_id=0xFFFFFFFF), "unknown (4294967295)"),
    ],
)
def test_broken_tensor_entries(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in refusal(write(tmp_path, data))


def test_overlapping_tensors(tmp_path: Path) -> None:
    for first, second in [(0, 0), (0, 32), (32, 0)]:
        file = GGUFBytes()
        file.header(2, 0)
        file.tensor("a", [16], 0, first)
        file.tensor("b", [16], 0, second)
        assert "start of tensor" in refusal(write(tmp_path, file.finish(256)))


def test_duplicate_tensor_name(tmp_path: Path) -> None:
    file = GGUFBytes()
    file.header(2, 0)
    file.tensor("a", [8], 0, 0)
    file.tensor("a", [8], 0, 32)
    assert "'a' a second time" in refusal(write(tmp_path, file.finish(256)))


def test_duplicate_key(tmp_path: Path) -> None:
    file = GGUFBytes()
    file.header(0, 2)
    file.key("k", 4, "I", 1)
    file.key("k", 4, "I", 2)
    assert "'k' a second time" in refusal(write(tmp_path, file.finish(64)))


def test_empty_names(tmp_path: Path) -> None:
    assert "empty" in refusal(write(tmp_path, one_key(lambda file: file.key("", 4, "I", 1))))
    file = GGUFBytes()
    file.header(1, 0)
    file.tensor("", [8], 0, 0)
    assert "empty" in refusal(write(tmp_path, file.finish(256)))


def test_nested_array(tmp_path: Path) -> None:
    def build(file: GGUFBytes) -> None:
        file.text("key", "k")
        file.number("type", "I", 9)
        for _ in range(40):
            file.number("element type", "I", 9)
            file.number("count", "Q", 1)

    assert "array of arrays" in refusal(write(tmp_path, one_key(build)))


def test_unknown_value_types(tmp_path: Path) -> None:
    for type_id in (13, 255, 0xFFFFFFFF):
        assert "type of metadata key 'k'" in refusal(
            write(tmp_path, one_key(lambda file, type_id=type_id: file.key("k", type_id, "Q", 1)))  # type: ignore[misc]
        )
        assert "element type" in refusal(
            write(tmp_path, one_key(lambda file, type_id=type_id: file.array_key("k", type_id, "I", [1])))  # type: ignore[misc]
        )


def test_bool_that_is_neither(tmp_path: Path) -> None:
    assert "0 or 1" in refusal(write(tmp_path, one_key(lambda file: file.key("k", 7, "B", 2))))
    assert "0 or 1" in refusal(write(tmp_path, one_key(lambda file: file.array_key("k", 7, "B", [1, 0, 255]))))


@pytest.mark.parametrize("bad", [b"\xff", b"a\x80", b"\xed\xa0\x80", b"\xc0\xaf"])
def test_invalid_utf8(tmp_path: Path, bad: bytes) -> None:
    builds: list[Callable[[GGUFBytes], None]] = [
        lambda file: file.key(bad, 4, "I", 1),
        lambda file: file.string_key("k", bad),
        lambda file: file.string_array_key("k", ["fine", bad]),
    ]
    for build in builds:
        assert "UTF-8" in refusal(write(tmp_path, one_key(build)))
    file = GGUFBytes()
    file.header(1, 0)
    file.tensor(bad, [8], 0, 0)
    assert "UTF-8" in refusal(write(tmp_path, file.finish(256)))


@pytest.mark.parametrize("alignment", [0, 3, 48, 1 << 17, (1 << 32) - 1])
def test_bad_alignment(tmp_path: Path, alignment: int) -> None:
    assert "general.alignment" in refusal(
        write(tmp_path, one_key(lambda file: file.key("general.alignment", 4, "I", alignment)))
    )


def test_alignment_that_is_no_number(tmp_path: Path) -> None:
    assert "general.alignment" in refusal(
        write(tmp_path, one_key(lambda file: file.string_key("general.alignment", "32")))
    )


@pytest.mark.parametrize("version, words", [(0, "version"), (1, "convert"), (4, "update"), (99, "update")])
def test_other_versions(tmp_path: Path, version: int, words: str) -> None:
    file = GGUFBytes()
    file.header(0, 0, version=version)
    assert words in refusal(write(tmp_path, file.finish(64)))


def test_big_endian(tmp_path: Path) -> None:
    data = b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64)
    assert "big-endian" in refusal(write(tmp_path, data))
    assert "big-endian" in refusal(write(tmp_path, b"FUGG" + data[4:]))


@pytest.mark.parametrize(
    "start, words",
    [
        (b"PK\x03\x04rest", "zip"),
        (b"\x80\x02}q\x00", "pickle"),
        (struct.pack("<Q", 40) + b'{"__metadata__":{}}' + b" " * 40, "safetensors"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"lmgg\x01", "before GGUF"),
        (b"tjgg\x03", "before GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b'{"error": "not found"}', "JSON"),
        (b"gguf", "magic"),
        (b"\x00", "magic"),
        (b"GGU", "magic"),
    ],
)
def test_other_kinds_of_file_are_named(tmp_path: Path, start: bytes, words: str) -> None:
    assert words in refusal(write(tmp_path, start))


def test_missing_file_folder_empty_file_and_pipe(tmp_path: Path) -> None:
    assert "not found" in refusal(tmp_path / "nothing.gguf")
    assert "not found" in refusal(tmp_path / "no" / "such" / "folder.gguf")
    assert "folder" in refusal(tmp_path)
    assert "empty" in refusal(write(tmp_path, b""))
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    assert "regular file" in refusal(pipe)


@pytest.mark.parametrize("name", ["a\x00b.gguf", "x" * 5000])
def test_paths_no_system_takes(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError):
        GGUFFile.open(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path: Path) -> None:
    path = write(tmp_path, sample().finish(SAMPLE_DATA_BYTES))
    path.chmod(0)
    assert "permission" in refusal(path)


def test_split_file(tmp_path: Path) -> None:
    file = GGUFBytes()
    file.header(0, 2)
    file.key("split.count", 2, "H", 3)
    file.key("split.no", 2, "H", 1)
    message = refusal(write(tmp_path, file.finish(64)))
    assert "part 2 of 3" in message and "--merge" in message


def test_a_failed_open_leaves_no_map_behind(tmp_path: Path) -> None:
    path = write(tmp_path, sample().finish(SAMPLE_DATA_BYTES)[:-1])
    refusal(path)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) not in maps.read_text()
