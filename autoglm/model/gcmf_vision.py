"""Our image encoder: pixels -> patches of 16 x 16 -> one decoder token for each 2 x 2 of them.

Dosovitskiy et al. 2020 with a convolutional stem (Xiao et al. 2021) or a linear embedding of patches, by the file:

    z  = stem(pixels) + P               P: learned positions, resampled to the picture's grid
    z += Wo Attn(LN1(z));  z += Wd gelu(Wu LN2(z))          per block, every patch sees all others
    t  = W2 gelu(W1 LN(concat of 2 x 2 LN_post(z)))         concatenated (0,0) (0,1) (1,0) (1,1)

The training twin is train/model/vision.py; names and shapes of tensors are in docs/format.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoglm.errors import FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.kernels import Program
from autoglm.media.prompt_media import Encoding
from autoglm.model.encoder import key_value_room, resampled, run_slices, start_whole
from autoglm.model.layers import (
    Convolution,
    LayerNorm,
    Linear,
    Projector,
    float_matrix,
    read_layer_norm,
    read_linear,
    relu,
)
from autoglm.model.loader import WeightReader, check_sizes

_STEM_STRIDES = (2, 2, 2, 1, 1, 2)  # those of stride 1 are residual


@dataclass(frozen=True)
class GcmfVisionConfig:
    """Sizes of the encoder. position_grid: (rows, columns) of learned positions; stem_channels: () without a stem."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    patch_size: int
    merge_size: int
    position_grid: tuple[int, int]
    stem_channels: tuple[int, ...]
    projector_size: int
    text_size: int
    layer_norm_eps: float
    max_pixels: int


def read_gcmf_vision_config(gguf: GGUFFile) -> GcmfVisionConfig:
    """The encoder's sizes from the header. Raises FormatError naming the key that is missing or impossible."""
    grid = gguf.get("gcmf.vision.position_grid", list)
    channels = gguf.get("gcmf.vision.stem_channels", list, [])
    if len(grid) != 2 or len(channels) not in (0, 3) or not all(type(n) is int and n > 0 for n in [*grid, *channels]):
        raise FormatError(f"{gguf.path}: gcmf.vision.position_grid must hold 2 counts, stem_channels 3 or none")
    config = GcmfVisionConfig(
        hidden_size=gguf.get("clip.vision.embedding_length", int),
        num_layers=gguf.get("clip.vision.block_count", int),
        num_heads=gguf.get("clip.vision.attention.head_count", int),
        mlp_size=gguf.get("clip.vision.feed_forward_length", int),
        patch_size=gguf.get("clip.vision.patch_size", int),
        merge_size=gguf.get("clip.vision.spatial_merge_size", int),
        position_grid=(grid[0], grid[1]),
        stem_channels=tuple(channels),
        projector_size=gguf.get("gcmf.projector_length", int),
        text_size=gguf.get("clip.vision.projection_dim", int),
        layer_norm_eps=gguf.get("clip.vision.attention.layer_norm_epsilon", float),
        max_pixels=gguf.get("clip.vision.image_max_pixels", int),
    )
    check_sizes(
        gguf,
        config,
        "hidden_size",
        "num_layers",
        "num_heads",
        "mlp_size",
        "patch_size",
        "merge_size",
        "projector_size",
        "text_size",
    )
    head = config.hidden_size / config.num_heads
    if head % 16 or head > 256:
        raise FormatError(f"{gguf.path}: image encoder heads of {head:g} channels; expected a multiple of 16 up to 256")
    if channels and config.patch_size != 16:
        raise FormatError(f"{gguf.path}: a convolutional stem makes patches of 16 pixels, not {config.patch_size}")
    return config


@dataclass(frozen=True)
class _Block:
    ln1: LayerNorm
    qkv: Linear
    out: Linear
    ln2: LayerNorm
    up: Linear
    down: Linear


