"""Norms folded into the weights beside them, so that a file need not carry them and nothing is computed twice.

    stems     relu(BN(K * x)) with running statistics: see StemLayer.fold_norm
    matrices  W (w * n + b) + c = (W diag(w)) n + (W b + c)     n: what a norm gives before its weight and bias

Both are exact but for float32 rounding. Fold before quantization-aware training, not after: a grid belongs to a weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoglm.train.model import AutoGLMPhone, PhoneConfig
from autoglm.train.model.stem import AudioStem, StemLayer, VisionStem


def fold_stem(state: Mapping[str, Tensor], config: PhoneConfig) -> tuple[dict[str, Tensor], PhoneConfig]:
    """The state and config of the same model whose stems have their batch norms folded into their convolutions.

    Nothing changes where there is no stem, or one folded before.
    """
    compact = dict(state)
    if config.vision.stem_channels and config.vision.stem_norms:
        _fold(compact, "vision.stem.", VisionStem(config.vision))
    if config.audio is not None and config.audio.stem_residuals and config.audio.stem_norms:
        _fold(compact, "audio.stem.", AudioStem(config.audio))
    return compact, config.without_stem_norms()


def folded(model: AutoGLMPhone) -> AutoGLMPhone:
    """The same function as a new model: stems folded, norms merged. `model` stays as it is."""
    state, config = fold_stem(model.state_dict(), model.config)
    compact = AutoGLMPhone(config)
    compact.load_state_dict(state)
    merge_norms(compact)
    return compact.train(model.training)


def _fold(state: dict[str, Tensor], prefix: str, stem: VisionStem | AudioStem) -> None:
    stem.load_state_dict(
        {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    )
    for layer in stem:
        assert isinstance(layer, StemLayer)
        layer.fold_norm()
    state.update({prefix + name: value.detach() for name, value in stem.state_dict().items()})


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
