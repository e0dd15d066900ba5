"""Reads one GGUF file: memory map, typed metadata, tensor table, everything validated on open.

Assumes nothing about the file: every count, length, offset and dimension is held against the file
size before it is used, so a damaged or hostile file ends in one FormatError and never in a crash, a
long loop or a large allocation. Weights are not copied; data() returns views of the map. Knows no
model: which keys and tensors must exist is model/loader.py's business. Writes nothing.

Not guarded against: another process that shortens the file while it is mapped.
Source: GGUF specification, version 3 (version 2 has the same layout).
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
import weakref
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar, final, overload

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from autoglm.errors import FormatError
from autoglm.formats.quant_types import BLOCK, UNSUPPORTED_TYPE_NAMES, GGMLType
from autoglm.kernels import string_offsets


class StringArray(Sequence[str]):
    """The strings of one array, each decoded when it is looked at: vocabularies hold half a million.

    data     the array as the file has it: every string behind its length
    offsets  u32 [len + 1], where the entries of data begin, and the last one ends
    """

    def __init__(self, data: bytes, offsets: npt.NDArray[np.uint32]) -> None:
        self.data = data
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        start, stop = self.offsets[range(len(self))[index] :][:2].tolist()
        return self.data[start + 8 : stop].decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        offsets = self.offsets.tolist()
        return (self.data[a + 8 : b].decode("utf-8") for a, b in zip(offsets, offsets[1:], strict=False))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (StringArray, list)) and list(self) == list(other)


MetadataScalar = bool | int | float | str
MetadataValue = MetadataScalar | list[bool] | list[int] | list[float] | StringArray
T = TypeVar("T")
D = TypeVar("D")


class _Required(Enum):
    REQUIRED = "required"


REQUIRED = _Required.REQUIRED

# Real files stay far below: the largest public vocabularies have 0.8M strings in all, 12 MiB.
MAX_METADATA_BYTES = 256 << 20
MAX_ARRAY_ELEMENTS = 1 << 22  # over all arrays of the file together
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1  # the specification's own limit
MAX_NAME_BYTES = 256  # ggml itself stops at 63
MAX_ALIGNMENT = 1 << 16
MAX_DIMS = 4

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY, _BOOL = 8, 9, 7
_VALUE_TYPES: dict[int, tuple[str, str]] = {  # id -> name, struct and NumPy code
    0: ("u8", "<B"),
    1: ("i8", "<b"),
    2: ("u16", "<H"),
    3: ("i16", "<h"),
    4: ("u32", "<I"),
    5: ("i32", "<i"),
    6: ("f32", "<f"),
    _BOOL: ("bool", "<B"),
    10: ("u64", "<Q"),
    11: ("i64", "<q"),
    12: ("f64", "<d"),
}
_TYPE_NAMES = {bool: "a bool", int: "an integer", float: "a number", str: "a string", list: "an array"}

_FETCH_AGAIN = "the file is damaged or not fully downloaded; fetch it again"
# First bytes of files people pass by mistake -> what it is, and the mend.
_KNOWN_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive (PyTorch checkpoints are zip files too)", "convert the model to GGUF"),
    (b"\x80\x02", "a Python pickle (an old PyTorch checkpoint)", "convert the model to GGUF; pickles are never opened"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"\x89HDF", "an HDF5 file", "convert the model to GGUF"),
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself", "fetch the real file with 'git lfs pull'"),
    (b"<", "a web page or XML file", "the download link gave a page; fetch the file itself"),
    (b"{", "a JSON text", "pass the .gguf file"),
    (b"lmgg", "a GGML file from before GGUF", "convert it to GGUF or fetch a GGUF of the model"),
    (b"fmgg", "a GGMF file from before GGUF", "convert it to GGUF or fetch a GGUF of the model"),
    (b"tjgg", "a GGJT file from before GGUF", "convert it to GGUF or fetch a GGUF of the model"),
    (b"FUGG", "a big-endian GGUF file", "fetch or convert a little-endian GGUF"),
)


def _shown(value: object) -> str:
    """A bounded, printable form of something read from a file."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