class GcmfVision:
    """The encoder and its projector, weights read."""

    def __init__(self, reader: WeightReader, config: GcmfVisionConfig) -> None:
        self.config = config
        self._runtime = reader.runtime
        width, eps = config.hidden_size, config.layer_norm_eps
        if config.stem_channels:
            first, second, third = config.stem_channels
            widths = (3, first, second, third, third, third, width)
            self._stem = [
                Convolution(reader, f"v.conv_stem.{index}", (widths[index + 1], widths[index], 3, 3), stride)
                for index, stride in enumerate(_STEM_STRIDES)
            ]
        else:
            size = config.patch_size
            kernel = reader.array("v.patch_embd.weight", (width, 3, size, size))
            self._patch_embed = Linear(
                reader.runtime,
                float_matrix(reader.runtime, kernel.reshape(width, -1)),
                reader.vector("v.patch_embd.bias", width),
            )
            self._stem = []
        rows, columns = config.position_grid
        self._positions = reader.array("v.position_embd.weight", (rows * columns, width)).reshape(rows, columns, width)
        self._blocks = [self._read_block(reader, index) for index in range(config.num_layers)]
        self._post_norm = read_layer_norm(reader, "v.post_ln", width, eps)
        merged = width * config.merge_size**2
        self._projector = Projector(
            read_layer_norm(reader, "mm.input_norm", merged, eps),
            read_linear(reader, "mm.0", config.projector_size, merged),
            read_linear(reader, "mm.2", config.text_size, config.projector_size),
        )

    def _read_block(self, reader: WeightReader, index: int) -> _Block:
        width, mlp, eps = self.config.hidden_size, self.config.mlp_size, self.config.layer_norm_eps
        name = f"v.blk.{index}."
        return _Block(
            ln1=read_layer_norm(reader, name + "ln1", width, eps),
            qkv=read_linear(reader, name + "attn_qkv", 3 * width, width),
            out=read_linear(reader, name + "attn_out", width, width),
            ln2=read_layer_norm(reader, name + "ln2", width, eps),
            up=read_linear(reader, name + "ffn_up", mlp, width),
            down=read_linear(reader, name + "ffn_down", width, mlp),
        )

    def encode(self, pixels: NDArray[np.float32], slice_s: float = math.inf) -> Encoding:
        """Pixels f32 [3, H, W] in -1..1, sides multiples of 32 (patch * merge) -> tokens f32 [H/32 * W/32, text].

        A generator: it gives way after every slice_s seconds and returns the tokens.
        """
        width, merge = self.config.hidden_size, self.config.merge_size
        x = yield from self._embed(pixels)
        rows, columns = x.shape[:2]
        x = x + resampled(self._positions, rows, columns)
        program, buffer = self._transformer(rows * columns)
        program.view(buffer)[:] = x.reshape(rows * columns, width)
        start_whole(program, rows * columns)
        yield from run_slices(program, slice_s)
        grid = program.view(buffer).reshape(rows // merge, merge, columns // merge, merge, width)
        yield
        return self._projector(grid.transpose(0, 2, 1, 3, 4).reshape(-1, merge * merge * width))

    def _embed(self, pixels: NDArray[np.float32]) -> Encoding:
        """[3, H, W] -> [rows, columns, width] of patches; gives way after every convolution."""
        if self._stem:
            x: NDArray[np.float32] = pixels.transpose(1, 2, 0)
            for convolution, stride in zip(self._stem, _STEM_STRIDES, strict=True):
                y = convolution(x)
                x = relu(x + y if stride == 1 else y)
                yield
            return x
        size = self.config.patch_size
        rows, columns = pixels.shape[1] // size, pixels.shape[2] // size
        patches = pixels.reshape(3, rows, size, columns, size).transpose(1, 3, 0, 2, 4)
        result: NDArray[np.float32] = self._patch_embed(patches.reshape(rows * columns, -1)).reshape(rows, columns, -1)
        return result

    def _transformer(self, num_patches: int) -> tuple[Program, int]:
        """All blocks for one size of picture, and the buffer that holds the patches before and after."""
        config = self.config
        width, heads = config.hidden_size, config.num_heads
        program = Program(self._runtime, num_patches)
        room = key_value_room(num_patches, heads, width // heads)
        # Turned by no angle: positions were added.
        program.set_attention(room, heads, 2, False, (1, 0, 0), width // heads, np.zeros(1, np.float32))
        x, qkv, attended = program.buffer(width), program.buffer(3 * width), program.buffer(width)
        hidden, bent = program.buffer(config.mlp_size), program.activation(config.mlp_size)
        normed, flat = program.activation(width), program.activation(width)
        for block in self._blocks:
            program.layer_norm(x, normed, block.ln1.weight, block.ln1.bias, block.ln1.eps)
            program.linear(normed, [block.qkv.weight], qkv, biases=[block.qkv.bias])
            program.rope_cache(qkv, 0)
            program.attention(qkv, 0, attended)
            program.quantize(attended, flat)
            program.linear(flat, [block.out.weight], x, biases=[block.out.bias], accumulate=True)
            program.layer_norm(x, normed, block.ln2.weight, block.ln2.bias, block.ln2.eps)
            program.linear(normed, [block.up.weight], hidden, biases=[block.up.bias])
            program.quantize(hidden, bent, gelu=True)
            program.linear(bent, [block.down.weight], x, biases=[block.down.bias], accumulate=True)
        program.normalize(x, x, self._post_norm.weight, self._post_norm.eps, bias=self._post_norm.bias)
        program.result(x)
        return program, x
