"""Reads the header of one safetensors file, validated, and maps its tensors one at a time.

Assumes nothing about the file: header length, types, shapes and offsets are held against the file size first. Only the
float types a checkpoint's weights come in; bf16, which NumPy lacks, is read as its 16 bits and widened on demand.
Not guarded against: another process that shortens the file while it is read.
Source: the safetensors format description: u64 header length, JSON header, data.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm.errors import FormatError

# Name in the header -> NumPy code of the stored bytes.
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
MAX_HEADER_BYTES = 100 << 20  # the format's own limit
MAX_DIMS = 8


@dataclass(frozen=True)
class SafeTensor:
    """Where one tensor lies. shape is in torch order; offset counts bytes from the start of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def array(self) -> NDArray[Any]:
        """The stored bytes as a read-only map of DTYPES[dtype], whose memory goes when the array goes."""
        return np.memmap(self.path, DTYPES[self.dtype], "r", self.offset, self.shape)


def to_float32(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """A slice of SafeTensor.array() as a contiguous f32 array of the same shape; exact."""
    if dtype == "BF16":
        return (np.ascontiguousarray(stored, np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(stored, np.float32)


def read_header(path: Path) -> dict[str, SafeTensor]:
    """The tensors of one file by name. Raises FormatError if it is cut short, damaged or of another kind."""
    try:
        file_bytes = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
                raise FormatError(
                    f"{path}: {_kind(start)}, expected a safetensors file whose header fits its {file_bytes} bytes; "
                    "it is damaged or not fully downloaded, fetch it again"
                )
            text = file.read(length)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the safetensors header is no JSON object; fetch the file again")
    header.pop("__metadata__", None)
    data_start = 8 + length
    return {name: _tensor(path, name, entry, data_start, file_bytes) for name, entry in header.items()}


def _kind(start: bytes) -> str:
    if start.startswith(b"version "):
        return "is a Git LFS pointer, not the weights themselves"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is a PyTorch checkpoint, which is never opened"
    return "has an impossible header length"


def _tensor(path: Path, name: str, entry: object, data_start: int, file_bytes: int) -> SafeTensor:
    shown = f"{path}: tensor {ascii(name)[:80]}"
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2 or not 1 <= len(shape) <= MAX_DIMS:
        raise FormatError(f"{shown} has no valid shape and data_offsets; fetch the file again")
    if dtype not in DTYPES:
        raise FormatError(f"{shown} is of type {ascii(dtype)[:20]}, expected one of {', '.join(DTYPES)}")
    begin, end = offsets
    nbytes = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if nbytes == 0 or end - begin != nbytes:
        raise FormatError(f"{shown} has {end - begin} bytes, expected {nbytes} by its shape; fetch the file again")
    if data_start + end > file_bytes:
        raise FormatError(
            f"{shown} ends at byte {data_start + end}, after the file's end at {file_bytes}; "
            "the download is not complete, fetch the file again"
        )
    return SafeTensor(path, name, dtype, tuple(shape), data_start + begin)


def _counts(values: object) -> list[int] | None:
    """A list of whole numbers from 0 up, or None for anything else."""
    return values if isinstance(values, list) and all(type(item) is int and item >= 0 for item in values) else None
