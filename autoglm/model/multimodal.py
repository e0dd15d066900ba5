"""The mmproj beside a backbone: its encoders, whether the two belong together, and prompts with media in them.

A prompt comes with one placeholder token per picture and sound. Each is widened to the tokens its medium becomes, every
token gets its three positions, and what must be encoded is handed to the engine as jobs:

    glm4v   a job per picture; its tokens see each other as text does
    gcmf    a job per user turn, because fusion mixes all of a turn's media with its words; tokens of one medium see
            each other both ways where the backbone's attention mode is "media"

What the encoders made of a picture or a sound alone is remembered too: the same screen under other words is not looked
at twice.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autoglm.config import ModelConfig
from autoglm.errors import FormatError, RequestError
from autoglm.formats.gguf import GGUFFile
from autoglm.kernels import Runtime
from autoglm.media.glm4v_pixels import MAX_PIXELS, MIN_PIXELS, PatchGrid, patch_grid, pixel_values
from autoglm.media.log_mel import log_mel, num_frames
from autoglm.media.pictures import Picture
from autoglm.media.pixel_budget import PixelBudget
from autoglm.media.prompt_media import EmbeddingMemory, Encoding, MediaJob, MediaSpan, PromptMedia
from autoglm.media.screen_pixels import encoder_pixels, encoder_size
from autoglm.media.sounds import Sound
from autoglm.model.encoder import beside
from autoglm.model.gcmf_audio import GcmfAudio, read_gcmf_audio_config
from autoglm.model.gcmf_fusion import GcmfFusion
from autoglm.model.gcmf_vision import GcmfVision, read_gcmf_vision_config
from autoglm.model.glm4v_vision import Glm4vVision, read_glm4v_config
from autoglm.model.loader import Progress, WeightReader

logger = logging.getLogger(__name__)

PROJECTOR_TYPES = ("gcmf", "glm4v")
Embed = Callable[[NDArray[np.int32]], NDArray[np.float32]]  # token ids -> rows of the backbone's table
_REMEMBERED_BYTES = 64 << 20


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


class Multimodal:
    """Encoders of one mmproj, joined to one backbone.

    embed    rows of the backbone's token table: fusion reads the turn's words
    Raises FormatError, in one sentence with the mend, for a file that is no mmproj or belongs to another backbone.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        runtime: Runtime,
        backbone: ModelConfig,
        tokens: MediaTokens,
        embed: Embed,
        *,
        progress: Progress | None = None,
    ) -> None:
        self.kind = check_projector(gguf, backbone)
        self.tokens = tokens
        self._embed, self._two_way = embed, backbone.attention_mode == "media"
        self._memory = EmbeddingMemory(_REMEMBERED_BYTES)
        self._file = f"{gguf.path.name}:{gguf.file_bytes}".encode()
        if tokens.image is None:
            raise FormatError(
                f"{gguf.path}: the backbone {backbone.name} has no token for pictures, so this mmproj cannot belong to "
                "it; mend: give both files of one model"
            )
        reader = WeightReader(gguf, runtime, progress)
        self._audio: GcmfAudio | None = None
        self._glm4v: Glm4vVision | None = None
        if self.kind == "glm4v":
            self._glm4v = Glm4vVision(runtime, reader, read_glm4v_config(gguf))
        else:
            self._vision = GcmfVision(reader, read_gcmf_vision_config(gguf))
            if gguf.get("clip.has_audio_encoder", bool, False):
                self._audio = GcmfAudio(reader, read_gcmf_audio_config(gguf))
            self._fusion = GcmfFusion(reader, gguf, backbone.hidden_size)
        reader.finish()

    @property
    def has_ears(self) -> bool:
        return self._audio is not None

    def pixel_budget(self, default: int | None = None) -> PixelBudget:
        """The range of max_pixels, and what a picture gets where nobody names one. ConfigError for a bad default.

        For glm4v pixels count twice, once for each frame of a still picture, as its own processor counts them.
        """
        if self._glm4v is not None:
            return PixelBudget(MIN_PIXELS, MAX_PIXELS, default or MAX_PIXELS)
        config = self._vision.config
        least = (config.patch_size * config.merge_size) ** 2
        return PixelBudget(least, config.max_pixels, default or config.max_pixels)

    def picture_size(self, width: int, height: int, max_pixels: int | None = None) -> PictureSize:
        """What a picture of width x height pixels becomes. Raises RequestError for one that has no sensible size."""
        if self._glm4v is not None:
            grid = patch_grid(width, height, **({} if max_pixels is None else {"max_pixels": max_pixels}))
            _, rows, columns = grid.image_grid_thw
            return PictureSize(grid.width, grid.height, rows // 2, columns // 2)
        config = self._vision.config
        factor = config.patch_size * config.merge_size
        most = config.max_pixels if max_pixels is None else min(max_pixels, config.max_pixels)
        wide, high = encoder_size(width, height, max_pixels=most, factor=factor)
        return PictureSize(wide, high, high // factor, wide // factor)

    def sound_tokens(self, sound: Sound) -> int:
        """Decoder tokens of a sound: one per 40 ms."""
        return (num_frames(sound.samples.size) + 3) // 4

    def plan(
        self,
        token_ids: Sequence[int],
        pictures: Sequence[Picture],
        sounds: Sequence[Sound],
        *,
        max_pixels: int | None = None,
    ) -> tuple[list[int], PromptMedia]:
        """A prompt with one placeholder per medium -> the widened prompt and its media.

        Raises RequestError when the placeholders are not as many as the media, or a sound meets no ears.
        """
        self._check_counts(token_ids, len(pictures), len(sounds))
        sizes = [self.picture_size(p.width, p.height, max_pixels) for p in pictures]
        widened = _Widened(token_ids, self.tokens, sizes, [self.sound_tokens(sound) for sound in sounds])
        two_way = self._two_way
        if self._glm4v is not None:
            jobs = [
                self._picture_job(picture, size, MediaSpan(*span, two_way))
                for picture, size, span in zip(pictures, sizes, widened.pictures, strict=True)
            ]
        else:
            jobs = self._turn_jobs(widened, list(pictures), sizes, list(sounds))
        return widened.ids, PromptMedia(jobs, widened.positions())

    def _check_counts(self, token_ids: Sequence[int], num_pictures: int, num_sounds: int) -> None:
        if num_sounds and (self._audio is None or self.tokens.audio is None):
            raise RequestError(
                "this model has no ears: its mmproj holds no audio encoder; send the words as text",
                param="messages",
                code="unsupported_content",
            )
        for name, token, count in (
            ("picture", self.tokens.image, num_pictures),
            ("sound", self.tokens.audio, num_sounds),
        ):
            found = list(token_ids).count(token) if token is not None else 0
            if found != count:
                raise RequestError(
                    f"the chat template made {found} places for {count} {name}s; "
                    "mend: serve with a chat template that knows them (--chat-template-file)",
                    param="messages",
                )

    # -- glm4v: each picture by itself --

    def _picture_job(self, picture: Picture, size: PictureSize, span: MediaSpan) -> MediaJob:
        vision = self._glm4v
        assert vision is not None

        def encode(slice_s: float) -> Encoding:
            def patches() -> NDArray[np.float32]:
                return pixel_values(picture.rgb, PatchGrid(size.width, size.height))

            return vision.encode(patches, size.rows * 2, size.columns * 2, slice_s)

        return MediaJob(self._key(b"picture", picture.content_hash, _bytes(size.width, size.height)), (span,), encode)

    # -- gcmf: all media of a turn together --

    def _turn_jobs(
        self, widened: _Widened, pictures: list[Picture], sizes: list[PictureSize], sounds: list[Sound]
    ) -> list[MediaJob]:
        jobs = []
        for start, end in widened.turns():
            seen = [i for i, span in enumerate(widened.pictures) if start <= span[0] < end]
            heard = [i for i, span in enumerate(widened.sounds) if start <= span[0] < end]
            if seen or heard:
                turn = _Turn(
                    [(pictures[i], sizes[i], widened.pictures[i]) for i in seen],
                    [(sounds[i], widened.sounds[i]) for i in heard],
                    widened.words(start, end),
                )
                jobs.append(self._turn_job(turn))
        return jobs

    def _turn_job(self, turn: _Turn) -> MediaJob:
        spans = sorted([*(span for *_, span in turn.pictures), *(span for _, span in turn.sounds)])
        key = self._key(
            b"turn",
            *(picture.content_hash + _bytes(size.width, size.height, *span) for picture, size, span in turn.pictures),
            *(sound.content_hash + _bytes(*span) for sound, span in turn.sounds),
            turn.words.tobytes(),
        )

        def encode(slice_s: float) -> Encoding:
            tokens: dict[str, list[NDArray[np.float32]]] = {"vision": [], "audio": []}
            for picture, size, _ in turn.pictures:
                tokens["vision"].append((yield from self._see(picture, size, slice_s)))
            for sound, _ in turn.sounds:
                tokens["audio"].append((yield from self._hear(sound, slice_s)))
            present = {name: np.concatenate(parts) for name, parts in tokens.items() if parts}
            if len(turn.words):
                present["text"] = self._embed(turn.words)
            fused = self._fusion.fuse(present)
            placed: list[tuple[tuple[int, int], NDArray[np.float32]]] = []
            for name, own in (("vision", [s for *_, s in turn.pictures]), ("audio", [s for _, s in turn.sounds])):
                row = 0
                for span in own:
                    placed.append((span, fused.tokens[name][row : row + span[1] - span[0]]))
                    row += span[1] - span[0]
            return np.concatenate([rows for _, rows in sorted(placed, key=lambda pair: pair[0])])

        return MediaJob(key, tuple(MediaSpan(*span, self._two_way) for span in spans), encode)

    def _see(self, picture: Picture, size: PictureSize, slice_s: float) -> Encoding:
        key = self._key(b"seen", picture.content_hash, _bytes(size.width, size.height))
        found = self._memory.get(key)
        if found is None:
            # plan() fixed the size, so the budget that gives it is its area.
            config = self._vision.config
            resize = partial(
                encoder_pixels,
                Image.fromarray(picture.rgb),
                max_pixels=size.width * size.height,
                factor=config.patch_size * config.merge_size,
            )
            pixels = yield from beside(resize, slice_s)
            found = yield from self._vision.encode(pixels, slice_s)
            self._memory.put(key, found)
        return found

    def _hear(self, sound: Sound, slice_s: float) -> Encoding:
        assert self._audio is not None
        key = self._key(b"heard", sound.content_hash)
        found = self._memory.get(key)
        if found is None:
            mel = yield from beside(partial(log_mel, sound.samples), slice_s)
            found = yield from self._audio.encode(mel)
            self._memory.put(key, found)
        return found

    def _key(self, *parts: bytes) -> bytes:
        digest = hashlib.sha256(self._file)
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.digest()


@dataclass(frozen=True)
class _Turn:
    """The media of one user turn, each with its span in the prompt, and the ids of its words."""

    pictures: list[tuple[Picture, PictureSize, tuple[int, int]]]
    sounds: list[tuple[Sound, tuple[int, int]]]
    words: NDArray[np.int32]


class _Widened:
    """A prompt whose placeholders have become as many tokens as their media."""

    def __init__(
        self, token_ids: Sequence[int], tokens: MediaTokens, sizes: Sequence[PictureSize], sounds: Sequence[int]
    ) -> None:
        self.ids: list[int] = []
        self.pictures: list[tuple[int, int]] = []
        self.sounds: list[tuple[int, int]] = []
        self._tokens, self._sizes = tokens, sizes
        for token_id in token_ids:
            start, count = len(self.ids), 1
            if token_id == tokens.image:
                size = sizes[len(self.pictures)]
                count = size.rows * size.columns
                self.pictures.append((start, start + count))
            elif token_id == tokens.audio:
                count = sounds[len(self.sounds)]
                self.sounds.append((start, start + count))
            self.ids += [token_id] * count

    def turns(self) -> list[tuple[int, int]]:
        """User turns as (first token, end), each from its role's token to the next role's."""
        starts = [i for i, token_id in enumerate(self.ids) if token_id in self._tokens.roles]
        ends = [*starts[1:], len(self.ids)]
        turns = [(a, b) for a, b in zip(starts, ends, strict=False) if self.ids[a] == self._tokens.user]
        # Media outside of any user turn (a tool's picture) belong to the stretch they stand in.
        return turns or [(0, len(self.ids))]

    def words(self, start: int, end: int) -> NDArray[np.int32]:
        """What was typed in a turn: its tokens but for the role with its line break, media and their markers."""
        media = {self._tokens.image, self._tokens.audio} | self._tokens.markers
        kept = [token_id for token_id in self.ids[start + 2 : end] if token_id not in media]
        return np.array(kept, np.int32)

    def positions(self) -> NDArray[np.int32]:
        """i32 [3, tokens]: a text or sound token at p has p three times; the token (y, x) of a picture that begins at p
        has (p, p + y, p + x), and p grows by its longer side."""
        columns: list[NDArray[np.int32]] = []
        where, at = 0, 0
        for (start, end), size in zip(self.pictures, self._sizes, strict=True):
            columns.append(_straight(where, start - at))
            where += start - at
            y, x = np.divmod(np.arange(end - start, dtype=np.int32), size.columns)
            columns.append(np.stack([np.zeros_like(y), y, x]) + np.int32(where))
            where, at = where + max(size.rows, size.columns), end
        columns.append(_straight(where, len(self.ids) - at))
        return np.ascontiguousarray(np.concatenate(columns, axis=1), np.int32)


def _straight(start: int, count: int) -> NDArray[np.int32]:
    return np.tile(np.arange(start, start + count, dtype=np.int32), (3, 1))


def _bytes(*numbers: int) -> bytes:
    return np.array(numbers, np.int64).tobytes()


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
    width = gguf.get("clip.vision.projection_dim", int)
    if width != backbone.hidden_size:
        raise FormatError(
            f"{gguf.path}: makes tokens of width {width}, and {backbone.name} takes {backbone.hidden_size}; "
            "mend: give the mmproj that was made for this model"
        )
    return kind


def two_way_tokens(gguf: GGUFFile, backbone: ModelConfig, max_sound_s: float) -> int:
    """Tokens of the largest medium that must be read in one step, from the headers alone; 0 where none must."""
    if backbone.attention_mode != "media" or read_projector_type(gguf) != "gcmf":
        return 0
    side = gguf.get("clip.vision.patch_size", int) * gguf.get("clip.vision.spatial_merge_size", int)
    picture = gguf.get("clip.vision.image_max_pixels", int) // max(1, side * side)
    return max(picture, round(max_sound_s * 25) + 1 if gguf.get("clip.has_audio_encoder", bool, False) else 0)
