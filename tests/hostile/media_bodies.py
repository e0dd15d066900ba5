"""Chat requests with damaged pictures and sounds: in the file, in its base64, in its data URI, in its declared type."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.media.mutations import mutated, picture_seeds, sound_seeds
from tests.media.parts import base64_of, sound_file
from tests.media.picture_files import encoded, noise, png, png_chunk

# What declares more than it has, or is something else.
_HUGE = (1 << 31) - 1
TYPES = (
    "image/png", "image/jpeg", "image/webp", "image/gif", "audio/wav", "audio/mpeg", "audio/flac", "audio/ogg",
    "image/bmp", "image/svg+xml", "video/mp4", "application/octet-stream", "text/html", "x" * 60, "", "image/png;a=b",
    "image/png,", "../../etc", "\u56fe/\u7247",
)  # fmt: skip


def lying_pictures() -> list[bytes]:
    """Pictures whose headers promise too much, and formats that are not read."""
    image = noise(24, 18)
    webp, gif = bytearray(encoded(image, "WEBP", lossless=True)), bytearray(encoded(image.quantize(16), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    webp[21:25] = b"\xff\xff\xff\x0f"
    jpeg = bytearray(encoded(image, "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = b"\xff\xff\xff\xff"
    text = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(8 << 20)))
    return [
        png(_HUGE, _HUGE),
        png(60_000, 60_000),
        png(2_000, 2_000, pixels=bytes(1 << 20)),
        png(1, 3_000_000),
        png(0, 5),
        png(24, 18, text, pixels=bytes(18 * 73)),
        png(24, 18, png_chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(4 << 20))), pixels=bytes(18 * 73)),
        bytes(gif),
        bytes(webp),
        bytes(jpeg),
        encoded(image, "BMP"),
        encoded(image, "TIFF"),
        encoded(image, "PPM"),
        encoded(image, "ICO"),
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        encoded(image, "PNG") + encoded(image, "JPEG"),
        encoded(image, "PNG") * 3,
        b"\x89PNG\r\n\x1a\n",
        b"",
    ]


def lying_sounds() -> list[bytes]:
    """Sounds whose headers promise too much, and formats that are not read."""
    samples = np.zeros(1_600, np.float32)
    wav, flac, mp3 = (sound_file(samples, name) for name in ("wav", "flac", "mp3"))
    long, fast, wide, empty = (bytearray(wav) for _ in range(4))
    long[4:8] = long[40:44] = b"\xff\xff\xff\xff"
    fast[24:28] = struct.pack("<I", 0xFFFFFFFF)
    wide[22:24] = struct.pack("<H", 65_535)
    empty[40:44] = bytes(4)
    endless = bytearray(flac)
    endless[21:26] = b"\xff" * 5
    tag = b"ID3\x04\0\0" + b"\x7f\x7f\x7f\x7f"
    return [
        bytes(long), bytes(fast), bytes(wide), bytes(empty), bytes(endless), tag, tag + mp3, mp3 * 3, wav * 3,
        wav + flac, flac + flac, b"OggS", b"fLaC" + bytes(60), b"RIFF\xff\xff\xff\xffWAVE" + bytes(40),
        b"\xff\xfb\x90\0" * 400, b"\x1aE\xdf\xa3" + bytes(40), bytes(4) + b"ftypM4A " + bytes(40),
        np.full(4_000, np.nan, np.float32).tobytes(), b"",
    ]  # fmt: skip


def _uri(rng: np.random.Generator, data: bytes) -> str:
    """A data URI with some type, mostly a well-formed one; its base64 may be damaged."""
    encoded_data, mime = base64_of(data), TYPES[int(rng.integers(0, len(TYPES)))]
    match int(rng.integers(0, 40)):
        case 0:
            at = int(rng.integers(0, len(encoded_data) + 1))
            encoded_data = encoded_data[:at] + "*!\u00e9\0-_"[int(rng.integers(0, 6))] + encoded_data[at + 1 :]
        case 1:
            encoded_data = encoded_data[: int(rng.integers(0, len(encoded_data) + 1))]
        case 2:
            encoded_data = encoded_data.rstrip("=") + "=" * int(rng.integers(0, 6))
        case 3:
            encoded_data = "\r\n ".join(encoded_data[i : i + 61] for i in range(0, len(encoded_data), 61))
        case 4:
            encoded_data = encoded_data.replace("+", "-").replace("/", "_")
        case 5:
            encoded_data += encoded_data
    heads = ["data:{};base64,"] * 60
    heads += ["DATA:{};BASE64,", "data:{},", "data:{};base64", "data:{}base64,", "data:;{};base64,,", ""]
    heads += ["data:%20{};base64,", "data://{};base64,", " data:{};base64,", "data:{};base64;x,", "{};base64,"]
    return heads[int(rng.integers(0, len(heads)))].format(mime) + encoded_data


def _part(rng: np.random.Generator, data: bytes, is_sound: bool) -> dict[str, Any]:
    uri = _uri(rng, data)
    if rng.random() < 0.05:
        is_sound = not is_sound
    if not is_sound:
        return {"type": "image_url", "image_url": uri if rng.random() < 0.1 else {"url": uri}}
    if rng.random() < 0.5:
        return {"type": "audio_url", "audio_url": uri if rng.random() < 0.1 else {"url": uri}}
    name = ("wav", "mp3", "flac", "ogg", "m4a", "", "\u58f0")[int(rng.integers(0, 7))]
    text = uri if rng.random() < 0.2 else base64_of(data)
    return {"type": "input_audio", "input_audio": {"data": text, "format": name}}


def media_bodies(count: int, seed: int = 7) -> Iterator[dict[str, Any]]:
    """`count` bodies, three pictures to two sounds; one in eight lies in its header, the rest are damaged at random."""
    rng = np.random.default_rng(seed)
    # Each stream of damaged files draws the same ones again; a big count is of all of them.
    files = (mutated(picture_seeds(), count), mutated(sound_seeds(), count))
    lies = (lying_pictures(), lying_sounds())
    for number in range(count):
        is_sound = number % 5 in (1, 3)
        data = next(files[is_sound])
        if number % 8 == 0:
            data = lies[is_sound][int(rng.integers(0, len(lies[is_sound])))]
        content = [_part(rng, data, is_sound), {"type": "text", "text": "hi"}]
        yield {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 1}
