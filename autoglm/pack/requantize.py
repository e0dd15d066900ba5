"""A GGUF -> the same model in other weight types, one tensor at a time; what must stay a float stays one.

Nothing is gained by going up: an F32 file of a quantized one holds the very values the engine computes with, which
makes it the reference that other types of the same weights are measured against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoglm.errors import ConfigError, FormatError
from autoglm.formats.gguf import GGUFFile, StringArray
from autoglm.formats.quant_types import GGMLType, row_bytes
from autoglm.kernels import Runtime, dequantize
from autoglm.pack.convert import MMPROJ_TYPES, Progress, stored_bytes
from autoglm.pack.gguf_writer import MetadataValue, lay_out
from autoglm.pack.type_plan import FileType, community_type, gcmf_type
from autoglm.whole_file import whole_file

_VALUES_AT_ONCE = 1 << 22  # 16 MB of float32


def requantize(
    source: Path, target: Path, file_type: FileType, *, num_threads: int = 1, progress: Progress | None = None
) -> None:
    """Write `source`, a text GGUF or an mmproj, as a file of file_type.

    A tensor that has its new type already is copied. Raises ConfigError for a type an mmproj cannot have and for
    `target` being `source`, FormatError for a damaged file.
    """
    if target.exists() and target.samefile(source):
        raise ConfigError(f"'{target}' is the file to be read; choose another --out or --type")
    runtime, done = Runtime(num_threads), 0
    with GGUFFile.open(source) as gguf:
        types = _types(gguf, file_type)
        shapes = {name: (gguf.tensors[name].shape, type_) for name, type_ in types.items()}
        layout = lay_out(gguf.get("general.architecture", str), _metadata(gguf, file_type), shapes)
        with whole_file(target) as temporary, open(temporary, "wb") as file:
            file.truncate(layout.file_bytes)
            file.write(layout.header)
            for name, type_ in types.items():
                file.seek(layout.offsets[name])
                for piece in _pieces(gguf, name, type_, runtime):
                    file.write(piece.data)
                    done += piece.nbytes
                    if progress is not None:
                        progress(f"writing {target.name}", done, layout.file_bytes)
                gguf.release(name)


def _metadata(gguf: GGUFFile, file_type: FileType) -> dict[str, MetadataValue]:
    """The keys as they are, but for the file's type and what the writer sets itself."""
    result: dict[str, MetadataValue] = {}
    for key, value in gguf.metadata.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, bool) or (isinstance(value, int) and not 0 <= value < 1 << 32):
            raise FormatError(f"{gguf.path}: metadata key {key[:80]} holds what this writer has no type for")
        if key not in ("general.architecture", "general.alignment"):
            result[key] = list(value) if isinstance(value, StringArray) else value  # type: ignore[assignment]  # no bools
    return {**result, "general.file_type": int(file_type)}


def _types(gguf: GGUFFile, file_type: FileType) -> dict[str, GGMLType]:
    shapes = {name: info.shape for name, info in gguf.tensors.items()}
    architecture = gguf.get("general.architecture", str)
    if architecture == "clip" and file_type not in MMPROJ_TYPES:
        raise ConfigError(f"an mmproj can be {', '.join(t.name for t in MMPROJ_TYPES)}, not {file_type.name}")
    if architecture == "clip" and gguf.get("clip.projector_type", str, "") == "gcmf":
        return {name: gcmf_type(name, shape, file_type) for name, shape in shapes.items()}
    num_layers = gguf.get(f"{architecture}.block_count", int, 0)
    is_tied = "output.weight" not in shapes
    return {name: community_type(name, shape, file_type, num_layers, is_tied=is_tied) for name, shape in shapes.items()}


def _pieces(gguf: GGUFFile, name: str, type_: GGMLType, runtime: Runtime) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor in its new type, some rows at a time."""
    info, data = gguf.tensors[name], gguf.data(name)
    if info.type == type_:
        yield np.ascontiguousarray(data).reshape(-1)
        return
    width = info.shape[-1]
    num_rows, stride = math.prod(info.shape[:-1]), row_bytes(info.type, width)
    flat = data.reshape(-1)
    at_once = max(1, _VALUES_AT_ONCE // width)
    for first in range(0, num_rows, at_once):
        count = min(at_once, num_rows - first)
        raw = np.ascontiguousarray(flat[first * stride : (first + count) * stride])
        values = dequantize(raw, int(info.type), count * width).reshape(count, width)
        yield stored_bytes(values, type_, runtime, f"{gguf.path}: tensor {name}")
