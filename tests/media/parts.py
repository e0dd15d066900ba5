"""Pictures and sounds as OpenAI's content parts, and small files of every format to put into them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

from tests.media.picture_files import encoded

RATE_HZ = 16_000
# name -> what Pillow calls it, and how it is written
PICTURE_FORMATS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpeg": {"format": "JPEG", "quality": 95},
    "webp": {"format": "WEBP", "lossless": True},
    "gif": {"format": "GIF"},
}
SOUND_FORMATS: dict[str, dict[str, Any]] = {
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "mp3": {"format": "MP3"},
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
}


def picture_file(image: Image.Image, name: str = "png") -> bytes:
    """A file of one of PICTURE_FORMATS."""
    return encoded(image, **PICTURE_FORMATS[name])


def sound_file(samples: NDArray[np.float32], name: str = "wav", rate_hz: int = RATE_HZ, **options: Any) -> bytes:
    """A file of one of SOUND_FORMATS, or of another that `options` say."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, **{**SOUND_FORMATS[name], **options})
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def image_url(data: bytes, mime: str = "image/png") -> dict[str, Any]:
    """A picture as a data URI."""
    return {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{base64_of(data)}"}}


def input_audio(data: bytes, name: str = "wav") -> dict[str, Any]:
    """A sound as OpenAI sends it."""
    return {"type": "input_audio", "input_audio": {"data": base64_of(data), "format": name}}


def audio_url(data: bytes, mime: str = "audio/wav") -> dict[str, Any]:
    """A sound as a data URI."""
    return {"type": "audio_url", "audio_url": {"url": f"data:{mime};base64,{base64_of(data)}"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}
