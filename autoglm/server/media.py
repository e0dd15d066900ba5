"""Pictures and sounds of a chat request: content parts -> bytes -> decoded media -> tokens of the prompt."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from autoglm.engine.fit import MAX_DECODED_BYTES, MediaMemory
from autoglm.errors import CapacityError, RequestError
from autoglm.media.content_parts import KINDS, MediaPart, media_part
from autoglm.media.limits import MediaLimits
from autoglm.media.log_mel import SAMPLE_RATE_HZ
from autoglm.media.pictures import DECODING_BYTES_PER_PIXEL, Picture, checked_header, decode_picture
from autoglm.media.pixel_budget import requested_max_pixels
from autoglm.media.prompt_media import PromptMedia
from autoglm.media.recently_used import RecentlyUsed
from autoglm.media.room import MediaRoom
from autoglm.media.sounds import PADDING_S, Sound, decode_sound
from autoglm.media.sources import MediaSources
from autoglm.server.schemas import ChatRequest, Message

if TYPE_CHECKING:
    from autoglm.model.multimodal import Multimodal

# What the chat template calls a part, by what it holds.
TEMPLATE_TYPES = {"picture": "image", "sound": "audio"}
RECENT_BYTES = 64 << 20  # of decoded media kept for a chat's next turn, which sends them again


class MediaDoor(Struct, frozen=True):
    """What a server that sees and hears needs of media.

    max_pixels   of one picture where a request names none; None: as many as the model takes
    most_pixels  what a request may ask for; None: as many as the model takes
    memory       what encoding takes, for errors that tell it
    room         for decoded pictures and sounds of all requests
    recent       what was decoded last, by the SHA-256 of kind and file; it counts in `room` and goes if that is full
    """

    multimodal: Multimodal
    sources: MediaSources
    limits: MediaLimits = field(default_factory=MediaLimits)
    max_pixels: int | None = None
    most_pixels: int | None = None
    memory: MediaMemory | None = None
    room: MediaRoom = field(default_factory=lambda: MediaRoom(MAX_DECODED_BYTES))
    recent: RecentlyUsed[Picture | Sound] = field(default_factory=lambda: RecentlyUsed(RECENT_BYTES))


class RequestMedia(Struct, frozen=True):
    """The media of one request, in the order of their parts, decoded."""

    pictures: tuple[Picture, ...] = ()
    sounds: tuple[Sound, ...] = ()
    max_pixels: int | None = None
    decode_ms: float = 0.0


class MediaReport(Struct, frozen=True):
    """What a reply tells of its media: token counts, and each picture's size before and after resizing."""

    image_tokens: int = 0
    audio_tokens: int = 0
    pictures: tuple[dict[str, int], ...] = ()


def find_parts(messages: Sequence[Message]) -> list[MediaPart]:
    """The media parts of all messages, in order. Raises RequestError naming a part that is malformed."""
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message.content, list):
            continue
        for index, part in enumerate(message.content):
            medium = media_part(part, f"messages[{number}].content[{index}]") if isinstance(part, dict) else None
            if medium is not None:
                found.append(medium)
    return found


def is_media(part: object) -> bool:
    """Whether a content part carries a medium this server knows."""
    return isinstance(part, dict) and part.get("type") in KINDS


def template_part(part: dict[str, Any]) -> dict[str, str]:
    """A media part as chat templates expect it: its type alone."""
    return {"type": TEMPLATE_TYPES[KINDS[part["type"]]]}


def check_kinds(door: MediaDoor, parts: Sequence[MediaPart]) -> None:
    """Raises RequestError for a sound where the model has no ears, before a byte of it is read."""
    for part in parts:
        if part.kind == "sound" and not door.multimodal.has_ears:
            raise RequestError(
                f"{part.param}: this model has no ears, its mmproj holds no audio encoder; send the words as text",
                param=part.param,
                code="unsupported_content",
            )


def check_settings(door: MediaDoor | None, parts: Sequence[MediaPart], request: ChatRequest) -> None:
    """Raises RequestError for a setting about media that could have no effect on this request."""
    if door is None:
        for name in ("max_pixels", "mm_processor_kwargs", "return_fusion"):
            if getattr(request, name):
                raise _no_effect(name, "this model was loaded without an mmproj and reads text only")
        return
    if request.return_fusion and not door.multimodal.has_fusion:
        raise _no_effect("return_fusion", f"projector type {door.multimodal.kind} of this model fuses no modalities")
    if request.return_fusion and not parts:
        raise _no_effect("return_fusion", "the request has no picture and no sound")


def _no_effect(param: str, why: str) -> RequestError:
    return RequestError(f"{param}: has no effect, {why}; leave it out", param=param, code="invalid_value")


