"""ViT image encoder: patches of 16 x 16 pixels -> one feature vector a patch.

Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", equations 1 to 4, without the class token:

    z0 = E x + b + P             x: a patch, flattened channel, row, column; P: its learned position
    z' = z + MSA(LN(z))          multi-head self-attention over all patches of one image, no mask
    z  = z' + W2 gelu(W1 LN(z')) exact (erf) GELU
    y  = LN(zL)

The nano presets put a convolutional stem (stem.py) in the place of E: a linear embedding has to learn every word at
each of 256 offsets in a patch, which takes more examples than two cores can draw in an hour (docs/training.md).

The learned positions stand on a grid and are interpolated (bicubic, a = -0.75, corners not aligned) to the grid of
an image of another size or aspect.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoglm.train.model.presets import VisionConfig
from autoglm.train.model.stem import VisionStem


class VisionBlock(nn.Module):
    """One pre-norm transformer block: [B, N, D] -> [B, N, D]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn_qkv = nn.Linear(width, 3 * width)
        self.attn_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp_up = nn.Linear(width, config.mlp_size)
        self.mlp_down = nn.Linear(config.mlp_size, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        qkv = self.attn_qkv(self.norm1(x)).view(batch, count, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, width)
        x = x + self.attn_out(attended)
        result: Tensor = x + self.mlp_down(F.gelu(self.mlp_up(self.norm2(x))))
        return result


def sinusoids(rows: int, columns: int, width: int) -> Tensor:
    """Where learned positions start: sines and cosines of a patch's height and breadth, [rows * columns, width].

    A quarter each, of a quarter to eight periods over the picture, amplitude 1/4. From small noise positions stay
    drowned in what the patches show, and nothing after the encoder can tell where on the screen a thing lies.
    """
    periods = torch.logspace(math.log2(0.25), math.log2(8.0), width // 4, base=2.0)
    y, x = ((torch.arange(n) + 0.5)[:, None] / n * periods * 2 * math.pi for n in (rows, columns))
    y, x = y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)
    return 0.25 * torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=-1).flatten(0, 1)


class VisionEncoder(nn.Module):
    """Images [B, 3, H, W] in -1..1, sides multiples of 32 -> patch features [B, H/16 * W/16, D], row-major."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        if config.stem_channels:
            self.stem = VisionStem(config)
        else:
            self.patch_embed = nn.Linear(3 * config.patch_size**2, width)
        self.position_embedding = nn.Parameter(sinusoids(*config.position_grid, width))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The learned positions resampled to a grid of `rows` x `columns` patches: [rows * columns, D]."""
        if (rows, columns) == self.config.position_grid:
            return self.position_embedding
        grid = self.position_embedding.view(1, *self.config.position_grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(
            grid.float(), size=(rows, columns), mode="bicubic", align_corners=False, antialias=False
        )
        return resized.permute(0, 2, 3, 1).reshape(rows * columns, -1).to(self.position_embedding.dtype)

    def embed_patches(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> one vector a patch [B, H/16 * W/16, D], positions not yet added."""
        if self.config.stem_channels:
            found: Tensor = self.stem(images)
            return found.flatten(2).transpose(1, 2)
        batch, channels, height, width = images.shape
        size = self.config.patch_size
        rows, columns = height // size, width // size
        patches = images.view(batch, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
        embedded: Tensor = self.patch_embed(patches.reshape(batch, rows * columns, channels * size * size))
        return embedded

    def forward(self, images: Tensor) -> Tensor:
        size = self.config.patch_size
        x = self.embed_patches(images) + self.positions(images.shape[2] // size, images.shape[3] // size)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.post_norm(x)
        return normed


class VisionProjector(nn.Module):
    """Patch features -> decoder tokens: each 2 x 2 neighbourhood, concatenated (0,0) (0,1) (1,0) (1,1), becomes one.

    t = W2 gelu(W1 LN(concat) + b1) + b2
    """

    def __init__(self, config: VisionConfig, hidden_size: int, text_size: int) -> None:
        super().__init__()
        self.merge_size = config.merge_size
        merged = config.hidden_size * config.merge_size**2
        self.norm = nn.LayerNorm(merged, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(merged, hidden_size)
        self.fc2 = nn.Linear(hidden_size, text_size)

    def forward(self, features: Tensor, rows: int, columns: int) -> Tensor:
        """features [B, rows * columns, D] of a patch grid -> [B, rows/2 * columns/2, text_size], row-major."""
        batch, _, width = features.shape
        m = self.merge_size
        grid = features.view(batch, rows // m, m, columns // m, m, width).permute(0, 1, 3, 2, 4, 5)
        merged = grid.reshape(batch, rows // m * (columns // m), m * m * width)
        result: Tensor = self.fc2(F.gelu(self.fc1(self.norm(merged))))
        return result
