"""Which weight is stored as which block type: in our own models (docs/format.md), and in shared GLM-4.1V files."""

from __future__ import annotations

import math
from enum import IntEnum

from autoglm.formats.quant_types import BLOCK, GGMLType
from autoglm.formats.tensor_names import torch_name


class FileType(IntEnum):
    """What a converted file is made of, numbered as general.file_type has it."""

    F32 = 0
    F16 = 1
    Q8_0 = 7
    Q4_K_M = 15


# What takes a K-quant's place in a matrix whose rows are no whole blocks of 256.
_FALLBACK = {GGMLType.Q4_K: GGMLType.Q5_0, GGMLType.Q6_K: GGMLType.Q8_0}


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


def community_type(
    name: str, shape: tuple[int, ...], file_type: FileType, num_layers: int, *, is_tied: bool = False
) -> GGMLType:
    """The type of a GLM-4.1V tensor in the files people exchange; name is the GGUF's, num_layers the decoder's.

    Vectors and the position table are F32, the two convolution kernels F16 in an F16 file and F32 in any other.
    Matrices take the file's type; a row that is no whole number of its blocks the 32-blocks next above it, and F16
    where those do not fit either. is_tied: token_embd is the output matrix too and gets the type of one.
    Source: what the community's converter and quantizer gave for a 40-layer miniature.
    """
    if len(shape) == 1 or name == "v.position_embd.weight" or file_type == FileType.F32:
        return GGMLType.F32
    if len(shape) > 2:
        return GGMLType.F16 if file_type == FileType.F16 else GGMLType.F32
    if file_type == FileType.F16:
        return GGMLType.F16
    wanted = GGMLType.Q8_0 if file_type == FileType.Q8_0 else _q4_k_m_type(name, num_layers, is_tied=is_tied)
    if shape[1] % BLOCK[wanted][0]:
        wanted = _FALLBACK.get(wanted, wanted)
    return wanted if shape[1] % BLOCK[wanted][0] == 0 else GGMLType.F16


def gcmf_type(name: str, shape: tuple[int, ...], file_type: FileType) -> GGMLType:
    """The type of a tensor of our own mmproj in a file of file_type; name and shape are the GGUF's.

    What `weight_type` leaves in F32 or F16 is left so in any file but one of F32.
    """
    parameter = torch_name(name)
    if parameter == "vision.patch_embed.weight":
        shape = (shape[0], math.prod(shape[1:]))
    planned = weight_type(parameter, shape, 0)
    if GGMLType.F32 in (planned, file_type):
        return GGMLType.F32
    return GGMLType.F16 if GGMLType.F16 in (planned, file_type) else planned


def _q4_k_m_type(name: str, num_layers: int, *, is_tied: bool) -> GGMLType:
    if name == "output.weight" or (is_tied and name == "token_embd.weight"):
        return GGMLType.Q6_K
    if name.endswith((".attn_v.weight", ".ffn_down.weight")) and has_more_bits(int(name.split(".")[1]), num_layers):
        return GGMLType.Q6_K
    return GGMLType.Q4_K
