"""The one table of PyTorch names <-> GGUF names: decoder, ViT, Conformer, projectors and fusion.

GGUF names follow the community wherever it has one: `blk.N.*` of `glm4` for the decoder, `v.*` and `mm.*` for eyes and
their projector, `a.*` (a Conformer's names in LFM2-audio files) and `mm.a.*` for ears. `gcmf.*` is this project's own.
Beware of the norms: `post_attention_layernorm` stands before the feed-forward part and is `ffn_norm`, while
`post_attention_norm` is applied to what attention gave. How shapes and rows differ is in docs/format.md.
"""

from __future__ import annotations

import re

from autoglm.errors import FormatError

# {n} is a layer number. Names without an ending stand for .weight and, where there is one, .bias.
_TABLE: tuple[tuple[str, str], ...] = (
    ("text.embed_tokens", "token_embd"),
    ("text.norm", "output_norm"),
    ("text.lm_head", "output"),
    ("text.layers.{n}.input_layernorm", "blk.{n}.attn_norm"),
    ("text.layers.{n}.self_attn.q_proj", "blk.{n}.attn_q"),
    ("text.layers.{n}.self_attn.k_proj", "blk.{n}.attn_k"),
    ("text.layers.{n}.self_attn.v_proj", "blk.{n}.attn_v"),
    ("text.layers.{n}.self_attn.o_proj", "blk.{n}.attn_output"),
    ("text.layers.{n}.post_self_attn_layernorm", "blk.{n}.post_attention_norm"),
    ("text.layers.{n}.post_attention_layernorm", "blk.{n}.ffn_norm"),
    ("text.layers.{n}.mlp.gate_up_proj", "blk.{n}.ffn_up"),
    ("text.layers.{n}.mlp.down_proj", "blk.{n}.ffn_down"),
    ("text.layers.{n}.post_mlp_layernorm", "blk.{n}.post_ffw_norm"),
    ("vision.patch_embed", "v.patch_embd"),
    ("vision.stem.{n}.conv", "v.conv_stem.{n}"),
    ("vision.position_embedding", "v.position_embd.weight"),
    ("vision.blocks.{n}.norm1", "v.blk.{n}.ln1"),
    ("vision.blocks.{n}.attn_qkv", "v.blk.{n}.attn_qkv"),
    ("vision.blocks.{n}.attn_out", "v.blk.{n}.attn_out"),
    ("vision.blocks.{n}.norm2", "v.blk.{n}.ln2"),
    ("vision.blocks.{n}.mlp_up", "v.blk.{n}.ffn_up"),
    ("vision.blocks.{n}.mlp_down", "v.blk.{n}.ffn_down"),
    ("vision.post_norm", "v.post_ln"),
    ("vision_projector.norm", "mm.input_norm"),
    ("vision_projector.fc1", "mm.0"),
    ("vision_projector.fc2", "mm.2"),
    ("audio.stem.{n}.conv", "a.conv_stem.{n}"),
    ("audio.subsample.conv1", "a.conv2d.0"),
    ("audio.subsample.conv2", "a.conv2d.1"),
    ("audio.subsample.out", "a.pre_encode.out"),
    ("audio.blocks.{n}.ffn1.norm", "a.blk.{n}.ffn_norm"),
    ("audio.blocks.{n}.ffn1.up", "a.blk.{n}.ffn_up"),
    ("audio.blocks.{n}.ffn1.down", "a.blk.{n}.ffn_down"),
    ("audio.blocks.{n}.attn.norm", "a.blk.{n}.ln1"),
    ("audio.blocks.{n}.attn.q", "a.blk.{n}.attn_q"),
    ("audio.blocks.{n}.attn.k", "a.blk.{n}.attn_k"),
    ("audio.blocks.{n}.attn.v", "a.blk.{n}.attn_v"),
    ("audio.blocks.{n}.attn.out", "a.blk.{n}.attn_out"),
    ("audio.blocks.{n}.attn.pos", "a.blk.{n}.linear_pos"),
    ("audio.blocks.{n}.attn.pos_bias_u", "a.blk.{n}.pos_bias_u"),
    ("audio.blocks.{n}.attn.pos_bias_v", "a.blk.{n}.pos_bias_v"),
    ("audio.blocks.{n}.conv.norm", "a.blk.{n}.norm_conv"),
    ("audio.blocks.{n}.conv.pointwise1", "a.blk.{n}.conv_pw1"),
    ("audio.blocks.{n}.conv.depthwise", "a.blk.{n}.conv_dw"),
    ("audio.blocks.{n}.conv.inner_norm", "a.blk.{n}.conv_norm"),
    ("audio.blocks.{n}.conv.pointwise2", "a.blk.{n}.conv_pw2"),
    ("audio.blocks.{n}.ffn2.norm", "a.blk.{n}.ffn_norm_1"),
    ("audio.blocks.{n}.ffn2.up", "a.blk.{n}.ffn_up_1"),
    ("audio.blocks.{n}.ffn2.down", "a.blk.{n}.ffn_down_1"),
    ("audio.blocks.{n}.out_norm", "a.blk.{n}.ln2"),
    ("audio_projector.norm", "mm.a.norm_pre"),
    ("audio_projector.fc1", "mm.a.mlp.1"),
    ("audio_projector.fc2", "mm.a.mlp.2"),
    ("fusion.vision.q", "gcmf.vision.attn_q"),
    ("fusion.vision.k", "gcmf.vision.attn_k"),
    ("fusion.vision.v", "gcmf.vision.attn_v"),
    ("fusion.vision.out", "gcmf.vision.attn_out"),
    ("fusion.vision.gate", "gcmf.vision.gate"),
    ("fusion.audio.q", "gcmf.audio.attn_q"),
    ("fusion.audio.k", "gcmf.audio.attn_k"),
    ("fusion.audio.v", "gcmf.audio.attn_v"),
    ("fusion.audio.out", "gcmf.audio.attn_out"),
    ("fusion.audio.gate", "gcmf.audio.gate"),
    ("fusion.modality", "gcmf.modality_embd.weight"),
    ("fusion.pool_weight", "gcmf.pool.weight"),
    ("fusion.pool_bias", "gcmf.pool.bias"),
)
_TO_GGUF = dict(_TABLE)
_TO_TORCH = {gguf: torch for torch, gguf in _TABLE}
_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.|$)")


def gguf_name(torch_name: str) -> str:
    """The GGUF tensor of a parameter of `AutoGLMPhone`. Raises FormatError for a name the table lacks."""
    return _translate(torch_name, _TO_GGUF, "parameter")


def torch_name(gguf_name: str) -> str:
    """The parameter of `AutoGLMPhone` a GGUF tensor belongs to. Raises FormatError for a name the table lacks."""
    return _translate(gguf_name, _TO_TORCH, "tensor")


def _translate(name: str, table: dict[str, str], what: str) -> str:
    for ending in ("", ".weight", ".bias"):
        stem = name[: -len(ending)] if ending else name
        if not name.endswith(ending):
            continue
        if stem in table:
            return table[stem] + ending
        # Layer numbers are the first number of a name; a later one (mm.a.mlp.1) belongs to it.
        pattern, count = _NUMBER.subn("{n}", stem, count=1)
        number = _NUMBER.search(stem)
        if count and number is not None and pattern in table:
            return table[pattern].replace("{n}", number[1]) + ending
    raise FormatError(f"{what} {name[:80]!r} belongs to no known part of an AutoGLM-Phone model")
