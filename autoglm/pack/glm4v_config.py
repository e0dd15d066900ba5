"""config.json of a GLM-4.1V checkpoint -> shapes of its decoder and image tower, checked to be what GGUF can say."""

from __future__ import annotations

from dataclasses import dataclass

from autoglm.errors import FormatError
from autoglm.pack.hf_checkpoint import JsonObject

MERGE = 2  # patches a side that become one token
FRAMES = 2  # a picture is two equal frames
CHANNELS = 3


@dataclass(frozen=True)
class TextShape:
    """The decoder of a checkpoint; field names are config.json's."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    is_tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        return 2 * sum(self.mrope_section)


@dataclass(frozen=True)
class VisionShape:
    """The image tower and its merger; field names are config.json's."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    image_size: int
    patch_size: int
    rms_norm_eps: float
    attention_bias: bool


def read_text_shape(config: JsonObject) -> TextShape:
    """Raises FormatError for a missing field, or one that a glm4 GGUF cannot express."""
    text = config.section("text_config")
    _only(text, "hidden_act", "silu")
    # Before transformers 5 the rotary settings lay beside the others, the sections in rope_scaling.
    rope = text.section("rope_parameters") if "rope_parameters" in text else text.section("rope_scaling", {})
    outer = rope if "rope_parameters" in text else text
    _only(rope, "rope_type", "default")
    _only(rope, "type", "default")
    heads = _count(text, "num_attention_heads")
    hidden = _count(text, "hidden_size")
    kv_heads = _count(text, "num_key_value_heads")
    if hidden % heads or heads % kv_heads:
        raise FormatError(f"{text.where}: {heads} heads, {kv_heads} for keys, do not go into a hidden size of {hidden}")
    head_dim = hidden // heads
    _only(text, "head_dim", head_dim)
    sections = rope.get("mrope_section", list, [8, 12, 12])
    if len(sections) != 3 or not all(type(pairs) is int and pairs >= 0 for pairs in sections):
        raise FormatError(f"{rope.where}: 'mrope_section' must hold three counts of rotary pairs")
    rotary, share = 2 * sum(sections), outer.get("partial_rotary_factor", float, 0.0)
    wanted = int(head_dim * share) if share else rotary
    if rotary != wanted or rotary > head_dim or not all(sections[:2]):
        raise FormatError(
            f"{rope.where}: 'mrope_section' {sections} turns {rotary} of {head_dim} dimensions, expected {wanted} by "
            "'partial_rotary_factor' with at least one pair each for time and height"
        )
    return TextShape(
        num_hidden_layers=_count(text, "num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=_count(text, "intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=_count(text, "vocab_size"),
        max_position_embeddings=_count(text, "max_position_embeddings"),
        rms_norm_eps=text.get("rms_norm_eps", float, 1e-5),
        rope_theta=outer.get("rope_theta", float, 10000.0),
        mrope_section=(sections[0], sections[1], sections[2]),
        is_tied=config.get("tie_word_embeddings", bool, False),
    )


def read_vision_shape(config: JsonObject) -> VisionShape:
    """Raises FormatError for a missing field, or one that a glm4v mmproj cannot express."""
    vision = config.section("vision_config")
    _only(vision, "hidden_act", "silu")
    _only(vision, "spatial_merge_size", MERGE)
    _only(vision, "temporal_patch_size", FRAMES)
    _only(vision, "in_channels", CHANNELS)
    return VisionShape(
        depth=_count(vision, "depth"),
        hidden_size=_count(vision, "hidden_size"),
        num_heads=_count(vision, "num_heads"),
        intermediate_size=_count(vision, "intermediate_size"),
        out_hidden_size=_count(vision, "out_hidden_size"),
        image_size=_count(vision, "image_size"),
        patch_size=_count(vision, "patch_size"),
        rms_norm_eps=vision.get("rms_norm_eps", float, 1e-5),
        attention_bias=vision.get("attention_bias", bool, False),
    )


def _count(config: JsonObject, key: str) -> int:
    value = config.get(key, int)
    if not 1 <= value < 1 << 31:
        raise FormatError(f"{config.where}: {key!r} is {ascii(value)[:20]}, expected a positive number")
    return value


def _only(config: JsonObject, key: str, wanted: int | str) -> None:
    value = config.get(key, type(wanted), wanted)
    if value != wanted:
        raise FormatError(
            f"{config.where}: {key!r} is {ascii(value)[:20]}, and only {wanted!r} can be converted; "
            "the checkpoint needs a newer autoglm"
        )
