"""Weights that hide nothing: fresh norms of one and biases of zero would pass with a tensor forgotten or swapped."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def randomize(module: nn.Module, *, seed: int = 0, scale: float = 0.15) -> nn.Module:
    """Matrices N(0, scale), norm weights 1 + N(0, 0.2), everything else of one axis N(0, 0.2), norm statistics too."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(normal(parameter.shape) * scale)
        else:
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + normal(parameter.shape) * 0.2)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(normal(buffer.shape) * 0.2)
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return module.eval()
