"""The mmproj beside a backbone: its encoders, and prompts with media in them.

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
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from autoglm.config import ModelConfig
from autoglm.errors import RequestError
from autoglm.formats.gguf import GGUFFile
from autoglm.kernels import Runtime
from autoglm.media.glm4v_pixels import PatchGrid, pixel_values
from autoglm.media.log_mel import log_mel, num_frames
from autoglm.media.pictures import Picture
from autoglm.media.pixel_budget import PixelBudget
from autoglm.media.prompt_media import (
    Embeddings,
    Encoded,
    Encoding,
    MediaJob,
    MediaSpan,
    PromptMedia,
    TurnFusion,
)
from autoglm.media.recently_used import RecentlyUsed
from autoglm.media.screen_pixels import stretched
from autoglm.media.sounds import Sound
from autoglm.model.encoder import beside
from autoglm.model.gcmf_audio import GcmfAudio, read_gcmf_audio_config
from autoglm.model.gcmf_fusion import GcmfFusion
from autoglm.model.gcmf_vision import GcmfVision, read_gcmf_vision_config
from autoglm.model.glm4v_vision import Glm4vVision, read_glm4v_config
from autoglm.model.loader import Progress, WeightReader
from autoglm.model.projector import (
    MediaTokens,
    PictureSize,
    check_projector,
    check_tokens,
    has_audio_encoder,
    picture_size,
    pixel_budget,
)

logger = logging.getLogger(__name__)

Embed = Callable[[NDArray[np.int32]], NDArray[np.float32]]  # token ids -> rows of the backbone's table
REMEMBERED_BYTES = 64 << 20  # tokens of pictures and sounds alone, before fusion


class Multimodal:
    """Encoders of one mmproj, joined to one backbone.

    embed          rows of the backbone's token table: fusion reads the turn's words
    in_floats      weights are unpacked to f32, see loader.runs_in_floats
    in_background  weights are still being read when this returns: see `reader`; what encodes first waits for them
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
        in_floats: bool = False,
        in_background: bool = False,
    ) -> None:
        self.kind = check_projector(gguf, backbone)
        check_tokens(gguf, backbone, tokens)
        self.tokens = tokens
        self._embed, self._two_way = embed, backbone.attention_mode == "media"
        self._memory = RecentlyUsed[Embeddings](REMEMBERED_BYTES)
        self._gguf = gguf
        self._file = f"{gguf.path.name}:{gguf.file_bytes}".encode()
        self.reader = reader = WeightReader(gguf, runtime, progress, in_floats=in_floats)
        self._audio: GcmfAudio | None = None
        self._glm4v: Glm4vVision | None = None
        if self.kind == "glm4v":
            self._glm4v = Glm4vVision(runtime, reader, read_glm4v_config(gguf))
        else:
            self._vision = GcmfVision(reader, read_gcmf_vision_config(gguf))
            if has_audio_encoder(gguf):
                self._audio = GcmfAudio(reader, read_gcmf_audio_config(gguf))
            self._fusion = GcmfFusion(reader, gguf, backbone.hidden_size)
        reader.finish()
        if not in_background:
            reader.wait()

    @property
    def has_ears(self) -> bool:
        return self._audio is not None

    @property
    def has_fusion(self) -> bool:
        """Whether a turn's media are mixed, so that weights and gates can be told."""
        return self._glm4v is None and self._fusion.is_gated

    def pixel_budget(self, default: int | None = None, most: int | None = None) -> PixelBudget:
        """The range of max_pixels, and what a picture gets where nobody names one; see projector.pixel_budget."""
        return pixel_budget(self._gguf, default, most)

    def picture_size(self, width: int, height: int, max_pixels: int | None = None) -> PictureSize:
        """What a picture of width x height pixels becomes. Raises RequestError for one that has no sensible size."""
        return picture_size(self._gguf, width, height, max_pixels)

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
        tells_fusion: bool = False,
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
        return widened.ids, PromptMedia(jobs, widened.positions(), tells_fusion=tells_fusion)

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

        def encode(slice_s: float) -> Generator[None, float | None, Encoded]:
            patches = partial(pixel_values, picture.rgb, PatchGrid(size.width, size.height))
            return Encoded((yield from vision.encode(patches, size.rows * 2, size.columns * 2, slice_s)))

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

        def encode(slice_s: float) -> Generator[None, float | None, Encoded]:
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
            embeddings = np.concatenate([rows for _, rows in sorted(placed, key=lambda pair: pair[0])])
            return Encoded(embeddings, TurnFusion(fused.weights, fused.gates) if self._fusion.is_gated else None)

        return MediaJob(key, tuple(MediaSpan(*span, self._two_way) for span in spans), encode)

    def _see(self, picture: Picture, size: PictureSize, slice_s: float) -> Encoding:
        key = self._key(b"seen", picture.content_hash, _bytes(size.width, size.height))
        found = self._memory.get(key)
        if found is None:
            from PIL import Image

            resize = partial(stretched, Image.fromarray(picture.rgb), (size.width, size.height))
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
