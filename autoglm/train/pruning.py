"""Which feed-forward part a decoder can best do without: leave each out in turn, see how much worse the words get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from autoglm.train.dataset import Batch
from autoglm.train.losses import word_logits
from autoglm.train.model.phone import AutoGLMPhone
from autoglm.train.model.text import DecoderLayer

_FFN_PARTS = ("post_attention_layernorm", "mlp", "post_mlp_layernorm")


@torch.no_grad()
def ffn_contributions(model: AutoGLMPhone, batches: Sequence[Batch]) -> list[float]:
    """For each layer, how much the mean cross-entropy of the answers rises when its feed-forward part is left out."""
    model.eval()
    whole = _mean_loss(model, batches)
    rises = []
    for layer in model.text.layers:
        assert isinstance(layer, DecoderLayer)
        with _silenced(layer):
            rises.append(_mean_loss(model, batches) - whole)
    return rises


def least_useful_ffn(model: AutoGLMPhone, batches: Sequence[Batch]) -> int:
    """The layer whose feed-forward part is missed least."""
    rises = ffn_contributions(model, batches)
    return min(range(len(rises)), key=rises.__getitem__)


def without_ffn(state: Mapping[str, Tensor], layers: tuple[int, ...]) -> dict[str, Tensor]:
    """The state dict without the feed-forward tensors of `layers`."""
    gone = tuple(f"text.layers.{layer}.{part}." for layer in layers for part in _FFN_PARTS)
    return {name: value for name, value in state.items() if not any(part in name for part in gone)}


@contextmanager
def _silenced(layer: DecoderLayer) -> Iterator[None]:
    had = layer.has_ffn
    layer.has_ffn = False
    try:
        yield
    finally:
        layer.has_ffn = had


def _mean_loss(model: AutoGLMPhone, batches: Sequence[Batch]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        hidden = model.hidden(batch.inputs, model.embed(batch.inputs))
        logits, targets, _ = word_logits(model, hidden, batch)
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return total / count
