"""Layers that train on exactly the grids their weights will be stored on.

`attach_qat` swaps every linear layer
and embedding for one that computes with the rounded weight and, before it, with the 8-bit activations of the CPU
kernels; the parameters stay the same objects under the same names. A layer's grid is fitted once and then stands
still, so that a weight can settle on a code; `refit` fits it anew. The grids are buffers (`grid_*`), hence part of the
state dict: exporting that state dict packs the very codes that training saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoglm.errors import ConfigError
from autoglm.formats.quant_types import GGMLType
from autoglm.pack.type_plan import weight_type
from autoglm.train.grids import (
    GRID_TYPES,
    Flavour,
    Grid,
    activation_block,
    fake_quantize,
    fake_quantize_activations,
    fit_grid,
)
from autoglm.train.model import AutoGLMPhone

GRID_PREFIX = "grid_"
_GRID_PARTS = ("d", "dmin", "sc", "m")


# --- layers ------------------------------------------------------------------------------------------------


class _Quantized(nn.Module):
    """What a linear layer and an embedding share: the type, the grid as buffers, the rounded weight."""

    weight: Tensor
    type_: GGMLType

    def _set_grid(self, grid: Grid) -> None:
        for name, part in grid.tensors().items():
            self.register_buffer(GRID_PREFIX + name, part)

    def grid(self) -> Grid | None:
        """The grid the weight is rounded to; None for F16."""
        return grid_of(dict(self.named_buffers(recurse=False)), "", self.type_, _shape(self.weight))

    def rounded(self) -> Tensor:
        """The weight as the file will hold it; gradients pass through."""
        grid = self.grid()
        if grid is not None:
            return fake_quantize(self.weight, grid)
        result: Tensor = _RoundHalf.apply(self.weight)  # type: ignore[no-untyped-call]
        return result

    def refit(self, flavour: Flavour = "best", importance: Tensor | None = None) -> None:
        """Fit the grid to the weight as it is now."""
        if self.type_ in GRID_TYPES:
            self._set_grid(fit_grid(self.weight, self.type_, flavour, importance=importance))


class _RoundHalf(torch.autograd.Function):
    @staticmethod
    def forward(context: object, weight: Tensor) -> Tensor:
        return weight.to(torch.float16).float()

    @staticmethod
    def backward(context: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


class QuantLinear(_Quantized):
    """A linear layer on the grid of its type, reading activations as the kernels of that type do."""

    def __init__(self, linear: nn.Linear, type_: GGMLType, flavour: Flavour, importance: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.type_ = type_
        self.round_activations = True
        self.refit(flavour, importance)

    def forward(self, x: Tensor) -> Tensor:
        block = activation_block(self.type_)
        if block and self.round_activations:
            x = fake_quantize_activations(x, block)
        return F.linear(x, self.rounded(), self.bias)


class QuantEmbedding(_Quantized):
    """A token table on the grid of its type."""

    def __init__(self, embedding: nn.Embedding, type_: GGMLType, flavour: Flavour) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.weight = embedding.weight
        self.type_ = type_
        self.refit(flavour)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.rounded())


def grid_of(tensors: Mapping[str, Tensor], prefix: str, type_: GGMLType, shape: tuple[int, int]) -> Grid | None:
    """The grid kept under `{prefix}grid_*` for a matrix of this type and shape; None where there is none."""
    parts = {name: tensors.get(f"{prefix}{GRID_PREFIX}{name}") for name in _GRID_PARTS}
    if type_ not in GRID_TYPES or parts["d"] is None:
        return None
    return Grid(type_, shape, **parts)  # type: ignore[arg-type]


def _shape(weight: Tensor) -> tuple[int, int]:
    return (weight.shape[0], weight.shape[1])


# --- on and off --------------------------------------------------------------------------------------------


def attach_qat(
    model: AutoGLMPhone, flavour: Flavour = "best", *, importance: Mapping[str, Tensor] | None = None
) -> AutoGLMPhone:
    """Swap every linear layer and embedding of the model for its quantized twin, in place.

    importance  layer name -> f32 [in_features], see `input_power`; what a fit of flavour "best" weighs errors with
    Straight after this the model computes what the same weights, merely rounded (PTQ), give. Before loading a QAT
    checkpoint, flavour "fast" saves the time of a search whose result is overwritten. Raises ConfigError when attached
    already or a weight is not finite.
    """
    if any(isinstance(module, _Quantized) for module in model.modules()):
        raise ConfigError("quantization-aware layers are attached already")
    num_layers = model.config.text.num_layers
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        type_ = weight_type(f"{name}.weight", tuple(module.weight.shape), num_layers)
        twin: _Quantized
        if isinstance(module, nn.Linear):
            twin = QuantLinear(module, type_, flavour, None if importance is None else importance.get(name))
        else:
            twin = QuantEmbedding(module, type_, flavour)
        _replace(model, name, twin.train(module.training))
    return model


def detach_qat(model: AutoGLMPhone) -> AutoGLMPhone:
    """Swap the quantized layers back for plain ones that hold the rounded weights, in place."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, _Quantized):
            continue
        with torch.no_grad():
            module.weight.copy_(module.rounded())
        rows, columns = _shape(module.weight)
        plain: nn.Linear | nn.Embedding
        if isinstance(module, QuantLinear):
            plain = nn.Linear(columns, rows, bias=module.bias is not None, device="meta")
            plain.register_parameter("bias", module.bias)
        else:
            plain = nn.Embedding(rows, columns, device="meta")
        plain.register_parameter("weight", nn.Parameter(module.weight.detach()))
        _replace(model, name, plain.train(module.training))
    return model


def refit(model: nn.Module, flavour: Flavour = "best", *, importance: Mapping[str, Tensor] | None = None) -> None:
    """Fit every grid to its weight as it is now; for now and then during training, not for its last steps."""
    for name, module in model.named_modules():
        if isinstance(module, _Quantized):
            module.refit(flavour, None if importance is None else importance.get(name))


def set_activation_rounding(model: nn.Module, on: bool) -> None:
    """Round activations before quantized products (as the engine does), or leave them in floating point."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.round_activations = on


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


# --- what fits need to know --------------------------------------------------------------------------------


@contextmanager
def input_power(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Gathers the mean square of every linear layer's input columns while the model runs: name -> f32 [in_features]."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    means: dict[str, Tensor] = {}

    def hook_for(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, torch.zeros_like(x[0])) + x.pow(2).sum(0)
            counts[name] = counts.get(name, 0) + len(x)
            means[name] = sums[name] / counts[name]

        return hook

    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | QuantLinear)]
    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in linear]  # type: ignore[arg-type]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()
