"""Picture and sound files a person names: read, decoded once to see that they can be, and made into content parts."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from autoglm.errors import ConfigError, RequestError
from autoglm.media.limits import MediaLimits
from autoglm.media.pictures import Picture, decode_picture
from autoglm.media.sounds import decode_sound


def picture_part(path: Path) -> tuple[Picture, dict[str, Any]]:
    """A picture file, decoded and as an `image_url` part. Raises ConfigError naming the file and what is wrong."""
    limits = MediaLimits()
    data = _read(path, limits.max_picture_bytes, "picture")
    try:
        picture = decode_picture(data, limits=limits, param="")
    except RequestError as error:
        raise ConfigError(f"'{path}' cannot be shown to a model: {error}") from None
    url = f"data:image/{picture.format.lower()};base64,{base64.b64encode(data).decode()}"
    return picture, {"type": "image_url", "image_url": {"url": url}}


def sound_part(path: Path) -> dict[str, Any]:
    """A sound file as an `input_audio` part. Raises ConfigError naming the file and what is wrong."""
    limits = MediaLimits()
    data = _read(path, limits.max_sound_bytes, "sound")
    try:
        sound = decode_sound(data, limits=limits, param="")
    except RequestError as error:
        raise ConfigError(f"'{path}' cannot be played to a model: {error}") from None
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": sound.format}}


def _read(path: Path, max_bytes: int, kind: str) -> bytes:
    """The whole file, or one byte more than allowed, which the decoders refuse."""
    try:
        with open(path, "rb") as file:
            return file.read(max_bytes + 1)
    except FileNotFoundError:
        raise ConfigError(f"{kind} file '{path}' not found; check the path") from None
    except OSError as error:
        raise ConfigError(f"{kind} file '{path}' cannot be read: {error.strerror or error}") from None
