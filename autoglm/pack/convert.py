"""A published GLM-4.1V checkpoint -> the GGUF pair: one piece of a tensor in memory, resumable, read back at the end.

Everything that can be wrong with the checkpoint is found before the first weight is written. The same checkpoint and
types give the same bytes, however often the run was interrupted. A file gets its name only after every tensor in it
was read back and compared with the source.
Source of names, types and row order: glm4v_map.py, type_plan.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoglm.errors import ConfigError, FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.formats.quant_types import GGMLType, row_bytes
from autoglm.formats.safetensors import SafeTensor, to_float32
from autoglm.kernels import Runtime, quantize
from autoglm.pack.gguf_writer import Layout, MetadataValue, lay_out
from autoglm.pack.glm4v_config import read_text_shape, read_vision_shape
from autoglm.pack.glm4v_map import (
    Entry,
    canonical,
    check_tensors,
    text_entries,
    text_metadata,
    vision_entries,
    vision_metadata,
)
from autoglm.pack.hf_checkpoint import HfCheckpoint, open_checkpoint
from autoglm.pack.hf_tokenizer import check_tokenizer, tokenizer_metadata
from autoglm.pack.part_file import PartFile, check_space
from autoglm.pack.read_back import TensorError, measure_tensor
from autoglm.pack.type_plan import FileType, community_type

logger = logging.getLogger(__name__)
Vector = NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all

# Raised when the same checkpoint would give other bytes than before: an interrupted run must not mix the two.
REVISION = 1
MMPROJ_TYPES = (FileType.Q8_0, FileType.F16, FileType.F32)
_VALUES_AT_ONCE = 1 << 22  # 16 MB of float32
_MAX_HALF = 65504.0


@dataclass(frozen=True)
class Converted:
    """One finished file and how far each of its tensors is from the checkpoint."""

    path: Path
    errors: list[TensorError]


@dataclass(frozen=True)
class _Job:
    """One file to be written."""

    path: Path
    layout: Layout
    entries: list[Entry]
    types: Mapping[str, GGMLType]
    tensors: Mapping[str, SafeTensor]

    def pieces(self, entry: Entry) -> Iterator[tuple[int, Vector]]:
        """(first row, f32 [rows, ...]) of a tensor in the file's order, some 16 MB at a time."""
        tensor = self.tensors[entry.source]
        stored = tensor.array()
        if entry.frame is not None:
            stored = stored[:, :, entry.frame]
        count = max(1, _VALUES_AT_ONCE // max(1, stored[0].size))
        for first in range(0, len(stored), count):
            rows = slice(first, first + count) if entry.rows is None else entry.rows[first : first + count]
            yield first, to_float32(stored[rows], tensor.dtype)


def convert(
    folder: Path,
    out: Path,
    *,
    file_type: FileType,
    mmproj_type: FileType,
    name: str | None = None,
    num_threads: int = 1,
    progress: Progress | None = None,
) -> list[Converted]:
    """Write `NAME-TYPE.gguf` and `mmproj-NAME-TYPE.gguf` into `out`, or go on with what an earlier run left there.

    folder    a Glm4vForConditionalGeneration checkpoint: config.json, *.safetensors, tokenizer.json
    name      of the model, in the files and their names; the folder's by default
    progress  called with what is being done, and bytes of the file
    Raises ConfigError for a wrong folder, name or type, a full disk, or a file of that name made from something else;
    FormatError for a damaged, incomplete or other checkpoint, and for a file that does not read back as written.
    """
    if mmproj_type not in MMPROJ_TYPES:
        raise ConfigError(f"an mmproj can be {', '.join(t.name for t in MMPROJ_TYPES)}, not {mmproj_type.name}")
    name = folder.resolve().name if name is None else name
    if not name or Path(name).name != name or len(name) > 100:
        raise ConfigError(f"the name {ascii(name)[:60]} is no part of a file name; give one with --name")
    checkpoint = open_checkpoint(folder)
    jobs = _plan(checkpoint, out, name, file_type, mmproj_type)
    for job in jobs:
        _refuse_another(job)
    check_space({job.path: job.layout.file_bytes for job in jobs})
    runtime = Runtime(num_threads)
    report = progress or (lambda what, done, total: None)
    return [_run(checkpoint, job, runtime, report) for job in jobs]


def _plan(checkpoint: HfCheckpoint, out: Path, name: str, file_type: FileType, mmproj_type: FileType) -> list[_Job]:
    text, vision = read_text_shape(checkpoint.config), read_vision_shape(checkpoint.config)
    tensors = canonical(checkpoint.tensors)
    in_text, in_mmproj = text_entries(text), vision_entries(vision)
    check_tensors(str(checkpoint.folder), tensors, in_text + in_mmproj, is_tied=text.is_tied)

    main_types, mmproj_types = (
        {
            entry.name: community_type(entry.name, entry.shape, kind, text.num_hidden_layers, is_tied=text.is_tied)
            for entry in entries
        }
        for entries, kind in ((in_text, file_type), (in_mmproj, mmproj_type))
    )
    main_keys = {
        **text_metadata(text, in_text, name, file_type),
        **tokenizer_metadata(checkpoint, text.vocab_size),
    }
    mmproj_keys = vision_metadata(checkpoint, vision, in_mmproj, name, mmproj_type)
    main, mmproj = out / f"{name}-{file_type.name}.gguf", out / f"mmproj-{name}-{mmproj_type.name}.gguf"
    return [
        _Job(main, _lay_out("glm4", main_keys, in_text, main_types), in_text, main_types, tensors),
        _Job(mmproj, _lay_out("clip", mmproj_keys, in_mmproj, mmproj_types), in_mmproj, mmproj_types, tensors),
    ]


def _lay_out(
    architecture: str, keys: Mapping[str, MetadataValue], entries: list[Entry], types: Mapping[str, GGMLType]
) -> Layout:
    return lay_out(architecture, keys, {entry.name: (entry.shape, types[entry.name]) for entry in entries})


def _run(checkpoint: HfCheckpoint, job: _Job, runtime: Runtime, report: Progress) -> Converted:
    if job.path.exists():
        logger.info(f"{job.path.name} is there already")
        return Converted(job.path, _read_back(job, job.path, report))
    fingerprint = hashlib.sha256(json.dumps([REVISION, checkpoint.sources()]).encode() + job.layout.header).hexdigest()
    with PartFile(job.path, fingerprint, job.layout.header, job.layout.file_bytes) as part:
        if part.is_changed:
            logger.warning(f"{part.part.name} was made from something else and is begun anew")
        elif part.done:
            logger.info(f"Going on with {job.path.name}: {len(part.done)} of {len(job.entries)} tensors are there")
        _check_header(checkpoint, part.part)
        _write_tensors(job, part, runtime, report)
        try:
            errors = _read_back(job, part.part, report)
        except FormatError:
            part.forget()
            raise
        part.publish()
    return Converted(job.path, errors)


def _refuse_another(job: _Job) -> None:
    """A file of that name is one that an earlier run finished, or nothing is overwritten."""
    if not job.path.exists():
        return
    is_same = False
    if job.path.is_file():
        with open(job.path, "rb") as file:
            is_same = file.read(len(job.layout.header)) == job.layout.header
    if not is_same or job.path.stat().st_size != job.layout.file_bytes:
        raise ConfigError(
            f"{job.path} exists and was made from something else; delete it, or choose another --name or --out"
        )


def _check_header(checkpoint: HfCheckpoint, path: Path) -> None:
    """The header is read as any user of the file will read it; its tokenizer must be the checkpoint's."""
    with GGUFFile.open(path) as gguf:
        if "tokenizer.ggml.model" in gguf.metadata:
            check_tokenizer(checkpoint, gguf)


def _write_tensors(job: _Job, part: PartFile, runtime: Runtime, report: Progress) -> None:
    done, total = 0, job.layout.file_bytes
    for entry in job.entries:
        type_, position = job.types[entry.name], job.layout.offsets[entry.name]
        if entry.name in part.done:
            done += math.prod(entry.shape[:-1]) * row_bytes(type_, entry.shape[-1])
            continue
        for _, values in job.pieces(entry):
            source = job.tensors[entry.source]
            data = stored_bytes(values, type_, runtime, f"{source.path}: tensor {source.name}")
            part.write(position, data)
            position += data.nbytes
            done += data.nbytes
            report(f"writing {job.path.name}", done, total)
        part.finish_piece(entry.name)


def stored_bytes(values: Vector, type_: GGMLType, runtime: Runtime, where: str) -> NDArray[np.uint8]:
    """Rows f32 [rows, ...] as the bytes of the file; where: the file and tensor they are from, for errors.

    Raises FormatError for values that are not finite, or too large for F16.
    """
    top = float(np.abs(values).max())
    if not math.isfinite(top):
        raise FormatError(f"{where} holds NaN or infinity; fetch the file again")
    if type_ == GGMLType.F32:
        return values.reshape(-1).view(np.uint8)
    if type_ == GGMLType.F16:
        if top > _MAX_HALF:
            raise FormatError(f"{where} holds {top:.3g}, too large for F16; take type f32")
        return values.astype(np.float16).reshape(-1).view(np.uint8)
    return quantize(runtime, values, int(type_))


def _read_back(job: _Job, path: Path, report: Progress) -> list[TensorError]:
    done, errors = 0, []

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        report(f"checking {job.path.name}", done, job.layout.file_bytes)

    with GGUFFile.open(path) as gguf:
        for entry in job.entries:
            errors.append(measure_tensor(gguf, entry.name, job.pieces(entry), count))
    return errors
