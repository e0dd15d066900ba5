"""Weights -> the GGUF pair: a `glm4` text file and an mmproj with encoders, projectors and fusion (docs/format.md).

What is written is exactly what training saw: where the state dict carries the grids of quantization-aware training
they are used, else each matrix gets the best grid a search finds. The same weights give the same bytes. A file appears
under its name only when it is whole. Left out: reading (checkpoint_gguf.py) and building an mmproj from encoder files
of their own (pack/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoglm.errors import ConfigError
from autoglm.formats.quant_types import BLOCK, GGMLType
from autoglm.formats.tensor_names import gguf_name
from autoglm.pack.gguf_writer import MetadataValue, StoredTensor, write_gguf
from autoglm.pack.type_plan import weight_type
from autoglm.train.folding import fold_stem
from autoglm.train.grids import fit_grid
from autoglm.train.model import AutoGLMPhone, PhoneConfig, TextConfig
from autoglm.train.quantization import GRID_PREFIX, grid_of

MODEL_NAME = "AutoGLM-Phone-Nano"
PROJECTOR_TYPE = "gcmf"
# Raised when pictures or sounds are turned into encoder inputs in another way than before.
PREPROCESSING_REVISION = 1
# Which parameters go into which file.
TEXT_PARTS = ("text.",)
MMPROJ_PARTS = ("vision.", "vision_projector.", "audio.", "audio_projector.", "fusion.")
_FILE_TYPE_Q8_0, _FILE_TYPE_Q4_K_M = 7, 15

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Exported:
    """The files of one export."""

    text: Path
    mmproj: Path

    @property
    def nbytes(self) -> int:
        return self.text.stat().st_size + self.mmproj.stat().st_size


def export_pair(
    state: State,
    config: PhoneConfig,
    tokenizer: Mapping[str, object],
    folder: Path,
    *,
    name: str = MODEL_NAME,
    importance: Mapping[str, Tensor] | None = None,
) -> Exported:
    """Write `{name}-Q4_K_M.gguf` and `mmproj-{name}-Q8_0.gguf` into `folder`.

    state       of `AutoGLMPhone(config)`, plain or with QAT attached
    tokenizer   its GGUF keys, as `NanoTokenizer.gguf_metadata` gives them
    importance  layer name -> f32 [in_features] for matrices without a grid of their own, see `input_power`
    Raises ConfigError if the state is not one of this config or holds a value that is not finite.
    """
    text, mmproj = folder / f"{name}-Q4_K_M.gguf", folder / f"mmproj-{name}-Q8_0.gguf"
    export_text(text, state, config, tokenizer, name=name, importance=importance)
    export_mmproj(mmproj, state, config, name=name, importance=importance)
    return Exported(text, mmproj)


def export_text(
    path: Path,
    state: State,
    config: PhoneConfig,
    tokenizer: Mapping[str, object],
    *,
    name: str = MODEL_NAME,
    compatible: bool = False,
    importance: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the decoder as a `glm4` GGUF.

    compatible  give pruned layers a feed-forward part of zeros, for tools that insist on one
    """
    check_state(state, config, TEXT_PARTS)
    stored = store_tensors(state, config, TEXT_PARTS, importance)
    for part, heads in (("attn_q", config.text.num_heads), ("attn_k", config.text.num_kv_heads)):
        order = rotary_row_order(config.text, heads).numpy()
        for layer in range(config.text.num_layers):
            for ending in ("weight", "bias"):
                key = f"blk.{layer}.{part}.{ending}"
                stored[key] = StoredTensor(stored[key].data[order], stored[key].type)
    metadata = {**text_metadata(config, name, stored), **{key: _checked(key, v) for key, v in tokenizer.items()}}
    if compatible:
        stored.update(_silent_layers(config.text))
        metadata.pop("autoglm.pruned_ffn_layers", None)
    write_gguf(path, "glm4", metadata, stored)


def export_mmproj(
    path: Path,
    state: State,
    config: PhoneConfig,
    *,
    name: str = MODEL_NAME,
    importance: Mapping[str, Tensor] | None = None,
) -> None:
    """Write encoders, projectors and fusion as one mmproj GGUF; batch norms of the stem are folded first."""
    check_state(state, config, MMPROJ_PARTS)
    state, config = fold_stem(state, config)
    stored = store_tensors(state, config, MMPROJ_PARTS, importance)
    write_gguf(path, "clip", mmproj_metadata(config, name, stored), stored)


# --- tensors -----------------------------------------------------------------------------------------------


