"""Conformer audio encoder: log-mel frames -> one feature vector per 40 ms.

Gulati et al. 2020, "Conformer: Convolution-augmented Transformer for Speech Recognition", section 2:

    x  = Linear(conv(relu(conv(mel))))               two 3 x 3 convolutions of stride 2: a quarter of the frames
    x1 = x  + 1/2 FFN(x)                             FFN(x) = W2 swish(W1 LN(x))
    x2 = x1 + MHSA(LN(x1))                           relative positions of Dai et al. 2019 (Transformer-XL), eq. 3:
                                                     score(i,j) = (q_i + u)·k_j + (q_i + v)·(R_{i-j} W_r)
    x3 = x2 + Conv(x2)                               pointwise, GLU, depthwise, norm, swish, pointwise
    y  = LN(x3 + 1/2 FFN(x3))

The nano presets put a deeper convolutional stem (stem.py) in the place of the two convolutions.
The norm inside the convolution module is a LayerNorm, not the paper's BatchNorm: what a sound becomes must not depend
on the sounds that shared its batch.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoglm.train.model.presets import AudioConfig
from autoglm.train.model.stem import AudioStem

Frames = TypeVar("Frames", int, Tensor)


def token_count(frames: Frames) -> Frames:
    """Tokens that `frames` log-mel frames become: two convolutions of kernel 3, stride 2, padding 1."""
    return (frames + 3) // 4


def relative_sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoids R_d for distances d = length-1 down to -(length-1): [2 * length - 1, width]."""
    distance = torch.arange(length - 1, -length, -1, dtype=torch.float32, device=device)
    frequency = torch.exp(torch.arange(0, width, 2, dtype=torch.float32, device=device) * (-math.log(10000.0) / width))
    angle = distance[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class FeedForward(nn.Module):
    """W2 swish(W1 LN(x)): [B, T, D] -> [B, T, D]."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up = nn.Linear(config.hidden_size, config.mlp_size)
        self.down = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.silu(self.up(self.norm(x))))
        return result


class RelativeAttention(nn.Module):
    """Self-attention with relative positions: [B, T, D] -> [B, T, D]; `mask` [B, T] is True on real tokens."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        self.num_heads, self.head_dim = heads, width // heads
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, self.head_dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norm(x)
        q, k, v = (part(y).view(batch, length, self.num_heads, self.head_dim) for part in (self.q, self.k, self.v))
        r = self.pos(relative_sinusoids(length, width, x.device).to(x.dtype)).view(-1, self.num_heads, self.head_dim)
        bias = by_key(torch.einsum("bihd,rhd->bhir", q + self.pos_bias_v, r))
        scale = 1.0 / math.sqrt(self.head_dim)
        bias = (bias * scale).masked_fill(~mask[:, None, None, :], -1e4)
        attended = F.scaled_dot_product_attention(
            (q + self.pos_bias_u).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=scale
        )
        result: Tensor = self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return result


def by_key(scores: Tensor) -> Tensor:
    """Scores by distance [B, H, T, 2T-1] -> by key [B, H, T, T]: row i, key j takes column T-1-i+j.

    Dai et al. 2019, appendix B.
    """
    batch, heads, length, span = scores.shape
    padded = F.pad(scores, (1, 0)).view(batch, heads, span + 1, length)
    return padded[:, :, 1:].reshape(batch, heads, length, span)[..., :length]


class ConvolutionModule(nn.Module):
    """Pointwise, GLU, depthwise, norm, swish, pointwise: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.pointwise1 = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, config.kernel_size, padding=config.kernel_size // 2, groups=width)
        self.inner_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.pointwise2 = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = F.glu(self.pointwise1(self.norm(x)), dim=-1) * mask[..., None]
        y = self.depthwise(y.transpose(1, 2)).transpose(1, 2)
        result: Tensor = self.pointwise2(F.silu(self.inner_norm(y)))
        return result


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, norm."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.ffn1 = FeedForward(config)
        self.attn = RelativeAttention(config)
        self.conv = ConvolutionModule(config)
        self.ffn2 = FeedForward(config)
        self.out_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + 0.5 * self.ffn1(x)
        x = x + self.attn(x, mask)
        x = x + self.conv(x, mask)
        result: Tensor = self.out_norm(x + 0.5 * self.ffn2(x))
        return result


class Subsampling(nn.Module):
    """Two convolutions of stride 2 over time and mel: [B, T, M] -> [B, T/4, D] (sizes rounded up)."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        channels = config.subsample_channels
        self.conv1 = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.out = nn.Linear(channels * ((config.num_mels + 3) // 4), config.hidden_size)

    def forward(self, mel: Tensor, frames: Tensor) -> Tensor:
        x = F.relu(self.conv1(mel[:, None]))
        half = (frames + 1) // 2
        # What stands behind a sound's end must be the zeros that a sound alone would be padded with.
        x = x * (torch.arange(x.shape[2], device=mel.device) < half[:, None])[:, None, :, None]
        x = F.relu(self.conv2(x))
        batch, channels, length, bins = x.shape
        result: Tensor = self.out(x.transpose(1, 2).reshape(batch, length, channels * bins))
        return result


class AudioEncoder(nn.Module):
    """Log-mel [B, T, 80], zero behind each sound's `frames` [B] -> features [B, T/4, D] and their mask [B, T/4]."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        if config.stem_residuals:
            self.stem = AudioStem(config)
        else:
            self.subsample = Subsampling(config)
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.num_layers))

    def embed_frames(self, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """A quarter of the frames as vectors [B, T/4, D], and their mask [B, T/4]."""
        x: Tensor = (self.stem if self.config.stem_residuals else self.subsample)(mel, frames)
        return x, torch.arange(x.shape[1], device=mel.device) < token_count(frames)[:, None]

    def forward(self, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        x, mask = self.embed_frames(mel, frames)
        for block in self.blocks:
            x = block(x, mask)
        return x, mask


class AudioProjector(nn.Module):
    """Features -> decoder tokens: W2 gelu(W1 LN(x) + b1) + b2."""

    def __init__(self, config: AudioConfig, hidden_size: int, text_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, text_size)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(self.norm(features))))
        return result