def decode(door: MediaDoor, parts: Sequence[MediaPart], files: Sequence[bytes], request: ChatRequest) -> RequestMedia:
    """Decode the files of a request. Slow: runs on a worker thread. Raises RequestError naming the part."""
    started_s = time.monotonic()
    num_pictures = sum(part.kind == "picture" for part in parts)
    asked = requested_max_pixels(request.max_pixels, request.mm_processor_kwargs, num_pictures=num_pictures)
    chosen = _pixel_budget(door, asked)
    media = _decoded(door, parts, files) if parts else []
    return RequestMedia(
        tuple(medium for medium in media if isinstance(medium, Picture)),
        tuple(medium for medium in media if isinstance(medium, Sound)),
        chosen,
        (time.monotonic() - started_s) * 1e3,
    )


def _decoded(door: MediaDoor, parts: Sequence[MediaPart], files: Sequence[bytes]) -> list[Picture | Sound]:
    """The media in order: what was decoded lately as it is, the others within the server's room."""
    keys = [hashlib.sha256(part.kind.encode() + data).digest() for part, data in zip(parts, files, strict=True)]
    media = [door.recent.get(key) for key in keys]
    needed_bytes = _decoding_bytes(door, parts, files, media)
    try:
        door.room.take(needed_bytes, "messages")
    except CapacityError:
        door.recent.clear()
        media = [None] * len(parts)  # or they would stand in their own way
        needed_bytes = _decoding_bytes(door, parts, files, media)
        door.room.take(needed_bytes, "messages")
    held_bytes = 0
    decoded = []
    try:
        for part, data, key, medium in zip(parts, files, keys, media, strict=True):
            if medium is None:
                medium = _decode(door, part, data)
                door.room.follow(medium, medium.nbytes)
                held_bytes += medium.nbytes
                door.recent.put(key, medium)
            decoded.append(medium)
    finally:
        door.room.free(needed_bytes - held_bytes)
    return decoded


def _decode(door: MediaDoor, part: MediaPart, data: bytes) -> Picture | Sound:
    if part.kind == "sound":
        return decode_sound(data, limits=door.limits, param=part.param)
    picture = decode_picture(data, limits=door.limits, param=part.param)
    _check_shape(door, picture, part)
    return picture


def _decoding_bytes(
    door: MediaDoor, parts: Sequence[MediaPart], files: Sequence[bytes], known: Sequence[Picture | Sound | None]
) -> int:
    """What decoding one unknown medium after another takes at most: pictures' headers tell, sounds have a limit."""
    held_bytes = largest_bytes = 0
    for part, data, medium in zip(parts, files, known, strict=True):
        if medium is not None:
            continue
        if part.kind == "picture":
            header = checked_header(data, limits=door.limits, param=part.param)
            num_pixels = header.width * header.height
            held_bytes += 3 * num_pixels
            largest_bytes = max(largest_bytes, (DECODING_BYTES_PER_PIXEL - 3) * num_pixels)
        else:
            num_bytes = 4 * round(SAMPLE_RATE_HZ * (door.limits.max_sound_s + PADDING_S))
            held_bytes += num_bytes
            largest_bytes = max(largest_bytes, num_bytes)
    return held_bytes + largest_bytes


def _pixel_budget(door: MediaDoor, asked: int | None) -> int:
    budget = door.multimodal.pixel_budget(door.max_pixels)
    most = door.most_pixels
    if asked is not None and door.memory is not None and most is not None and most < asked <= budget.max_pixels:
        needed_mb, have_mb = (door.memory.picture_bytes(pixels) / 1e6 for pixels in (asked, most))
        raise RequestError(
            f"max_pixels: {asked} pixels take {needed_mb:.1f} MB to encode, and this server has {have_mb:.1f} MB for "
            f"that; ask for at most {most}",
            param="max_pixels",
            code="invalid_value",
        )
    return budget.resolve(asked)


def _check_shape(door: MediaDoor, picture: Picture, part: MediaPart) -> None:
    try:
        door.multimodal.picture_size(picture.width, picture.height)
    except RequestError as error:
        raise RequestError(f"{part.param}: {error}", param=part.param, code="invalid_image") from None


def widen(
    door: MediaDoor, token_ids: list[int], media: RequestMedia, *, tells_fusion: bool = False
) -> tuple[list[int], PromptMedia, MediaReport]:
    """A prompt with one placeholder per medium -> the whole prompt, its media, and what the reply tells of them."""
    model = door.multimodal
    ids, prompt = model.plan(
        token_ids, media.pictures, media.sounds, max_pixels=media.max_pixels, tells_fusion=tells_fusion
    )
    sizes = [model.picture_size(picture.width, picture.height, media.max_pixels) for picture in media.pictures]
    told = tuple(
        {
            "original_width": picture.width,
            "original_height": picture.height,
            "width": size.width,
            "height": size.height,
            "tokens": size.rows * size.columns,
        }
        for picture, size in zip(media.pictures, sizes, strict=True)
    )
    audio_tokens = sum(model.sound_tokens(sound) for sound in media.sounds)
    return ids, prompt, MediaReport(sum(size.rows * size.columns for size in sizes), audio_tokens, told)