def check_state(state: State, config: PhoneConfig, parts: tuple[str, ...] = TEXT_PARTS + MMPROJ_PARTS) -> None:
    """Raises ConfigError unless `state` has exactly the parameters of `AutoGLMPhone(config)`, all finite.

    parts  beginnings of the names that must be there; nothing may be there that belongs to no part at all
    """
    whole = _parameter_shapes(config)
    expected = {name: shape for name, shape in whole.items() if name.startswith(parts)}
    found = {name: tuple(v.shape) for name, v in state.items() if not name.rpartition(".")[2].startswith(GRID_PREFIX)}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is no part of the model" for name in found if name not in whole]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    problems = problems or [f"{name} holds NaN or infinity" for name in expected if not _is_finite(state[name])]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"the weights are not those of a whole '{config.name}' model: {problems[0]}{more}")


def _parameter_shapes(config: PhoneConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in AutoGLMPhone(config).state_dict().items()}


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def store_tensors(
    state: State, config: PhoneConfig, prefixes: tuple[str, ...], importance: Mapping[str, Tensor] | None = None
) -> dict[str, StoredTensor]:
    """The parameters whose names begin with one of `prefixes`, under their GGUF names, in the model's order."""
    state = {name: value.detach().cpu() for name, value in state.items()}
    stored: dict[str, StoredTensor] = {}
    for name in _parameter_shapes(config):
        if not name.startswith(prefixes):
            continue
        value = state[name].float()
        type_ = weight_type(name, tuple(value.shape), config.text.num_layers)
        module = name.rpartition(".")[0]
        stored[gguf_name(name)] = store_tensor(
            name, value, type_, state, None if importance is None else importance.get(module)
        )
    return stored


def store_tensor(
    name: str, value: Tensor, type_: GGMLType, state: State, importance: Tensor | None = None
) -> StoredTensor:
    """One parameter as the file holds it. Raises ConfigError if the grid in the state is one of another type."""
    if type_ == GGMLType.F32:
        return StoredTensor(_as_stored_shape(name, value).numpy(), type_)
    if type_ == GGMLType.F16:
        return StoredTensor(_as_stored_shape(name, value).to(torch.float16).numpy(), type_)
    shape = (value.shape[0], value.shape[1])
    grid = grid_of(state, name.removesuffix("weight"), type_, shape)
    if grid is None:
        grid = fit_grid(value, type_, importance=importance)
    elif grid.d.numel() * BLOCK[type_][0] != value.numel() or (grid.dmin is None) != (type_ != GGMLType.Q4_K):
        raise ConfigError(
            f"{name}: the grid in the weights is not one of {type_.name}; attach QAT anew and train again"
        )
    return StoredTensor(grid.pack(value).numpy(), type_)