class TensorInfo(Struct, frozen=True):
    """Where one tensor lies. shape is in torch order (rows first, the contiguous axis last)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int  # bytes from the start of the file
    nbytes: int


class _Header:
    """A cursor over the mapped file; every read is checked against the file's end."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer = buffer
        self.path = path
        self.position = 0
        self.end = len(buffer)
        self.bytes_left = MAX_METADATA_BYTES
        self.elements_left = MAX_ARRAY_ELEMENTS

    def fail(self, offset: int, field: str, got: object, expected: str, mend: str = _FETCH_AGAIN) -> NoReturn:
        got_text = got if isinstance(got, str) else _shown(got)
        raise FormatError(f"{self.path}: at byte {offset}: {field} is {got_text}, expected {expected}; {mend}")

    def need(self, num_bytes: int, field: str) -> int:
        """Start of the next num_bytes, after moving past them."""
        start = self.position
        if num_bytes > self.end - start:
            self.fail(start, field, f"{num_bytes} bytes long", f"at most the {self.end - start} bytes left in the file")
        self.position = start + num_bytes
        return start

    def u32(self, field: str) -> int:
        value: int = _U32.unpack_from(self.buffer, self.need(4, field))[0]
        return value

    def u64(self, field: str) -> int:
        value: int = _U64.unpack_from(self.buffer, self.need(8, field))[0]
        return value

    def count(self, field: str, limit: int, min_bytes_each: int) -> int:
        """A u64 count that could at least fit into the rest of the file."""
        start = self.position
        value = self.u64(field)
        most = min(limit, (self.end - self.position) // min_bytes_each)
        if value > most:
            self.fail(start, field, value, f"at most {most} in a file of {self.end} bytes")
        return value

    def spend(self, num_bytes: int, field: str) -> None:
        self.bytes_left -= num_bytes
        if self.bytes_left < 0:
            self.fail(
                self.position, field, f"{num_bytes} bytes long", f"metadata of {MAX_METADATA_BYTES} bytes at most"
            )

    def string(self, field: str, max_bytes: int = MAX_METADATA_BYTES) -> str:
        length_at = self.position
        length = self.u64(f"length of {field}")
        if length > max_bytes:
            self.fail(length_at, f"length of {field}", length, f"at most {max_bytes}")
        self.spend(length, field)
        start = self.need(length, field)
        try:
            return self.buffer[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(start, field, "not UTF-8", "UTF-8 text")

    def value(self, field: str) -> MetadataValue:
        type_at = self.position
        type_id = self.u32(f"type of {field}")
        if type_id == _STRING:
            return self.string(field)
        if type_id == _ARRAY:
            return self.array(field)
        if type_id not in _VALUE_TYPES:
            self.fail(type_at, f"type of {field}", type_id, "a value type from 0 to 12")
        code = _VALUE_TYPES[type_id][1]
        start = self.need(struct.calcsize(code), field)
        scalar: MetadataScalar = struct.unpack_from(code, self.buffer, start)[0]
        if type_id == _BOOL:
            if scalar not in (0, 1):
                self.fail(start, field, scalar, "0 or 1 for a bool")
            return bool(scalar)
        return scalar

    def array(self, field: str) -> MetadataValue:
        type_at = self.position
        type_id = self.u32(f"element type of {field}")
        if type_id == _ARRAY:
            self.fail(type_at, field, "an array of arrays", "an array of numbers, bools or strings")
        if type_id != _STRING and type_id not in _VALUE_TYPES:
            self.fail(type_at, f"element type of {field}", type_id, "a value type from 0 to 12")
        code = "" if type_id == _STRING else _VALUE_TYPES[type_id][1]
        width = 8 if type_id == _STRING else struct.calcsize(code)
        count = self.count(f"number of elements of {field}", self.elements_left, width)
        self.elements_left -= count
        self.spend(count * width, field)
        if type_id == _STRING:
            return self.strings(field, count)
        start = self.need(count * width, field)
        numbers = np.frombuffer(self.buffer, dtype=code, count=count, offset=start)
        if type_id != _BOOL:
            values: list[int] | list[float] = numbers.tolist()
            return values
        if count and int(numbers.max()) > 1:
            self.fail(start, field, "a bool other than 0 and 1", "0 or 1")
        return [bool(number) for number in numbers]

    def strings(self, field: str, count: int) -> StringArray:
        """The elements of a string array."""
        first, end = self.position, min(self.end, self.position + self.bytes_left)
        offsets = string_offsets(np.frombuffer(self.buffer, np.uint8), first, end, count)
        self.position = first + int(offsets[-1])
        self.spend(self.position - first, field)
        if len(offsets) <= count:
            self.spend(8, field)
            self.string(f"an element of {field}")  # raises, for this is the one that is wrong
            raise AssertionError("native and Python reader disagree")
        return StringArray(self.buffer[first : self.position], offsets)


@final
class GGUFFile:
    """An open GGUF file. Use as a context manager, or call close().

    metadata    key -> bool, int, float, str, a list of one of the first three, or a StringArray
    tensors     name -> TensorInfo, in file order
    file_bytes  size of the file
    """

    path: Path
    metadata: dict[str, MetadataValue]
    tensors: dict[str, TensorInfo]
    file_bytes: int

    def __init__(self, path: Path, buffer: mmap.mmap, descriptor: int) -> None:
        """Use open(); buffer is the whole file, read only, and descriptor the file itself."""
        self.path = path
        self._descriptor = descriptor
        self.file_bytes = len(buffer)
        self._buffer: mmap.mmap | None = buffer
        header = _Header(buffer, path)
        num_tensors, num_keys = _read_counts(header)
        self.metadata = _read_metadata(header, num_keys)
        _refuse_split(path, self.metadata)
        self.tensors = _read_tensors(header, num_tensors, self.metadata)
        self._close_file = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map and validate the file; FormatError (with the mend) for anything that is not a sound GGUF."""
        path = Path(path)
        buffer, descriptor = _map(path)
        try:
            _check_magic(path, buffer)
            return cls(path, buffer, descriptor)
        except BaseException:
            _close(buffer)
            os.close(descriptor)
            raise

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor: uint8 [nbytes], a read-only view of the memory map."""
        info = self.tensors.get(name)
        if info is None:
            raise FormatError(f"{self.path}: tensor {_shown(name)} is missing; {_FETCH_AGAIN}")
        if self._buffer is None:
            raise ValueError(f"{self.path}: the GGUF file is closed")
        return np.frombuffer(self._buffer, dtype=np.uint8, count=info.nbytes, offset=info.offset)

    def fileno(self) -> int:
        """The descriptor of the open file, for who reads tensors and does not map them."""
        return self._descriptor

    def release(self, name: str) -> None:
        """Give back the memory that reading a tensor took; the next look at it reads the file again."""
        info = self.tensors[name]
        if self._buffer is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE  # neighbours share the first and last page
        length = (info.offset + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            self._buffer.madvise(mmap.MADV_DONTNEED, start, length)

    def get(self, key: str, type_: type[T], default: D | _Required = REQUIRED) -> T | D:
        """A metadata value of one Python type (bool, int, float, str or list).

        Integers of every width are one type, a float takes integers too, a bool is never an integer.
        Returns default when the key is absent; FormatError when there is no default or the type differs.
        """
        if key not in self.metadata:
            if isinstance(default, _Required):
                raise FormatError(
                    f"{self.path}: metadata key {_shown(key)} is missing, expected {_TYPE_NAMES[type_]}; "
                    "the file does not describe its model fully, fetch another conversion of it"
                )
            return default
        value: Any = self.metadata[key]
        if isinstance(value, StringArray):
            value = list(value)
        if type_ is float and type(value) is int:
            value = float(value)
        if type(value) is not type_:
            raise FormatError(
                f"{self.path}: metadata key {_shown(key)} is {_TYPE_NAMES[type(value)]}, "
                f"expected {_TYPE_NAMES[type_]}; fetch another conversion of the model"
            )
        result: T = value
        return result

    def strings(self, key: str) -> StringArray:
        """An array of strings, not decoded yet; FormatError as get raises it, or for an array of anything else."""
        value = self.metadata.get(key)
        if isinstance(value, StringArray):
            return value
        self.get(key, list)
        raise FormatError(
            f"{self.path}: {_shown(key)} is not a list of strings, expected strings; "
            "fetch another conversion of the model"
        )

    def close(self) -> None:
        """Give the map back; views handed out by data() keep it alive until they are gone."""
        if self._buffer is not None:
            _close(self._buffer)
            self._buffer = None
            self._close_file()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(buffer: mmap.mmap) -> None:
    try:
        buffer.close()
    except BufferError:  # a NumPy view still points into it; its death unmaps the file
        pass


def _map(path: Path) -> tuple[mmap.mmap, int]:
    try:
        kind = os.stat(path).st_mode
        # Asked before open(): opening a pipe would wait for its writer for ever.
        if stat.S_ISDIR(kind):
            raise FormatError(f"{path}: is a folder, expected a GGUF file; name the .gguf file inside it")
        if not stat.S_ISREG(kind):
            raise FormatError(f"{path}: is not a regular file, expected a GGUF file; copy the model to disk first")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FormatError(f"{path}: the file is empty, expected a GGUF file; fetch it again")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return buffer, os.dup(file.fileno())
    except FileNotFoundError:
        raise FormatError(f"{path}: file not found; check the path given with --model") from None
    except PermissionError:
        raise FormatError(f"{path}: no permission to read the file; grant it with chmod u+r") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FormatError(f"{path}: cannot be opened ({reason}); check the path given with --model") from None


def _check_magic(path: Path, buffer: mmap.mmap) -> None:
    start = buffer[:64]
    if start[:4] == b"GGUF":
        return
    if len(start) > 8 and start[8:9] == b"{" and _U64.unpack_from(start)[0] <= len(buffer):
        raise FormatError(f"{path}: is a safetensors file, expected GGUF; convert the model to GGUF")
    for magic, what, mend in _KNOWN_MAGIC:
        if start.startswith(magic):
            raise FormatError(f"{path}: is {what}, expected GGUF; {mend}")
    raise FormatError(
        f"{path}: at byte 0: magic is {_shown(start[:4])}, expected b'GGUF'; this is not a GGUF file, pass a .gguf"
    )


def _read_counts(header: _Header) -> tuple[int, int]:
    header.position = 4
    version = header.u32("version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in (1, 2, 3):
            header.fail(4, "byte order", "big-endian", "little-endian", "fetch or convert a little-endian GGUF")
        mend = (
            "convert the model again with a current tool"
            if version == 1
            else "update autoglm or fetch a version 3 file"
        )
        header.fail(4, "version", version, "2 or 3", mend)
    # Smallest tensor entry: length, 1 byte of name, dims count, 1 dim, type, offset. Smallest key: 14 bytes.
    num_tensors = header.count("number of tensors", MAX_TENSORS, 33)
    num_keys = header.count("number of metadata keys", MAX_KEYS, 14)
    return num_tensors, num_keys


def _read_metadata(header: _Header, num_keys: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for index in range(num_keys):
        start = header.position
        key = header.string(f"metadata key {index}", MAX_KEY_BYTES)
        if not key:
            header.fail(start, f"metadata key {index}", "empty", "a name")
        if key in metadata:
            header.fail(start, f"metadata key {index}", f"{_shown(key)} a second time", "every key once")
        metadata[key] = header.value(f"metadata key {_shown(key)}")
    return metadata


def _refuse_split(path: Path, metadata: dict[str, MetadataValue]) -> None:
    parts = metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        number = metadata.get("split.no", 0)
        shown = number + 1 if isinstance(number, int) else "?"
        raise FormatError(
            f"{path}: is part {shown} of {parts} of a split GGUF, expected one whole file; "
            "join the parts with 'llama-gguf-split --merge FIRST_PART OUTPUT'"
        )


def _alignment(header: _Header, metadata: dict[str, MetadataValue]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        header.fail(header.position, "general.alignment", _shown(value), f"a power of two up to {MAX_ALIGNMENT}")
    return value


def _read_tensors(header: _Header, num_tensors: int, metadata: dict[str, MetadataValue]) -> dict[str, TensorInfo]:
    alignment = _alignment(header, metadata)
    tensors: dict[str, TensorInfo] = {}
    offsets_at: dict[str, int] = {}
    for index in range(num_tensors):
        start = header.position
        name = header.string(f"name of tensor {index}", MAX_NAME_BYTES)
        if not name:
            header.fail(start, f"name of tensor {index}", "empty", "a name")
        if name in tensors:
            header.fail(start, f"name of tensor {index}", f"{_shown(name)} a second time", "every tensor once")
        tensors[name] = _read_tensor(header, name, alignment)
        offsets_at[name] = header.position - 8
    data_start = -(-header.position // alignment) * alignment
    placed = {
        name: TensorInfo(name, info.shape, info.type, info.offset + data_start, info.nbytes)
        for name, info in tensors.items()
    }
    _check_placement(header, placed, offsets_at)
    return placed


def _read_tensor(header: _Header, name: str, alignment: int) -> TensorInfo:
    """One entry of the tensor table; its offset is still relative to the data section."""
    field = f"tensor {_shown(name)}"
    start = header.position
    num_dims = header.u32(f"number of dimensions of {field}")
    if not 1 <= num_dims <= MAX_DIMS:
        header.fail(start, f"number of dimensions of {field}", num_dims, f"1 to {MAX_DIMS}")
    dims_at = header.position
    dims = [header.u64(f"a dimension of {field}") for _ in range(num_dims)]
    type_at = header.position
    type_id = header.u32(f"type of {field}")
    if type_id not in GGMLType._value2member_map_:
        header.fail(
            type_at,
            f"type of {field}",
            f"{UNSUPPORTED_TYPE_NAMES.get(type_id, 'unknown')} ({type_id})",
            "one of " + ", ".join(kind.name for kind in GGMLType),
            "fetch the model in one of these, such as Q4_K_M or Q8_0",
        )
    kind = GGMLType(type_id)
    elements, block_bytes = BLOCK[kind]
    num_elements = 1
    for dim in dims:  # Python integers do not overflow
        if dim < 1:
            header.fail(dims_at, f"shape of {field}", _shown(dims), "dimensions of at least 1")
        num_elements *= dim
    if dims[0] % elements:
        header.fail(dims_at, f"row length of {field}", dims[0], f"a multiple of {elements} for {kind.name}")
    nbytes = num_elements // elements * block_bytes
    if nbytes > header.end:
        header.fail(dims_at, f"size of {field}", f"{nbytes} bytes", f"at most the file's {header.end} bytes")
    offset_at = header.position
    offset = header.u64(f"offset of {field}")
    if offset % alignment:
        header.fail(offset_at, f"offset of {field}", offset, f"a multiple of the alignment {alignment}")
    return TensorInfo(name, tuple(reversed(dims)), kind, offset, nbytes)


def _check_placement(header: _Header, tensors: dict[str, TensorInfo], offsets_at: dict[str, int]) -> None:
    """Every tensor inside the file, no two on the same bytes; gaps are allowed."""
    previous: TensorInfo | None = None
    for info in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        field = f"tensor {_shown(info.name)}"
        stop = info.offset + info.nbytes
        if stop > header.end:
            header.fail(
                offsets_at[info.name], f"end of {field}", f"byte {stop}", f"at most the file's {header.end} bytes"
            )
        if previous is not None and info.offset < previous.offset + previous.nbytes:
            header.fail(
                offsets_at[info.name],
                f"start of {field}",
                f"byte {info.offset}",
                f"byte {previous.offset + previous.nbytes} or later, where tensor {_shown(previous.name)} ends",
            )
        previous = info
