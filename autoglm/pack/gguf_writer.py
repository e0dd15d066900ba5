"""Write one GGUF file: typed keys and stored tensors, under its name only when it is whole.

The header depends on names, shapes and types alone, so `lay_out` knows where each tensor will lie before any of them
is there: who cannot hold a whole model in memory writes them one by one.
Source: GGUF specification, version 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoglm.errors import ConfigError
from autoglm.formats.quant_types import BLOCK, GGMLType, row_bytes
from autoglm.whole_file import whole_file

MetadataValue = str | int | float | bool | list[str] | list[int] | list[float]
ALIGNMENT = 32  # what a file without general.alignment has
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9  # ids of value types


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file holds it.

    data  u8 [rows, row bytes] of a quantized type, else f16 or f32 of any shape
    """

    data: NDArray[np.uint8] | NDArray[np.float16] | NDArray[np.float32]
    type: GGMLType

    @property
    def num_elements(self) -> int:
        elements, nbytes = BLOCK[self.type]
        return self.data.nbytes // nbytes * elements

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements, torch order."""
        elements, nbytes = BLOCK[self.type]
        if elements == 1:
            return self.data.shape
        return (*self.data.shape[:-1], self.data.shape[-1] // nbytes * elements)


@dataclass(frozen=True)
class Layout:
    """Where everything of a file goes.

    header      the file's first bytes, up to the first tensor
    offsets     tensor name -> bytes from the start of the file; what lies between tensors is zero
    file_bytes  size of the whole file
    """

    header: bytes
    offsets: Mapping[str, int]
    file_bytes: int


def write_gguf(
    path: Path, architecture: str, metadata: Mapping[str, MetadataValue], tensors: Mapping[str, StoredTensor]
) -> None:
    """Write one file, tensors in the order given; the same arguments give the same bytes.

    metadata  whole numbers become u32, or i32 in arrays; an empty array is left out
    Raises ConfigError if the folder cannot be written.
    """
    layout = lay_out(architecture, metadata, {name: (tensor.shape, tensor.type) for name, tensor in tensors.items()})
    try:
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            file.truncate(layout.file_bytes)
            file.write(layout.header)
            for name, tensor in tensors.items():
                file.seek(layout.offsets[name])
                file.write(np.ascontiguousarray(tensor.data).tobytes())
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{path} cannot be written: {reason}; name a folder you may write to") from None


def lay_out(
    architecture: str,
    metadata: Mapping[str, MetadataValue],
    tensors: Mapping[str, tuple[tuple[int, ...], GGMLType]],
) -> Layout:
    """The header of a file of these tensors, given as (shape in torch order, type), and their places in it.

    Raises ValueError if a row is no whole number of blocks.
    """
    keys = {"general.architecture": architecture, **metadata}
    entries = [_string(key) + _value(value) for key, value in keys.items() if value != []]
    infos, relative, position = [], {}, 0
    for name, (shape, type_) in tensors.items():
        dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos.append(_string(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", int(type_), position))
        relative[name] = position
        position = _aligned(position + math.prod(shape[:-1]) * row_bytes(type_, shape[-1]))
    header = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries)) + b"".join(entries) + b"".join(infos)
    header += bytes(_aligned(len(header)) - len(header))
    offsets = {name: len(header) + offset for name, offset in relative.items()}
    return Layout(header, offsets, len(header) + position)


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: MetadataValue) -> bytes:
    if isinstance(value, bool):  # before int: a bool is one in Python
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    start = struct.pack("<I", _ARRAY)
    if isinstance(value[0], str):
        return start + struct.pack("<IQ", _STRING, len(value)) + b"".join(_string(str(item)) for item in value)
    code, kind = ("i", _I32) if isinstance(value[0], int) else ("f", _F32)
    return start + struct.pack(f"<IQ{len(value)}{code}", kind, len(value), *value)