def _as_stored_shape(name: str, value: Tensor) -> Tensor:
    """The patch kernel is stored as a convolution [D, 3, patch, patch]; everything else as it is."""
    if name != "vision.patch_embed.weight":
        return value.contiguous()
    side = round((value.shape[1] // 3) ** 0.5)
    return value.reshape(value.shape[0], 3, side, side).contiguous()


def rotary_row_order(config: TextConfig, num_heads: int) -> Tensor:
    """Row r of the file's q or k matrix is row order[r] of ours: i64 [heads * head_dim].

    Neighbouring pairs (2j, 2j+1) of the rotated dims become halves (j, j + rope_dim / 2), as glm4 files with
    rope sections have them. Products of q and k do not change.
    """
    rotary, head_dim = config.rope_dim, config.head_dim
    head = torch.cat([torch.arange(0, rotary, 2), torch.arange(1, rotary, 2), torch.arange(rotary, head_dim)])
    return (torch.arange(num_heads)[:, None] * head_dim + head).reshape(-1)


def _silent_layers(text: TextConfig) -> dict[str, StoredTensor]:
    """A feed-forward part of zeros for each pruned layer: its branch is RMS(0) = 0, whatever the norms are."""
    stored: dict[str, StoredTensor] = {}
    shapes = {"gate_up_proj": (2 * text.ffn_size, text.hidden_size), "down_proj": (text.hidden_size, text.ffn_size)}
    for layer in text.pruned_ffn:
        for part, shape in shapes.items():
            name = f"text.layers.{layer}.mlp.{part}.weight"
            type_ = weight_type(name, shape, text.num_layers)
            stored[gguf_name(name)] = store_tensor(name, torch.zeros(shape), type_, {})
        for norm in ("post_attention_layernorm", "post_mlp_layernorm"):
            name = gguf_name(f"text.layers.{layer}.{norm}.weight")
            stored[name] = StoredTensor(np.ones(text.hidden_size, np.float32), GGMLType.F32)
    return stored


# --- metadata ----------------------------------------------------------------------------------------------


def text_metadata(config: PhoneConfig, name: str, stored: Mapping[str, StoredTensor]) -> dict[str, MetadataValue]:
    """The keys of the text file but for the tokenizer's."""
    text = config.text
    values: dict[str, MetadataValue] = {
        **_general(name, "model", _FILE_TYPE_Q4_K_M, stored),
        "glm4.block_count": text.num_layers,
        "glm4.context_length": text.context_length,
        "glm4.embedding_length": text.hidden_size,
        "glm4.feed_forward_length": text.ffn_size,
        "glm4.attention.head_count": text.num_heads,
        "glm4.attention.head_count_kv": text.num_kv_heads,
        "glm4.attention.layer_norm_rms_epsilon": text.rms_norm_eps,
        "glm4.rope.dimension_count": text.rope_dim,
        "glm4.rope.freq_base": text.rope_theta,
        "glm4.rope.dimension_sections": [*text.rope_sections, 0],
        "autoglm.attention_mode": text.attention_mode,
    }
    if text.head_dim * text.num_heads != text.hidden_size:
        values["glm4.attention.key_length"] = values["glm4.attention.value_length"] = text.head_dim
    if text.pruned_ffn:
        values["autoglm.pruned_ffn_layers"] = sorted(text.pruned_ffn)
    return values


def mmproj_metadata(config: PhoneConfig, name: str, stored: Mapping[str, StoredTensor]) -> dict[str, MetadataValue]:
    """The keys of the mmproj file."""
    vision, audio, width = config.vision, config.audio, config.text.hidden_size
    values: dict[str, MetadataValue] = {
        **_general(name, "mmproj", _FILE_TYPE_Q8_0, stored),
        "clip.projector_type": PROJECTOR_TYPE,
        "clip.has_vision_encoder": True,
        "clip.has_audio_encoder": audio is not None,
        "clip.use_gelu": True,
        "clip.vision.projector_type": PROJECTOR_TYPE,
        "clip.vision.image_size": vision.patch_size * max(vision.position_grid),
        "clip.vision.image_max_pixels": vision.max_pixels,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.spatial_merge_size": vision.merge_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.mlp_size,
        "clip.vision.block_count": vision.num_layers,
        "clip.vision.attention.head_count": vision.num_heads,
        "clip.vision.attention.layer_norm_epsilon": vision.layer_norm_eps,
        "clip.vision.projection_dim": width,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
        "gcmf.vision.position_grid": list(vision.position_grid),
        "gcmf.mode": config.fusion.mode,
        "gcmf.attention.head_count": config.fusion.num_heads,
        "gcmf.projector_length": config.fusion.projector_size,
        "gcmf.preset": config.name,
    }
    if vision.stem_channels:
        values["gcmf.vision.stem_channels"] = list(vision.stem_channels)
    if audio is not None:
        values |= {
            "clip.audio.projector_type": PROJECTOR_TYPE,
            "clip.audio.num_mel_bins": audio.num_mels,
            "clip.audio.embedding_length": audio.hidden_size,
            "clip.audio.feed_forward_length": audio.mlp_size,
            "clip.audio.block_count": audio.num_layers,
            "clip.audio.attention.head_count": audio.num_heads,
            "clip.audio.attention.layer_norm_epsilon": audio.layer_norm_eps,
            "clip.audio.projection_dim": width,
            "clip.audio.conv_kernel_size": audio.kernel_size,
            "gcmf.audio.max_seconds": audio.max_seconds,
        }
        if audio.stem_residuals:
            values["gcmf.audio.stem_residuals"] = audio.stem_residuals
        else:
            values["gcmf.audio.subsample_channels"] = audio.subsample_channels
    return values


def _general(name: str, kind: str, file_type: int, stored: Mapping[str, StoredTensor]) -> dict[str, MetadataValue]:
    count = sum(tensor.num_elements for tensor in stored.values())
    return {
        "general.type": kind,
        "general.name": name,
        "general.size_label": f"{count / 1e6:.1f}M",
        "general.license": "apache-2.0",
        "general.languages": ["zh", "en"],
        "general.file_type": file_type,
        "general.quantization_version": 2,
        "autoglm.preprocessing_revision": PREPROCESSING_REVISION,
    }


def _checked(key: str, value: object) -> MetadataValue:
    if isinstance(value, str | int | float | list):
        return value
    raise ConfigError(f"metadata key {key} cannot hold a {type(value).__name__}")
