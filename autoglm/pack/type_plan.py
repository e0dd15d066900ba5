"""Which weight is stored as which block type: Q4_K_M for the decoder, Q8_0 for everything else (docs/format.md)."""

from __future__ import annotations

from autoglm.formats.quant_types import BLOCK, GGMLType


def has_more_bits(layer: int, num_layers: int) -> bool:
    """The layers whose attn_v and ffn_down Q4_K_M gives Q6_K: the first and last eighth and every third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def weight_type(name: str, shape: tuple[int, ...], num_layers: int) -> GGMLType:
    """The type a parameter of `AutoGLMPhone` is stored as; num_layers is the decoder's.

    Matrices of linear layers and the token table are quantized; a row that is no whole number of Q4_K or Q6_K blocks
    falls back to Q8_0, one that is no whole number of those to F16. The patch kernel is F16, all else F32.
    """
    if not name.endswith(".weight") or len(shape) != 2:
        return GGMLType.F32
    if name == "vision.patch_embed.weight":
        return GGMLType.F16  # stored as the kernel [D, 3, 16, 16], whose rows of 16 fit no block
    wanted = _text_type(name, num_layers) if name.startswith("text.") else GGMLType.Q8_0
    for type_ in (wanted, GGMLType.Q8_0):
        if shape[1] % BLOCK[type_][0] == 0:
            return type_
    return GGMLType.F16


def _text_type(name: str, num_layers: int) -> GGMLType:
    if name == "text.lm_head.weight":
        return GGMLType.Q6_K
    if name.endswith(("self_attn.v_proj.weight", "mlp.down_proj.weight")) and has_more_bits(
        int(name.split(".")[2]), num_layers
    ):
        return GGMLType.Q6_K
    return GGMLType.Q4_K
