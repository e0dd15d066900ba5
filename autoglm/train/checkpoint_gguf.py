"""A GGUF pair -> model config, PyTorch weights with their grids, and tokenizer: what export.py wrote, read back.

Every tensor is used once and none may be missing. A matrix of a type that has a grid comes with it (`grid_*`), so that
a model with QAT attached computes with the very codes of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoglm.errors import ConfigError, FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.formats.quant_types import GGMLType, row_bytes
from autoglm.formats.tensor_names import torch_name
from autoglm.kernels import dequantize
from autoglm.pack.type_plan import weight_type
from autoglm.train.export import PREPROCESSING_REVISION, PROJECTOR_TYPE, check_state, rotary_row_order
from autoglm.train.grids import GRID_TYPES, unpack
from autoglm.train.model import (
    AudioConfig,
    AutoGLMPhone,
    FusionConfig,
    PhoneConfig,
    TextConfig,
    VisionConfig,
)
from autoglm.train.quantization import GRID_PREFIX, attach_qat
from autoglm.train.tokenizer import NanoTokenizer


@dataclass(frozen=True)
class GGUFPair:
    """What a pair of files holds.

    state  every parameter of `AutoGLMPhone(config)` in f32, and the `grid_*` of quantized matrices
    types  parameter name -> the type it is stored as
    """

    config: PhoneConfig
    state: dict[str, Tensor]
    types: dict[str, GGMLType]
    tokenizer: NanoTokenizer


def read_pair(text_path: Path, mmproj_path: Path) -> GGUFPair:
    """Read both files. Raises FormatError naming the file and what is wrong with it."""
    with GGUFFile.open(text_path) as text, GGUFFile.open(mmproj_path) as mmproj:
        config = _read_config(text, mmproj)
        state: dict[str, Tensor] = {}
        types: dict[str, GGMLType] = {}
        for file in (text, mmproj):
            for name in file.tensors:
                parameter = torch_name(name)
                types[parameter] = file.tensors[name].type
                state.update(_read_tensor(file, name, parameter, config.text))
        try:
            check_state(state, config)
        except ConfigError as error:
            raise FormatError(f"{text_path} and {mmproj_path}: {error}; fetch or export both files again") from None
        return GGUFPair(config, state, types, _read_tokenizer(text))


def load_pair(text_path: Path, mmproj_path: Path) -> tuple[AutoGLMPhone, NanoTokenizer]:
    """The model of a pair, ready to run, with the engine's rounding of activations.

    A pair of other types than ours (nothing to round by) becomes a plain model on its dequantized weights.
    """
    pair = read_pair(text_path, mmproj_path)
    model = AutoGLMPhone(pair.config).eval()
    num_layers = pair.config.text.num_layers
    ours = all(weight_type(n, tuple(pair.state[n].shape), num_layers) == type_ for n, type_ in pair.types.items())
    if ours:
        attach_qat(model, "fast")  # only for the buffers' shapes; the file's grids follow
    model.load_state_dict(
        pair.state if ours else {name: value for name, value in pair.state.items() if name in pair.types}
    )
    return model, pair.tokenizer


def _read_tensor(file: GGUFFile, name: str, parameter: str, text: TextConfig) -> dict[str, Tensor]:
    """The parameter and its grid, rows back in our order."""
    info = file.tensors[name]
    data, type_ = file.data(name), info.type
    if len(info.shape) == 2 and type_ in GRID_TYPES:
        rows = torch.from_numpy(data.copy()).reshape(info.shape[0], row_bytes(type_, info.shape[1]))
        grid, codes = unpack(rows[_row_order(file, parameter, text, info.shape[0])], type_)
        prefix = parameter.removesuffix("weight") + GRID_PREFIX
        return {parameter: grid.values(codes), **{prefix + part: value for part, value in grid.tensors().items()}}
    count = 1
    for length in info.shape:
        count *= length
    value = torch.from_numpy(dequantize(data, int(type_), count).copy()).reshape(info.shape)
    if parameter == "vision.patch_embed.weight":
        value = value.flatten(1)
    return {parameter: value[_row_order(file, parameter, text, value.shape[0])]}


def _row_order(file: GGUFFile, parameter: str, text: TextConfig, rows: int) -> Tensor:
    """Which row of the file each of ours is: the inverse of the export's permutation of q and k."""
    heads = {"q_proj": text.num_heads, "k_proj": text.num_kv_heads}.get(parameter.split(".")[-2])
    if heads is None or not parameter.startswith("text."):
        return torch.arange(rows)
    order = rotary_row_order(text, heads)
    if len(order) != rows:
        raise FormatError(f"{file.path}: {parameter} has {rows} rows, expected {len(order)} by the header")
    return torch.argsort(order)


# --- metadata ----------------------------------------------------------------------------------------------


def _read_config(text: GGUFFile, mmproj: GGUFFile) -> PhoneConfig:
    if text.get("general.architecture", str) != "glm4":
        raise FormatError(f"{text.path}: is not the text file of a pair; name the glm4 file first, then its mmproj")
    if mmproj.get("clip.projector_type", str, "none") != PROJECTOR_TYPE:
        raise FormatError(f"{mmproj.path}: is not an mmproj with {PROJECTOR_TYPE} fusion; name the mmproj of the pair")
    for file in (text, mmproj):
        revision = file.get("autoglm.preprocessing_revision", int)
        if revision != PREPROCESSING_REVISION:
            raise FormatError(
                f"{file.path}: preprocessing revision {revision}, this build knows {PREPROCESSING_REVISION}; "
                "use the autoglm that wrote it, or export the model again"
            )
    try:
        return PhoneConfig(
            mmproj.get("gcmf.preset", str),
            _vision_config(mmproj),
            _audio_config(mmproj) if mmproj.get("clip.has_audio_encoder", bool, False) else None,
            FusionConfig(
                num_heads=_count(mmproj, "gcmf.attention.head_count"),
                projector_size=_count(mmproj, "gcmf.projector_length"),
                mode=mmproj.get("gcmf.mode", str),  # type: ignore[arg-type]
            ),
            _text_config(text),
        )
    except ConfigError as error:
        raise FormatError(f"{text.path} and {mmproj.path}: {error}") from None


