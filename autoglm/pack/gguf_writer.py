"""Write one GGUF file: typed keys and stored tensors, under its name only when it is whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from autoglm.errors import ConfigError
from autoglm.formats.quant_types import BLOCK, GGMLType
from autoglm.whole_file import whole_file

MetadataValue = str | int | float | bool | list[str] | list[int] | list[float]


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


def write_gguf(
    path: Path, architecture: str, metadata: Mapping[str, MetadataValue], tensors: Mapping[str, StoredTensor]
) -> None:
    """Write one file, tensors in the order given; the same arguments give the same bytes.

    metadata  whole numbers become u32, or i32 in arrays; an empty array is left out
    Raises ConfigError if the folder cannot be written.
    """
    try:
        with whole_file(path) as temporary:
            _write(temporary, architecture, metadata, tensors)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{path} cannot be written: {reason}; name a folder you may write to") from None


def _write(
    path: Path, architecture: str, metadata: Mapping[str, MetadataValue], tensors: Mapping[str, StoredTensor]
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add_key(writer, key, value)
    for name, tensor in tensors.items():
        data = np.ascontiguousarray(tensor.data)
        is_blocks = BLOCK[tensor.type][0] > 1
        raw_type = gguf.GGMLQuantizationType(int(tensor.type)) if is_blocks else None
        writer.add_tensor(name, data, raw_shape=data.shape if is_blocks else None, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_key(writer: gguf.GGUFWriter, key: str, value: MetadataValue) -> None:
    if isinstance(value, bool):  # before int: a bool is one in Python
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
