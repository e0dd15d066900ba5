"""GLM-4.1V checkpoints -> the GGUF pair: every tensor's name, shape and row order there, and the files' keys.

Text rows of q and k change places: checkpoints rotate neighbouring pairs (2j, 2j + 1), glm4 files with rope sections
halves (j, j + rotary / 2); products of q and k stay what they are. Of the image tower only the patch kernel changes:
its two time steps become two kernels. Beware of the norms, see formats/tensor_names.py.
Left out: video (its frames are pictures of their own), and prediction layers, which these models do not have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoglm.errors import FormatError
from autoglm.formats.safetensors import SafeTensor
from autoglm.formats.tensor_names import gguf_name
from autoglm.pack.gguf_writer import MetadataValue
from autoglm.pack.glm4v_config import CHANNELS, FRAMES, MERGE, TextShape, VisionShape
from autoglm.pack.hf_checkpoint import HfCheckpoint, JsonObject
from autoglm.pack.type_plan import FileType

_TEXT, _VISION, _HEAD = "model.language_model.", "model.visual.", "lm_head.weight"
# Tables that the code computes anew; some versions of the library saved them.
_COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
# CLIP's, which the image processor takes where preprocessor_config.json names none.
_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
_VISION_NAMES = {
    "patch_embed.proj.bias": "v.patch_embd.bias",
    "post_conv_layernorm.weight": "v.norm_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "post_layernorm.weight": "v.post_ln.weight",
    "downsample.weight": "mm.patch_merger.weight",
    "downsample.bias": "mm.patch_merger.bias",
    "merger.proj.weight": "mm.model.fc.weight",
    "merger.post_projection_norm.weight": "mm.post_norm.weight",
    "merger.post_projection_norm.bias": "mm.post_norm.bias",
    "merger.gate_proj.weight": "mm.gate.weight",
    "merger.up_proj.weight": "mm.up.weight",
    "merger.down_proj.weight": "mm.down.weight",
}
_BLOCK_NAMES = {
    "norm1.weight": "ln1.weight",
    "norm2.weight": "ln2.weight",
    "attn.qkv.weight": "attn_qkv.weight",
    "attn.qkv.bias": "attn_qkv.bias",
    "attn.proj.weight": "attn_out.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a GGUF and where it comes from.

    name    in the GGUF                  shape  there, torch order
    source  the checkpoint's name        source_shape  there
    rows    i64 [shape[0]]: row r of the file is row rows[r] of the source; None where they are the same
    frame   of a patch kernel [D, 3, frames, p, p]: which frame; else None
    """

    name: str
    source: str
    source_shape: tuple[int, ...]
    rows: NDArray[np.int64] | None = None
    frame: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.frame is None:
            return self.source_shape
        return (*self.source_shape[:2], *self.source_shape[3:])


# --- tensors -----------------------------------------------------------------------------------------------


