"""Norms folded into the weights beside them, so that a file need not carry them and nothing is computed twice.

    stem      relu(BN(K * x)) with running statistics: see StemLayer.fold_norm
    matrices  W (w * n + b) + c = (W diag(w)) n + (W b + c)     n: what a norm gives before its weight and bias

Both are exact but for float32 rounding. Fold before quantization-aware training, not after: a grid belongs to a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from autoglm.train.model import AutoGLMPhone, PhoneConfig
from autoglm.train.model.vision import StemLayer, make_stem

_STEM = "vision.stem."


def fold_stem(state: Mapping[str, Tensor], config: PhoneConfig) -> tuple[dict[str, Tensor], PhoneConfig]:
    """The state and config of the same model whose stem has its batch norms folded into its convolutions.

    Nothing changes where there is no stem, or one folded before.
    """
    if not config.vision.stem_channels or not config.vision.stem_norms:
        return dict(state), config
    stem = make_stem(config.vision)
    stem.load_state_dict({name.removeprefix(_STEM): value for name, value in state.items() if name.startswith(_STEM)})
    for layer in stem:
        assert isinstance(layer, StemLayer)
        layer.fold_norm()
    folded = {name: value for name, value in state.items() if not name.startswith(_STEM)}
    folded.update({_STEM + name: value.detach() for name, value in stem.state_dict().items()})
    return folded, replace(config, vision=replace(config.vision, stem_norms=False))


# A norm's name -> the layers beside it that read it, and nothing else does. "norm" stands in several modules.
_READERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ("norm1", ("attn_qkv",)),
    ("norm2", ("mlp_up",)),
    ("norm", ("up",)),
    ("norm", ("q", "k", "v")),
    ("norm", ("pointwise1",)),
    ("norm", ("fc1",)),
    ("norm", ("lm_head",)),
)


@torch.no_grad()
def merge_norms(model: AutoGLMPhone) -> int:
    """Move norms' weights (and biases) into the matrices that read them; returns how many norms were merged.

    W (w * n + b) + c = (W diag(w)) n + (W b + c): exact but for rounding. A norm before a residual sum, an activation
    function or another norm keeps its weight.
    """
    merged = 0
    modules = dict(model.named_modules())
    for name, norm in modules.items():
        parent, _, attribute = name.rpartition(".")
        for norm_name, reader_names in _READERS:
            readers = [modules.get(f"{parent}.{reader}") for reader in reader_names]
            linear = [reader for reader in readers if isinstance(reader, nn.Linear)]
            if attribute == norm_name and len(linear) == len(reader_names):
                _merge_norm(norm, linear)
                merged += 1
    return merged


def _merge_norm(norm: nn.Module, readers: list[nn.Linear]) -> None:
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    for reader in readers:
        if bias is not None:
            reader.bias.add_(reader.weight @ bias)
        reader.weight.mul_(weight)
    weight.fill_(1)
    if bias is not None:
        bias.zero_()