def _text_config(file: GGUFFile) -> TextConfig:
    hidden, heads = _count(file, "glm4.embedding_length"), _count(file, "glm4.attention.head_count")
    sections = _integers(file, "glm4.rope.dimension_sections", 4)
    tokens: list[object] = file.get("tokenizer.ggml.tokens", list)
    return TextConfig(
        vocab_size=len(tokens),
        hidden_size=hidden,
        num_layers=_count(file, "glm4.block_count"),
        num_heads=heads,
        num_kv_heads=_count(file, "glm4.attention.head_count_kv"),
        head_dim=file.get("glm4.attention.key_length", int, hidden // heads),
        ffn_size=_count(file, "glm4.feed_forward_length"),
        rope_dim=_count(file, "glm4.rope.dimension_count"),
        rope_sections=(sections[0], sections[1], sections[2]),
        context_length=_count(file, "glm4.context_length"),
        rope_theta=file.get("glm4.rope.freq_base", float),
        rms_norm_eps=_float32(file, "glm4.attention.layer_norm_rms_epsilon"),
        attention_mode=file.get("autoglm.attention_mode", str, "causal"),  # type: ignore[arg-type]
        pruned_ffn=tuple(file.get("autoglm.pruned_ffn_layers", list, [])),
    )


def _vision_config(file: GGUFFile) -> VisionConfig:
    rows, columns = _integers(file, "gcmf.vision.position_grid", 2)
    stem = (
        tuple(_integers(file, "gcmf.vision.stem_channels", 3)) if "gcmf.vision.stem_channels" in file.metadata else ()
    )
    return VisionConfig(
        hidden_size=_count(file, "clip.vision.embedding_length"),
        num_layers=_count(file, "clip.vision.block_count"),
        num_heads=_count(file, "clip.vision.attention.head_count"),
        mlp_size=_count(file, "clip.vision.feed_forward_length"),
        patch_size=_count(file, "clip.vision.patch_size"),
        merge_size=_count(file, "clip.vision.spatial_merge_size"),
        position_grid=(rows, columns),
        max_pixels=file.get("clip.vision.image_max_pixels", int),
        stem_channels=stem,
        stem_norms=not stem,  # in a file they are folded
        layer_norm_eps=_float32(file, "clip.vision.attention.layer_norm_epsilon"),
    )


def _audio_config(file: GGUFFile) -> AudioConfig:
    stem = _count(file, "gcmf.audio.stem_residuals") if "gcmf.audio.stem_residuals" in file.metadata else 0
    channels = AudioConfig.subsample_channels if stem else _count(file, "gcmf.audio.subsample_channels")
    return AudioConfig(
        hidden_size=_count(file, "clip.audio.embedding_length"),
        num_layers=_count(file, "clip.audio.block_count"),
        num_heads=_count(file, "clip.audio.attention.head_count"),
        mlp_size=_count(file, "clip.audio.feed_forward_length"),
        kernel_size=_count(file, "clip.audio.conv_kernel_size"),
        subsample_channels=channels,
        stem_residuals=stem,
        stem_norms=not stem,
        num_mels=_count(file, "clip.audio.num_mel_bins"),
        max_seconds=_count(file, "gcmf.audio.max_seconds"),
        layer_norm_eps=_float32(file, "clip.audio.attention.layer_norm_epsilon"),
    )


def _count(file: GGUFFile, key: str) -> int:
    """A size the file can be meant to have: a layer has tensors, a width stays below a million."""
    value, most = file.get(key, int), len(file.tensors) if key.endswith("block_count") else 1 << 20
    if not 1 <= value <= most:
        raise FormatError(f"{file.path}: metadata key {key} is {value}, expected 1 to {most}")
    return value


def _float32(file: GGUFFile, key: str) -> float:
    """A constant such as 1e-5 that went through 32 bits, as the shortest decimal that does the same."""
    return float(f"{file.get(key, float):.6g}")


def _integers(file: GGUFFile, key: str, count: int) -> list[int]:
    values: list[int] = file.get(key, list)
    if len(values) != count or not all(type(value) is int for value in values):
        raise FormatError(f"{file.path}: metadata key {key} must hold {count} whole numbers")
    return values


def _read_tokenizer(file: GGUFFile) -> NanoTokenizer:
    tokens: list[str] = file.get("tokenizer.ggml.tokens", list)
    types: list[int] = file.get("tokenizer.ggml.token_type", list)
    merges: list[str] = file.get("tokenizer.ggml.merges", list)
    if len(types) != len(tokens) or not all(" " in merge[1:] for merge in merges):
        raise FormatError(f"{file.path}: the tokenizer's types or merges do not fit its tokens; fetch the file again")
    # The first space after the first character parts a merge: a merge may begin with one.
    cuts = [merge.index(" ", 1) for merge in merges]
    pairs = tuple((merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True))
    return NanoTokenizer(tuple(tokens), tuple(types), pairs)