def canonical(tensors: Mapping[str, SafeTensor]) -> dict[str, SafeTensor]:
    """Tensors under today's names; before transformers 4.53 they began with "model." and "visual."."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("visual."):
            name = "model." + name
        elif name.startswith("model.") and not name.startswith((_TEXT, _VISION)):
            name = _TEXT + name.removeprefix("model.")
        if not name.endswith(_COMPUTED):
            renamed[name] = tensor
    return renamed


def text_entries(text: TextShape) -> list[Entry]:
    """What the text GGUF holds, in its order."""
    return list(_text_entries(text))


def _text_entries(text: TextShape) -> Iterator[Entry]:
    width, ffn = text.hidden_size, text.intermediate_size
    kv = text.num_key_value_heads * text.head_dim
    table = (text.vocab_size, width)
    yield Entry("token_embd.weight", f"{_TEXT}embed_tokens.weight", table)
    if not text.is_tied:
        yield Entry("output.weight", _HEAD, table)
    yield Entry("output_norm.weight", f"{_TEXT}norm.weight", (width,))
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.q_proj.bias": (width,),
        "self_attn.k_proj.weight": (kv, width),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, width),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (width, width),
        "post_self_attn_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_up_proj.weight": (2 * ffn, width),
        "mlp.down_proj.weight": (width, ffn),
        "post_mlp_layernorm.weight": (width,),
    }
    for layer in range(text.num_hidden_layers):
        for name, shape in shapes.items():
            rows = None
            if name.startswith(("self_attn.q_proj", "self_attn.k_proj")):
                rows = rotary_rows(text, shape[0] // text.head_dim)
            full = f"layers.{layer}.{name}"
            yield Entry(gguf_name("text." + full), _TEXT + full, shape, rows)


def rotary_rows(text: TextShape, num_heads: int) -> NDArray[np.int64]:
    """Row r of the file's q or k is row rotary_rows[r] of the checkpoint's: i64 [num_heads * head_dim]."""
    rotary, head_dim = text.rotary_dim, text.head_dim
    head = np.concatenate([np.arange(0, rotary, 2), np.arange(1, rotary, 2), np.arange(rotary, head_dim)])
    return np.asarray(np.arange(num_heads)[:, None] * head_dim + head, np.int64).reshape(-1)


def vision_entries(vision: VisionShape) -> list[Entry]:
    """What the mmproj holds, in its order."""
    return list(_vision_entries(vision))


def _vision_entries(vision: VisionShape) -> Iterator[Entry]:
    width, out, wide, patch = vision.hidden_size, vision.out_hidden_size, vision.intermediate_size, vision.patch_size
    kernel = (width, CHANNELS, FRAMES, patch, patch)
    for frame in range(FRAMES):
        name = "v.patch_embd.weight" + (f".{frame}" if frame else "")
        yield Entry(name, f"{_VISION}patch_embed.proj.weight", kernel, frame=frame)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.bias": (width,),
        "post_conv_layernorm.weight": (width,),
        "embeddings.position_embedding.weight": ((vision.image_size // patch) ** 2, width),
        "post_layernorm.weight": (width,),
        "downsample.weight": (out, width, MERGE, MERGE),
        "downsample.bias": (out,),
        "merger.proj.weight": (out, out),
        "merger.post_projection_norm.weight": (out,),
        "merger.post_projection_norm.bias": (out,),
        "merger.gate_proj.weight": (wide, out),
        "merger.up_proj.weight": (wide, out),
        "merger.down_proj.weight": (out, wide),
    }
    for name, shape in shapes.items():
        yield Entry(_VISION_NAMES[name], _VISION + name, shape)
    block_shapes: dict[str, tuple[int, ...]] = {
        "norm1.weight": (width,),
        "norm2.weight": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "mlp.gate_proj.weight": (out, width),
        "mlp.up_proj.weight": (out, width),
        "mlp.down_proj.weight": (width, out),
    }
    if not vision.attention_bias:
        del block_shapes["attn.qkv.bias"]
    for layer in range(vision.depth):
        for name, shape in block_shapes.items():
            yield Entry(f"v.blk.{layer}.{_BLOCK_NAMES[name]}", f"{_VISION}blocks.{layer}.{name}", shape)


def check_tensors(where: str, tensors: Mapping[str, SafeTensor], entries: list[Entry], *, is_tied: bool) -> None:
    """Raises FormatError unless the checkpoint has exactly the tensors that the entries read, in these shapes."""
    expected = {entry.source: entry.source_shape for entry in entries}
    found = {name for name in tensors if not (is_tied and name == _HEAD)}
    missing = [name for name in expected if name not in found]
    if missing:
        raise FormatError(
            f"{where}: {len(missing)} tensors are missing, the first is {missing[0]}; fetch the checkpoint again"
        )
    unknown = sorted(found - set(expected))
    if unknown:
        raise FormatError(
            f"{where}: {len(unknown)} tensors are no part of the model its config.json describes, "
            f"the first is {ascii(unknown[0])[:80]}; the checkpoint needs a newer autoglm"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise FormatError(
                f"{where}: tensor {name} has shape {list(tensors[name].shape)}, expected {list(shape)} by config.json"
            )


# --- keys --------------------------------------------------------------------------------------------------


def text_metadata(text: TextShape, entries: list[Entry], name: str, file_type: FileType) -> dict[str, MetadataValue]:
    """The keys of the text file but for the tokenizer's."""
    return {
        **_general("model", name, entries, file_type),
        "glm4.block_count": text.num_hidden_layers,
        "glm4.context_length": text.max_position_embeddings,
        "glm4.embedding_length": text.hidden_size,
        "glm4.feed_forward_length": text.intermediate_size,
        "glm4.attention.head_count": text.num_attention_heads,
        "glm4.attention.head_count_kv": text.num_key_value_heads,
        "glm4.attention.layer_norm_rms_epsilon": text.rms_norm_eps,
        "glm4.rope.dimension_count": text.rotary_dim,
        "glm4.rope.freq_base": text.rope_theta,
        "glm4.rope.dimension_sections": [*text.mrope_section, 0],
    }


def vision_metadata(
    checkpoint: HfCheckpoint, vision: VisionShape, entries: list[Entry], name: str, file_type: FileType
) -> dict[str, MetadataValue]:
    """The keys of the mmproj file. Raises FormatError if preprocessor_config.json holds other than three means."""
    processor = checkpoint.json("preprocessor_config.json") or JsonObject({}, "preprocessor_config.json")
    return {
        **_general("mmproj", name, entries, file_type),
        "clip.projector_type": "glm4v",
        "clip.has_vision_encoder": True,
        "clip.use_silu": True,
        "clip.vision.projection_dim": vision.out_hidden_size,
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.block_count": vision.depth,
        "clip.vision.attention.head_count": vision.num_heads,
        "clip.vision.attention.layer_norm_epsilon": vision.rms_norm_eps,
        "clip.vision.image_mean": _channels(processor, "image_mean", _IMAGE_MEAN),
        "clip.vision.image_std": _channels(processor, "image_std", _IMAGE_STD),
    }


def _channels(processor: JsonObject, key: str, default: tuple[float, ...]) -> list[float]:
    values = processor.get(key, list, list(default))
    if len(values) != CHANNELS or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise FormatError(f"{processor.where}: {key!r} must hold three numbers")
    return [float(value) for value in values]


def _general(kind: str, name: str, entries: list[Entry], file_type: FileType) -> dict[str, MetadataValue]:
    return {
        "general.type": kind,
        "general.name": name,
        "general.size_label": _size_label(sum(math.prod(entry.shape) for entry in entries)),
        "general.file_type": int(file_type),
        "general.quantization_version": 2,
    }


def _size_label(count: int) -> str:
    """Parameters as names of GGUF files have them: 111K, 892M, 9.4B."""
    unit, scale = next(((unit, scale) for unit, scale in (("B", 1e9), ("M", 1e6)) if count >= scale), ("K", 1e3))
    value = count / scale
    return f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"
