"""GLM-4.1V's image encoder: patches of 14 x 14 pixels -> one decoder token for each 2 x 2 of them.

RMS(x, w) as in text.py, rows in the order of their 2 x 2 blocks:

    e  = RMS((K0 + K1) patch + b, norm_embd) + P          P: learned positions, resampled to the picture's grid
    e += Wo Attn(RMS(e, ln1)); e += Wd (silu(Wg y) * Wu y), y = RMS(e, ln2)      24 times
    m  = Wm [e(0,0) e(0,1) e(1,0) e(1,1)] + b, e = RMS(e, post_ln)
    t  = Wd' (silu(Wg' u) * Wu' u),  u = gelu(LN(fc m))

Attn sees the whole picture, scale 1/sqrt(head), with a rotary embedding of two axes: the first half of the pairs
(i, i + head/2) turns by the patch's row, the second by its column. A still picture fills both frames that the two
kernels were made for, so they are added once. Source: GLM-4.1V technical report (arXiv:2507.01006) and the facts of
its GGUF form.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoglm.errors import FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.formats.quant_types import FLOAT_TYPES
from autoglm.kernels import Matrix, Program, Runtime
from autoglm.media.prompt_media import Encoding
from autoglm.model.encoder import KeepLast, beside, key_value_room, resampled, run_slices, start_whole
from autoglm.model.layers import float_matrix, i16_matrix
from autoglm.model.loader import Vector, WeightReader, check_sizes

_MERGE = 2
_ROPE_THETA = 10000.0
MERGED_AT_ONCE = 276  # rows of the merger: more would read its weights less often, and take memory beside the tower's
_MERGER_NORM_EPS = 1e-5  # of torch's LayerNorm; the file has a key for the RMS norms only


@dataclass(frozen=True)
class Glm4vVisionConfig:
    """Sizes of the encoder. position_grid counts the learned positions along one side."""

    hidden_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    position_grid: int
    merger_size: int
    text_size: int
    rms_norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def read_glm4v_config(gguf: GGUFFile) -> Glm4vVisionConfig:
    """The encoder's sizes from the header. Raises FormatError naming the key that is missing or impossible."""
    config = Glm4vVisionConfig(
        hidden_size=gguf.get("clip.vision.embedding_length", int),
        num_layers=gguf.get("clip.vision.block_count", int),
        num_heads=gguf.get("clip.vision.attention.head_count", int),
        patch_size=gguf.get("clip.vision.patch_size", int),
        position_grid=gguf.get("clip.vision.image_size", int) // max(1, gguf.get("clip.vision.patch_size", int)),
        merger_size=gguf.get("clip.vision.feed_forward_length", int),
        text_size=gguf.get("clip.vision.projection_dim", int),
        rms_norm_eps=gguf.get("clip.vision.attention.layer_norm_epsilon", float),
    )
    if gguf.get("clip.vision.spatial_merge_size", int, _MERGE) != _MERGE:
        raise FormatError(f"{gguf.path}: clip.vision.spatial_merge_size must be {_MERGE} for projector type glm4v")
    check_sizes(
        gguf,
        config,
        "hidden_size",
        "num_layers",
        "num_heads",
        "patch_size",
        "position_grid",
        "merger_size",
        "text_size",
    )
    if config.hidden_size % config.num_heads or config.head_dim % 16 or config.head_dim > 256:
        raise FormatError(
            f"{gguf.path}: image encoder heads of {config.hidden_size} / {config.num_heads} channels are not "
            "supported; expected a multiple of 16 up to 256"
        )
    return config


@dataclass(frozen=True)
class _Block:
    ln1: Vector
    qkv: list[Matrix]
    qkv_bias: list[Vector | None]
    out: Matrix
    ln2: Vector
    gate: Matrix
    up: Matrix
    down: Matrix


class _Programs(NamedTuple):
    """Tower and merger for one grid of patches, and their buffers; learned positions are in place."""

    tower: Program
    patches: int
    places: NDArray[np.int32]  # [3, num_patches]: 0, row, column
    features: int
    merger: Program
    merged: int
    tokens: int


