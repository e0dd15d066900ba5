"""What an mmproj's header tells before its weights are read, and whether it belongs to a backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autoglm.config import ModelConfig
from autoglm.errors import FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.media.glm4v_pixels import MAX_PIXELS, MIN_PIXELS, patch_grid
from autoglm.media.pixel_budget import PixelBudget
from autoglm.media.screen_pixels import encoder_size
from autoglm.model.gcmf_vision import read_gcmf_vision_config

PROJECTOR_TYPES = ("gcmf", "glm4v")


@dataclass(frozen=True)
class MediaTokens:
    """Ids of the tokens that stand around and for media; None where the backbone has none."""

    image: int | None
    audio: int | None
    roles: frozenset[int]  # each begins a turn
    user: int | None
    markers: frozenset[int]  # begin and end of a picture or a sound


def find_media_tokens(token_id: Callable[[str], int | None]) -> MediaTokens:
    """The GLM family's tokens for media and turns. token_id: a token's spelling -> its id."""

    def ids(*spellings: str) -> frozenset[int]:
        return frozenset(found for text in spellings if (found := token_id(text)) is not None)

    media = [f"<|{side}_of_{kind}|>" for side in ("begin", "end") for kind in ("image", "audio")]
    return MediaTokens(
        image=token_id("<|image|>"),
        audio=token_id("<|audio|>"),
        roles=ids("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        user=token_id("<|user|>"),
        markers=ids(*media),
    )


@dataclass(frozen=True)
class PictureSize:
    """What a picture becomes: pixels after resizing, and rows and columns of decoder tokens."""

    width: int
    height: int
    rows: int
    columns: int


def picture_size(gguf: GGUFFile, width: int, height: int, max_pixels: int | None = None) -> PictureSize:
    """What a picture of width x height pixels becomes. Raises RequestError for one that has no sensible size."""
    if read_projector_type(gguf) == "glm4v":
        grid = patch_grid(width, height, **({} if max_pixels is None else {"max_pixels": max_pixels}))
        _, rows, columns = grid.image_grid_thw
        return PictureSize(grid.width, grid.height, rows // 2, columns // 2)
    config = read_gcmf_vision_config(gguf)
    factor = config.patch_size * config.merge_size
    most = config.max_pixels if max_pixels is None else min(max_pixels, config.max_pixels)
    wide, high = encoder_size(width, height, max_pixels=most, factor=factor)
    return PictureSize(wide, high, high // factor, wide // factor)


def read_projector_type(gguf: GGUFFile) -> str:
    """glm4v or gcmf. Raises FormatError for a file that is no mmproj or of a kind this build cannot run."""
    architecture = gguf.get("general.architecture", str)
    if architecture != "clip":
        raise FormatError(
            f"{gguf.path}: this is a model of architecture {architecture[:40]!r}, not a multimodal projector; "
            "give it with --model, and the mmproj file with --mmproj"
        )
    kind = gguf.get("clip.projector_type", str, "") or gguf.get("clip.vision.projector_type", str, "")
    if kind not in PROJECTOR_TYPES:
        raise FormatError(
            f"{gguf.path}: projector type {kind[:40]!r} is not supported; "
            f"this build runs {' and '.join(PROJECTOR_TYPES)}"
        )
    return kind


def check_projector(gguf: GGUFFile, backbone: ModelConfig) -> str:
    """The projector's type, from its header alone. Raises FormatError unless it runs here and fits the backbone."""
    kind = read_projector_type(gguf)
    for part in ("vision", "audio") if has_audio_encoder(gguf) else ("vision",):
        width = gguf.get(f"clip.{part}.projection_dim", int)
        if width != backbone.hidden_size:
            raise FormatError(
                f"{gguf.path}: makes tokens of width {width}, and {backbone.name} takes {backbone.hidden_size}; "
                "mend: give the mmproj that was made for this model"
            )
    if backbone.mrope_section is None:
        # Every token of a picture would stand at one place: the answers are fluent and blind.
        raise FormatError(
            f"{gguf.path}: the backbone {backbone.name} has no rotary sections ({backbone.architecture}."
            "rope.dimension_sections), without which a picture's tokens have no rows and columns; mend: give a text "
            "model made for pictures, or convert it anew with autoglm convert"
        )
    return kind


def has_audio_encoder(gguf: GGUFFile) -> bool:
    """Whether the file hears."""
    return gguf.get("clip.has_audio_encoder", bool, False)


def check_tokens(gguf: GGUFFile, backbone: ModelConfig, tokens: MediaTokens) -> None:
    """Raises FormatError where the backbone's vocabulary has no place for what the encoders make."""
    needed = [("pictures", tokens.image)] + ([("sounds", tokens.audio)] if has_audio_encoder(gguf) else [])
    for media, token in needed:
        if token is None:
            raise FormatError(
                f"{gguf.path}: the backbone {backbone.name} has no token for {media}, so this mmproj cannot belong to "
                "it; mend: give both files of one model"
            )


def pixel_budget(gguf: GGUFFile, default: int | None = None, most: int | None = None) -> PixelBudget:
    """The range of max_pixels, and what a picture gets where nobody names one.

    default  the operator's choice; None: as many as may be
    most     what there is memory for; None: the model's own maximum
    For glm4v pixels count twice, once for each frame of a still picture, as its own processor counts them.
    Raises ConfigError for a default outside the range.
    """
    if read_projector_type(gguf) == "glm4v":
        least, largest = MIN_PIXELS, MAX_PIXELS
    else:
        config = read_gcmf_vision_config(gguf)
        least, largest = (config.patch_size * config.merge_size) ** 2, config.max_pixels
    largest = largest if most is None else min(most, largest)
    return PixelBudget(least, largest, default or largest)


def two_way_tokens(gguf: GGUFFile, backbone: ModelConfig, max_sound_s: float) -> int:
    """Tokens of the largest medium that must be read in one step, from the headers alone; 0 where none must."""
    if backbone.attention_mode != "media" or read_projector_type(gguf) != "gcmf":
        return 0
    side = gguf.get("clip.vision.patch_size", int) * gguf.get("clip.vision.spatial_merge_size", int)
    picture = gguf.get("clip.vision.image_max_pixels", int) // max(1, side * side)
    return max(picture, round(max_sound_s * 25) + 1 if has_audio_encoder(gguf) else 0)
