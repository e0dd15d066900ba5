"""Our audio encoder: log-mel frames -> one decoder token per 40 ms.

Gulati et al. 2020 (Conformer) with a convolutional stem or the paper's two convolutions, as the file has it:

    x  = stem(mel)
    x += 1/2 FFN(x);  x += Wo Attn(LN1(x));  x += W2 silu(LN(dw(GLU(W1 LN(x)))));  x = LN2(x + 1/2 FFN'(x))

Attention scores are (q_i + u) k_j + (q_i + v) W_pos R(i - j) with sinusoids R of the distance (Dai et al. 2019). Since
sin(i - j) and cos(i - j) are sums of products of sin and cos of i and of j, the second term is a product of something
of i alone and [cos j, sin j]: keys grow by these numbers, and ordinary fused attention does it without a table of
distances. The training twin is train/model/audio.py; names and shapes of tensors are in docs/format.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoglm.errors import FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.media.prompt_media import Encoding
from autoglm.model.layers import (
    Convolution,
    LayerNorm,
    Linear,
    Projector,
    attend,
    read_layer_norm,
    read_linear,
    relu,
    sigmoid,
    silu,
)
from autoglm.model.loader import Vector, WeightReader, check_sizes

_STEM_KERNEL = 5
_HALF = np.float32(0.5)


@dataclass(frozen=True)
class GcmfAudioConfig:
    """Sizes of the encoder. stem_residuals: 0 with the two 2-D convolutions of subsample_channels."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    kernel_size: int
    num_mels: int
    stem_residuals: int
    subsample_channels: int
    projector_size: int
    text_size: int
    layer_norm_eps: float
    max_seconds: int


def read_gcmf_audio_config(gguf: GGUFFile) -> GcmfAudioConfig:
    """The encoder's sizes from the header. Raises FormatError naming the key that is missing or impossible."""
    config = GcmfAudioConfig(
        hidden_size=gguf.get("clip.audio.embedding_length", int),
        num_layers=gguf.get("clip.audio.block_count", int),
        num_heads=gguf.get("clip.audio.attention.head_count", int),
        mlp_size=gguf.get("clip.audio.feed_forward_length", int),
        kernel_size=gguf.get("clip.audio.conv_kernel_size", int),
        num_mels=gguf.get("clip.audio.num_mel_bins", int),
        stem_residuals=gguf.get("gcmf.audio.stem_residuals", int, 0),
        subsample_channels=gguf.get("gcmf.audio.subsample_channels", int, 0),
        projector_size=gguf.get("gcmf.projector_length", int),
        text_size=gguf.get("clip.audio.projection_dim", int),
        layer_norm_eps=gguf.get("clip.audio.attention.layer_norm_epsilon", float),
        max_seconds=gguf.get("gcmf.audio.max_seconds", int),
    )
    check_sizes(
        gguf, config, "hidden_size", "num_layers", "num_heads", "mlp_size", "kernel_size", "projector_size", "text_size"
    )
    if bool(config.stem_residuals) == bool(config.subsample_channels):
        raise FormatError(
            f"{gguf.path}: the audio encoder needs either gcmf.audio.stem_residuals or subsample_channels"
        )
    head = config.hidden_size / config.num_heads + config.hidden_size
    if config.hidden_size % (2 * config.num_heads) or head % 16 or head > 256:
        raise FormatError(
            f"{gguf.path}: an audio encoder of {config.num_heads} heads over {config.hidden_size} channels is not "
            "supported; channels and one head's share must sum to a multiple of 16 up to 256"
        )
    return config


@dataclass(frozen=True)
class _FeedForward:
    norm: LayerNorm
    up: Linear
    down: Linear

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.down(silu(self.up(self.norm(x))))