class Glm4vVision:
    """The encoder and its merger, weights read."""

    def __init__(self, runtime: Runtime, reader: WeightReader, config: Glm4vVisionConfig) -> None:
        self.config = config
        self._runtime = runtime
        width, text, size = config.hidden_size, config.text_size, config.patch_size
        kernel = sum(
            reader.array(name, (width, 3, size, size)) for name in ("v.patch_embd.weight", "v.patch_embd.weight.1")
        )
        assert isinstance(kernel, np.ndarray)
        self._blocks = [_read_block(reader, config, index) for index in range(config.num_layers)]
        # Where products are in whole numbers attention may be too, and the kernels; float weights keep every digit.
        self._in_floats = self._blocks[0].qkv[0].type_id in FLOAT_TYPES
        pack = float_matrix if self._in_floats else i16_matrix
        self._patch = pack(runtime, kernel.reshape(width, -1))
        self._patch_bias = reader.vector("v.patch_embd.bias", width)
        self._norm_embd = reader.vector("v.norm_embd.weight", width)
        grid = config.position_grid
        self._positions = reader.array("v.position_embd.weight", (grid * grid, width)).reshape(grid, grid, width)
        self._post_ln = reader.vector("v.post_ln.weight", width)
        # [text, width, dy, dx] -> columns in the order in which four rows of one block lie: dy, dx, width
        downsample = reader.array("mm.patch_merger.weight", (text, width, _MERGE, _MERGE))
        self._downsample = pack(runtime, downsample.transpose(0, 2, 3, 1).reshape(text, -1))
        self._downsample_bias = reader.vector("mm.patch_merger.bias", text)
        self._fc = reader.matrix("mm.model.fc.weight", text, text)
        self._merger_norm = tuple(reader.vector(f"mm.post_norm.{part}", text) for part in ("weight", "bias"))
        self._gate, self._up = (reader.matrix(f"mm.{part}.weight", config.merger_size, text) for part in ("gate", "up"))
        self._down = reader.matrix("mm.down.weight", text, config.merger_size)
        self._programs = KeepLast(self._build)

    def encode(
        self, read_patches: Callable[[], NDArray[np.float32]], rows: int, columns: int, slice_s: float = math.inf
    ) -> Encoding:
        """What read_patches gives, f32 [rows * columns, 3 * size^2] in 2 x 2 block order -> a quarter as many tokens
        [n, text].

        A generator: it gives way after every slice_s seconds and returns the tokens. Patches and positions of a large
        picture are hundreds of MB and ms, so they are made beside it.
        """
        programs = yield from beside(lambda: self._started(read_patches(), rows, columns), slice_s)
        yield from run_slices(programs.tower, slice_s)
        tokens = yield from self._merge(programs, slice_s)
        self._programs.give_back((rows, columns), programs)
        return tokens

    def _started(self, patches: NDArray[np.float32], rows: int, columns: int) -> _Programs:
        programs = self._programs.take((rows, columns))
        programs.tower.view(programs.patches)[:, : patches.shape[1]] = patches
        start_whole(programs.tower, len(patches), programs.places)
        return programs

    def _merge(self, programs: _Programs, slice_s: float) -> Encoding:
        """The tower's features [n * 4, width] -> tokens [n, text]."""
        features, merger = programs.tower.view(programs.features), programs.merger
        four, num_tokens = _MERGE**2, len(features) // _MERGE**2
        result = np.empty((num_tokens, self.config.text_size), np.float32)
        passes = -(-num_tokens // MERGED_AT_ONCE)
        for start, end in itertools.pairwise(num_tokens * i // passes for i in range(passes + 1)):
            count = end - start
            merger.view(programs.merged)[:count] = features[four * start : four * end].reshape(count, -1)
            start_whole(merger, count)
            yield from run_slices(merger, slice_s)
            result[start:end] = merger.view(programs.tokens)[:count]
        return result

    def _build(self, grid: tuple[int, int]) -> _Programs:
        rows, columns = grid
        block_order = np.arange(rows * columns).reshape(rows // _MERGE, _MERGE, columns // _MERGE, _MERGE)
        block_order = block_order.transpose(0, 2, 1, 3).ravel()
        tower, patches, positions, features = self._tower(rows * columns)
        tower.view(positions)[:] = resampled(self._positions, rows, columns).reshape(rows * columns, -1)[block_order]
        places = np.zeros((3, rows * columns), np.int32)
        places[1:] = np.divmod(block_order, columns)
        return _Programs(
            tower, patches, places, features, *self._merger(min(rows * columns // _MERGE**2, MERGED_AT_ONCE))
        )

    def _tower(self, num_patches: int) -> tuple[Program, int, int, int]:
        """The 24 blocks for one size of picture; the buffers of patches, of positions and of features."""
        config, eps = self.config, self.config.rms_norm_eps
        width, half = config.hidden_size, config.head_dim // 2
        program = Program(self._runtime, num_patches)
        frequencies = _ROPE_THETA ** -(np.arange(0, half, 2, dtype=np.float64) / half)
        rope = (False, (0, half // 2, half - half // 2), config.head_dim)
        angles = np.concatenate([frequencies, frequencies]).astype(np.float32)
        if self._in_floats:
            room = key_value_room(num_patches, config.num_heads, config.head_dim)
            program.set_attention(room, config.num_heads, config.head_dim, *rope, angles)
        else:
            program.set_full_attention(config.num_heads, config.head_dim, *rope, angles)
        patches, pixels = program.buffer(self._patch.cols), program.activation(self._patch.cols)
        x, places = program.buffer(width), program.buffer(width)
        qkv, heads = program.buffer(3 * width), program.buffer(width)
        mlp_size = self._blocks[0].gate.rows
        normed, attended, gated = program.activation(width), program.activation(width), program.activation(mlp_size)

        program.quantize(patches, pixels)
        program.linear(pixels, [self._patch], x, biases=[self._patch_bias])
        program.normalize(x, x, self._norm_embd, eps)
        branch: int | None = places
        for block in self._blocks:
            program.norm(x, normed, block.ln1, eps, branch=branch)
            branch = None
            program.linear(normed, block.qkv, qkv, biases=block.qkv_bias)
            if self._in_floats:
                program.rope_cache(qkv, 0)
                program.attention(qkv, 0, heads)
            else:
                program.full_attention(qkv, heads)
            program.quantize(heads, attended)
            program.linear(attended, [block.out], x, accumulate=True)
            program.norm(x, normed, block.ln2, eps)
            program.gated_mlp(normed, block.gate, block.up, gated)
            program.linear(gated, [block.down], x, accumulate=True)
        program.normalize(x, x, self._post_ln, eps)
        program.result(x)
        return program, patches, places, x

    def _merger(self, num_tokens: int) -> tuple[Program, int, int]:
        """Four patches -> one decoder token; the buffers of the patches and of the tokens."""
        text = self.config.text_size
        program = Program(self._runtime, num_tokens)
        blocks, four = program.buffer(self._downsample.cols), program.activation(self._downsample.cols)
        merged, projected, tokens = program.buffer(text), program.buffer(text), program.buffer(text)
        flat, normed = program.activation(text), program.activation(text)
        gated = program.activation(self.config.merger_size)
        program.quantize(blocks, four)
        program.linear(four, [self._downsample], merged, biases=[self._downsample_bias])
        program.quantize(merged, flat)
        program.linear(flat, [self._fc], projected)
        weight, bias = self._merger_norm
        program.normalize(projected, projected, weight, _MERGER_NORM_EPS, bias=bias)
        program.quantize(projected, normed, gelu=True)
        program.gated_mlp(normed, self._gate, self._up, gated)
        program.linear(gated, [self._down], tokens)
        program.result(tokens)
        return program, blocks, tokens


def _read_block(reader: WeightReader, config: Glm4vVisionConfig, index: int) -> _Block:
    width = config.hidden_size

    def name(part: str) -> str:
        return f"v.blk.{index}.{part}"

    if reader.has(name("attn_qkv.weight")):
        qkv = [reader.matrix(name("attn_qkv.weight"), 3 * width, width)]
        bias = [reader.optional_vector(name("attn_qkv.bias"), 3 * width)]
    else:
        qkv = [reader.matrix(name(f"attn_{part}.weight"), width, width) for part in "qkv"]
        bias = [reader.optional_vector(name(f"attn_{part}.bias"), width) for part in "qkv"]
    mlp_size = reader.rows(name("ffn_gate.weight"))
    gate, up = (reader.matrix(name(f"{part}.weight"), mlp_size, width) for part in ("ffn_gate", "ffn_up"))
    return _Block(
        ln1=reader.vector(name("ln1.weight"), width),
        qkv=qkv,
        qkv_bias=bias,
        out=reader.matrix(name("attn_out.weight"), width, width),
        ln2=reader.vector(name("ln2.weight"), width),
        gate=gate,
        up=up,
        down=reader.matrix(name("ffn_down.weight"), width, mlp_size),
    )
