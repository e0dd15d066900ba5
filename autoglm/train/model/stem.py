"""Convolutional stems: how the nano eyes and ears read what a linear embedding would take far more examples to learn.

Xiao et al. 2021, "Early Convolutions Help Transformers See Better". Each layer is relu(norm(conv(x))), or
relu(x + norm(conv(x))) for a residual one; the norms are batch norms, whose fixed statistics fold into the convolution
once training is over, so that a file holds plain convolutions.

    eyes   [B, 3, H, W]  -> [B, D, H/16, W/16]: kernel 3, four layers of stride 2, two residual ones before the last
    ears   [B, T, mels]  -> [B, T/4, D]: kernel 5 over time, two layers of stride 2, then residual ones
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoglm.train.model.presets import AudioConfig, VisionConfig


class StemLayer(nn.Module):
    """One layer over pictures (2 dimensions) or sounds (1): stride 1 when `residual`, else 2."""

    def __init__(
        self, channels: int, out_channels: int, *, dimensions: int, kernel: int, residual: bool, norm: bool
    ) -> None:
        super().__init__()
        self.residual = residual
        convolution = nn.Conv2d if dimensions == 2 else nn.Conv1d
        stride = 1 if residual else 2
        self.conv = convolution(channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=not norm)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        if norm:
            self.norm = nn.BatchNorm2d(out_channels) if dimensions == 2 else nn.BatchNorm1d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if hasattr(self, "norm"):
            y = self.norm(y)
        return F.relu(x + y if self.residual else y)

    @torch.no_grad()
    def fold_norm(self) -> None:
        """Fold the norm into the convolution: K g / sqrt(v + eps), b - m g / sqrt(v + eps), m and v its statistics."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None and variance is not None
        gain = self.norm.weight * torch.rsqrt(variance + self.norm.eps)
        self.conv.weight.mul_(gain.view(-1, *[1] * (self.conv.weight.ndim - 1)))
        self.conv.bias = nn.Parameter(self.norm.bias - mean * gain)
        del self.norm


class VisionStem(nn.ModuleList):
    """Pixels -> one vector a patch: [B, 3, H, W] -> [B, D, H/16, W/16]."""

    def __init__(self, config: VisionConfig) -> None:
        first, second, third = config.stem_channels
        plan = (
            (3, first),
            (first, second),
            (second, third),
            (third, third),
            (third, third),
            (third, config.hidden_size),
        )
        super().__init__(
            (
                StemLayer(a, b, dimensions=2, kernel=3, residual=index in (3, 4), norm=config.stem_norms)
                for index, (a, b) in enumerate(plan)
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        x = images.contiguous(memory_format=torch.channels_last)
        for layer in self:
            x = layer(x)
        return x


class AudioStem(nn.ModuleList):
    """Log-mel frames -> one vector per 40 ms: [B, T, mels], zero behind each sound's `frames` [B] -> [B, T/4, D]."""

    def __init__(self, config: AudioConfig) -> None:
        width = config.hidden_size
        plan = [config.num_mels, *[width] * (config.stem_residuals + 2)]
        super().__init__(
            (
                StemLayer(a, b, dimensions=1, kernel=5, residual=index >= 2, norm=config.stem_norms)
                for index, (a, b) in enumerate(zip(plan, plan[1:], strict=False))
            )
        )

    def forward(self, mel: Tensor, frames: Tensor) -> Tensor:
        x = mel.transpose(1, 2)
        for layer in self:
            assert isinstance(layer, StemLayer)
            x = layer(x)
            if not layer.residual:
                frames = (frames + 1) // 2
            # What stands behind a sound's end must be the zeros that a sound alone would be padded with.
            x = x * (torch.arange(x.shape[2], device=x.device) < frames[:, None])[:, None, :]
        return x.transpose(1, 2)