class _Attention:
    """Self-attention with relative positions: [T, D] -> [T, D]."""

    def __init__(self, reader: WeightReader, name: str, config: GcmfAudioConfig) -> None:
        width, heads = config.hidden_size, config.num_heads
        self._runtime, self._num_heads = reader.runtime, heads
        self._norm = read_layer_norm(reader, name + "ln1", width, config.layer_norm_eps)
        self._q, self._k, self._v, self._out = (
            read_linear(reader, f"{name}attn_{part}", width, width) for part in ("q", "k", "v", "out")
        )
        # Half of its columns multiply the sines, half the cosines: [heads, head, width / 2] each.
        position = reader.array(f"{name}linear_pos.weight", (width, width)).reshape(heads, -1, 2, width // 2)
        self._sines, self._cosines = position[:, :, 0], position[:, :, 1]
        self._u, self._v_bias = (
            reader.array(f"{name}pos_bias_{letter}", (heads, width // heads)) for letter in ("u", "v")
        )

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        length, width = x.shape
        heads, size = self._num_heads, width // self._num_heads
        y = self._norm(x)
        q, k, v = (part(y).reshape(length, heads, size) for part in (self._q, self._k, self._v))
        frequency = 10000.0 ** (-np.arange(0, width, 2) / width)
        angle = np.arange(length)[:, None] * frequency
        sin, cos = (f(angle).astype(np.float32)[:, None] for f in (np.sin, np.cos))
        of_sines, of_cosines = (np.einsum("ihd,hdf->ihf", q + self._v_bias, m) for m in (self._sines, self._cosines))
        queries = [q + self._u, of_sines * sin + of_cosines * cos, of_cosines * sin - of_sines * cos]
        keys = [k, np.broadcast_to(cos, of_sines.shape), np.broadcast_to(sin, of_sines.shape)]
        scale = np.float32(size**-0.5)
        values = np.concatenate([v, np.zeros((length, heads, width), np.float32)], axis=2)
        attended = attend(self._runtime, np.concatenate(queries, axis=2) * scale, np.concatenate(keys, axis=2), values)
        return self._out(attended[:, :, :size].reshape(length, width))


class _ConvolutionModule:
    """Pointwise, GLU, depthwise over time, norm, silu, pointwise: [T, D] -> [T, D]."""

    def __init__(self, reader: WeightReader, name: str, config: GcmfAudioConfig) -> None:
        width, eps = config.hidden_size, config.layer_norm_eps
        self._norm = read_layer_norm(reader, name + "norm_conv", width, eps)
        self._first = read_linear(reader, name + "conv_pw1", 2 * width, width)
        self._kernel: Vector = reader.array(f"{name}conv_dw.weight", (width, 1, config.kernel_size))[:, 0].T
        self._bias = reader.vector(f"{name}conv_dw.bias", width)
        self._inner_norm = read_layer_norm(reader, name + "conv_norm", width, eps)
        self._second = read_linear(reader, name + "conv_pw2", width, width)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        length, width = x.shape
        both = self._first(self._norm(x))
        gated = both[:, :width] * sigmoid(both[:, width:])
        taps = len(self._kernel)
        padded = np.pad(gated, ((taps // 2, taps // 2), (0, 0)))
        y = sum(padded[tap : tap + length] * self._kernel[tap] for tap in range(taps)) + self._bias
        return self._second(silu(self._inner_norm(np.asarray(y, np.float32))))


@dataclass(frozen=True)
class _Block:
    ffn1: _FeedForward
    attention: _Attention
    convolution: _ConvolutionModule
    ffn2: _FeedForward
    out_norm: LayerNorm

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        x = x + _HALF * self.ffn1(x)
        x = x + self.attention(x)
        x = x + self.convolution(x)
        return self.out_norm(x + _HALF * self.ffn2(x))


class GcmfAudio:
    """The encoder and its projector, weights read."""

    def __init__(self, reader: WeightReader, config: GcmfAudioConfig) -> None:
        self.config = config
        width = config.hidden_size
        if config.stem_residuals:
            widths = [config.num_mels, *[width] * (config.stem_residuals + 2)]
            self._stem = [
                Convolution(reader, f"a.conv_stem.{i}", (b, a, _STEM_KERNEL), 2 if i < 2 else 1)
                for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
            ]
        else:
            channels = config.subsample_channels
            self._stem = [
                Convolution(reader, f"a.conv2d.{i}", (channels, before, 3, 3), 2)
                for i, before in enumerate((1, channels))
            ]
            self._subsampled = read_linear(reader, "a.pre_encode.out", width, channels * ((config.num_mels + 3) // 4))
        self._blocks = [self._read_block(reader, index) for index in range(config.num_layers)]
        self._projector = Projector(
            read_layer_norm(reader, "mm.a.norm_pre", width, config.layer_norm_eps),
            read_linear(reader, "mm.a.mlp.1", config.projector_size, width),
            read_linear(reader, "mm.a.mlp.2", config.text_size, config.projector_size),
        )

    def _read_block(self, reader: WeightReader, index: int) -> _Block:
        config, name = self.config, f"a.blk.{index}."

        def feed_forward(ending: str) -> _FeedForward:
            width, mlp = config.hidden_size, config.mlp_size
            return _FeedForward(
                read_layer_norm(reader, f"{name}ffn_norm{ending}", width, config.layer_norm_eps),
                read_linear(reader, f"{name}ffn_up{ending}", mlp, width),
                read_linear(reader, f"{name}ffn_down{ending}", width, mlp),
            )

        return _Block(
            feed_forward(""),
            _Attention(reader, name, config),
            _ConvolutionModule(reader, name, config),
            feed_forward("_1"),
            read_layer_norm(reader, name + "ln2", config.hidden_size, config.layer_norm_eps),
        )

    def encode(self, mel: NDArray[np.float32]) -> Encoding:
        """Log-mel f32 [T, mels] -> tokens f32 [T / 4, text]. A generator: it gives way after every layer."""
        x = mel
        if self.config.stem_residuals:
            for index, convolution in enumerate(self._stem):
                x = relu(convolution(x) if index < 2 else x + convolution(x))
                yield
        else:
            x = x[:, :, None]
            for convolution in self._stem:
                x = relu(convolution(x))
                yield
            x = self._subsampled(x.transpose(0, 2, 1).reshape(len(x), -1))  # flattened channel, bin
        for block in self._blocks:
            x = block(x)
            yield
        return self._projector(x)
