"""GGUF -> model: typed configuration and packed weights; every tensor used once, none missing."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from autoglm.config import ModelConfig
from autoglm.errors import ConfigError, FormatError
from autoglm.formats.gguf import GGUFFile, TensorInfo
from autoglm.formats.quant_types import GGMLType, row_bytes
from autoglm.kernels import Matrix, Runtime, WeightLoader, dequantize

Vector = NDArray[np.float32]
Progress = Callable[[int, int], None]  # bytes done, bytes in all

ARCHITECTURES = ("glm4", "llama")
# How picture and sound tokens see each other (docs/format.md); without either, "media" is "causal".
ATTENTION_MODES = ("causal", "media")
TOKEN_TABLE = "token_embd.weight"
_REPORT_S = 0.1  # between two calls of progress


# As floats the matrices of so small a model still lie in a processor's cache: 8-bit products would be hardly quicker,
# and their rounding changes an answer now and then (docs/performance.md).
MAX_FLOAT_BYTES = 64 << 20


def float_bytes(*files: GGUFFile) -> int:
    """Bytes of all tensors of the files as f32."""
    return sum(4 * math.prod(tensor.shape) for gguf in files for tensor in gguf.tensors.values())


def runs_in_floats(*files: GGUFFile) -> bool:
    """Whether the files of one model are unpacked to f32 when they are loaded."""
    return float_bytes(*files) <= MAX_FLOAT_BYTES


def read_model_config(gguf: GGUFFile) -> ModelConfig:
    """The decoder's shape from the header. Raises FormatError naming the key that is missing or impossible."""
    arch = gguf.get("general.architecture", str)
    if arch == "clip":
        raise FormatError(
            f"{gguf.path}: this is a multimodal projector (mmproj), not a language model; "
            "give the text model with --model and this file with --mmproj"
        )
    if arch not in ARCHITECTURES:
        raise FormatError(
            f"{gguf.path}: architecture {arch[:40]!r} is not supported; this build runs {' and '.join(ARCHITECTURES)}"
        )

    def key(name: str) -> str:
        return f"{arch}.{name}"

    heads = gguf.get(key("attention.head_count"), int)
    hidden = gguf.get(key("embedding_length"), int)
    head_dim = gguf.get(key("attention.key_length"), int, hidden // max(heads, 1))
    if gguf.get(key("attention.value_length"), int, head_dim) != head_dim:
        raise FormatError(f"{gguf.path}: keys and values of different length are not supported")
    if head_dim % 16 or head_dim > 256:
        raise FormatError(f"{gguf.path}: head size {head_dim} is not supported; expected a multiple of 16 up to 256")
    _refuse_rope_scaling(gguf, arch)
    sections = _mrope_section(gguf, arch)
    try:
        return ModelConfig(
            architecture=arch,
            name=gguf.get("general.name", str, gguf.path.stem),
            num_hidden_layers=gguf.get(key("block_count"), int) - gguf.get(key("nextn_predict_layers"), int, 0),
            hidden_size=hidden,
            intermediate_size=gguf.get(key("feed_forward_length"), int),
            num_attention_heads=heads,
            num_key_value_heads=gguf.get(key("attention.head_count_kv"), int, heads),
            head_dim=head_dim,
            vocab_size=_vocab_size(gguf, hidden),
            max_position_embeddings=gguf.get(key("context_length"), int),
            rms_norm_eps=gguf.get(key("attention.layer_norm_rms_epsilon"), float),
            rope_theta=gguf.get(key("rope.freq_base"), float, 10000.0),
            rotary_dim=gguf.get(key("rope.dimension_count"), int, head_dim),
            # A glm4 file with sections has its q and k rows permuted to half-split pairs (formats.md 2.4).
            rope_interleaved=sections is None,
            mrope_section=sections,
            pruned_ffn_layers=_pruned_ffn_layers(gguf),
            attention_mode=_attention_mode(gguf),
            num_parameters=sum(math.prod(t.shape) for t in gguf.tensors.values()),
        )
    except ConfigError as error:
        raise FormatError(f"{gguf.path}: {error}") from None


def _vocab_size(gguf: GGUFFile, hidden: int) -> int:
    info = gguf.tensors.get(TOKEN_TABLE)
    if info is None or len(info.shape) != 2 or info.shape[1] != hidden:
        got = "missing" if info is None else f"of shape {list(info.shape)}"
        raise FormatError(f"{gguf.path}: tensor token_embd.weight is {got}, expected [vocabulary, {hidden}]")
    return info.shape[0]


def _mrope_section(gguf: GGUFFile, arch: str) -> tuple[int, int, int] | None:
    values = gguf.get(f"{arch}.rope.dimension_sections", list, [])
    if not values:
        return None
    if len(values) not in (3, 4) or not all(isinstance(v, int) and 0 <= v < 1 << 16 for v in values):
        raise FormatError(f"{gguf.path}: {arch}.rope.dimension_sections must hold 3 or 4 counts of rotary pairs")
    return (values[0], values[1], values[2]) if values[0] > 0 and values[1] > 0 else None


def _refuse_rope_scaling(gguf: GGUFFile, arch: str) -> None:
    kind = gguf.get(f"{arch}.rope.scaling.type", str, "none")
    if kind != "none":
        raise FormatError(f"{gguf.path}: rotary scaling {kind[:20]!r} is not supported; expected none")


def _attention_mode(gguf: GGUFFile) -> str:
    mode = gguf.get("autoglm.attention_mode", str, "causal")
    if mode not in ATTENTION_MODES:
        raise FormatError(
            f"{gguf.path}: attention mode {mode[:20]!r} is not supported; "
            f"this build runs {' and '.join(ATTENTION_MODES)}"
        )
    return mode


def _pruned_ffn_layers(gguf: GGUFFile) -> tuple[int, ...]:
    values = gguf.get("autoglm.pruned_ffn_layers", list, [])
    if not all(type(value) is int for value in values):
        raise FormatError(f"{gguf.path}: autoglm.pruned_ffn_layers must hold layer numbers")
    return tuple(values)


def check_sizes(gguf: GGUFFile, config: object, *names: str) -> None:
    """Raises FormatError naming a field of `config` that is no possible size."""
    for name in names:
        if not 1 <= getattr(config, name) <= 1 << 20:
            raise FormatError(f"{gguf.path}: {name} of an encoder is {getattr(config, name)}, which cannot be")


class Embedding(Struct, frozen=True):
    """The token table as it lies in the file; rows are dequantized as they are looked up."""

    data: NDArray[np.uint8]
    type: GGMLType


class WeightReader:
    """Hands out the tensors of one file, each once, checking every shape; finish() proves none was left over.

    Matrices are read and repacked by native threads after they were handed out. What computes with one waits for it;
    wait() waits for all of them and tells how far they are, stop() gives up those still to come.

    in_floats  quantized matrices are unpacked to f32, see runs_in_floats
    """

    def __init__(
        self, gguf: GGUFFile, runtime: Runtime, progress: Progress | None = None, *, in_floats: bool = False
    ) -> None:
        self.gguf = gguf
        self.runtime = runtime
        self._in_floats = in_floats
        self._progress = progress or (lambda done, total: None)
        self._used: set[str] = set()
        self._matrices = WeightLoader(runtime, gguf.fileno())
        self._other_bytes = 0  # done with: vectors, and what is only mapped
        self._total_bytes = sum(t.nbytes for t in gguf.tensors.values())
        self._report()

    def has(self, name: str) -> bool:
        return name in self.gguf.tensors

    def vector(self, name: str, size: int) -> Vector:
        """A norm weight or bias as f32 [size]."""
        info = self._info(name, (size,))
        return dequantize(self._bytes(info), int(info.type), size)

    def optional_vector(self, name: str, size: int) -> Vector | None:
        return self.vector(name, size) if self.has(name) else None

    def array(self, name: str, shape: tuple[int, ...]) -> Vector:
        """A convolution's kernel or a table as f32 of `shape`."""
        info = self._info(name, shape)
        values = dequantize(self._bytes(info), int(info.type), math.prod(shape))
        return values.reshape(shape)

    def rows(self, name: str) -> int:
        """Rows of a matrix whose size no key tells; 0 if it is not there."""
        info = self.gguf.tensors.get(name)
        return info.shape[0] if info is not None else 0

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """A whole matrix [rows, cols], repacked."""
        return self.split_matrix(name, [rows], cols)[0]

    def split_matrix(self, name: str, rows: list[int], cols: int) -> list[Matrix]:
        """A fused matrix [sum(rows), cols] as one repacked matrix per entry of rows, from the top down."""
        info = self._info(name, (sum(rows), cols))
        parts, offset = [], info.offset
        for count in rows:
            parts.append(self._matrices.read(offset, int(info.type), count, cols, self._in_floats))
            offset += count * row_bytes(info.type, cols)
        return parts

    def embedding(self, name: str, vocab: int, width: int) -> Embedding:
        info = self._info(name, (vocab, width))
        self._other_bytes += info.nbytes
        return Embedding(self.gguf.data(name), info.type)

    def ignore(self, prefix: str) -> None:
        """Tensors that are known and not needed."""
        self._used.update(name for name in self.gguf.tensors if name.startswith(prefix))

    def finish(self) -> None:
        left = sorted(set(self.gguf.tensors) - self._used)
        if left:
            raise FormatError(
                f"{self.gguf.path}: {len(left)} tensors belong to no known part of the model, the first is "
                f"{left[0][:80]!r}; the file needs a newer autoglm or is of another architecture"
            )

    def wait(self) -> None:
        """Until all matrices handed out are there; progress is told of it. Raises FormatError if the file gives out."""
        try:
            while not self._matrices.wait(_REPORT_S):
                self._report()
        except (EOFError, OSError) as error:
            raise self._unreadable(error) from None
        self._report()

    def stop(self) -> None:
        """Give up what was not read yet; returns when nothing is read any more."""
        self._matrices.stop()

    def _bytes(self, info: TensorInfo) -> NDArray[np.uint8]:
        """A small tensor's bytes, read and not mapped: a file cut short meanwhile is an error and not a signal."""
        self._other_bytes += info.nbytes
        try:
            data = os.pread(self.gguf.fileno(), info.nbytes, info.offset)
        except OSError as error:
            raise self._unreadable(error) from None
        if len(data) < info.nbytes:
            raise self._unreadable(EOFError())
        return np.frombuffer(data, np.uint8)

    def _unreadable(self, error: EOFError | OSError) -> FormatError:
        if isinstance(error, EOFError):
            what = "became shorter while it was read; let nothing write to it, or fetch it again"
        else:
            what = f"cannot be read ({error.strerror}); check the disk, or fetch it again"
        return FormatError(f"{self.gguf.path}: {what}")

    def _report(self) -> None:
        # A tied token table counts twice.
        self._progress(min(self._matrices.done_bytes + self._other_bytes, self._total_bytes), self._total_bytes)

    def _info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self.gguf.tensors.get(name)
        if info is None:
            raise FormatError(f"{self.gguf.path}: tensor {name} is missing; the file is incomplete, fetch it again")
        if info.shape != shape:
            raise FormatError(
                f"{self.gguf.path}: tensor {name} has shape {list(info.shape)}, expected {list(shape)} by the header"
            )
        self._used.add(name)
        return info
