"""Small picture files for the tests of media: encoded pictures, and PNG, JPEG and Exif pieces put together by hand."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    """A picture whose every pixel differs, so that a turned or shifted one is another."""
    shape = (height, width, channels)[: 2 if channels == 1 else 3]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """The file Pillow writes."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"\0") -> bytes:
    """An RGB PNG that says it is width x height, whatever `pixels` (compressed here) hold."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", zlib.compress(pixels)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def exif(orientation: int, endian: str = "<", kind: int = 3, num_tags: int = 1) -> bytes:
    """An Exif table with the orientation as its last entry."""
    magic = b"II*\0" if endian == "<" else b"MM\0*"
    entries = [struct.pack(endian + "HHII", 0x8000 + i, 4, 1, 0) for i in range(num_tags - 1)]
    value = struct.pack(endian + ("HH" if kind == 3 else "I"), *([orientation, 0] if kind == 3 else [orientation]))
    entries.append(struct.pack(endian + "HHI", 0x0112, kind, 1) + value)
    return magic + struct.pack(endian + "IH", 8, num_tags) + b"".join(entries) + bytes(4)


def jpeg_segment(marker: int, body: bytes) -> bytes:
    """One JPEG segment with its length."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
