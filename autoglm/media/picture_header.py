"""Picture file -> format, size and orientation from its header, and the same file without what is not picture.

Decoders walk comments, profiles, Exif tables and later frames in ways that cost far more than their bytes: a Pillow
that reads a 60 kB Exif table can be made to hold hundreds of MB. None of that changes a pixel, so one cheap walk over
the container keeps only what does: PNG IHDR, PLTE and IDAT; JPEG tables and scans; GIF's first frame. WebP is
handed on whole, libwebp reads its other chunks lazily. Orientation is read here from Exif alone (not from XMP).

Sources: PNG (W3C 2003) 5; JPEG (ITU T.81) B.1; GIF89a (CompuServe 1990); WebP container (RFC 9649) 2; Exif 2.32 4.6.
"""

from __future__ import annotations

import re
import struct

from msgspec import Struct

from autoglm.errors import RequestError

# An encoder that writes 8 kB pieces needs 2,560 of them for 20 MB; a walk of this many costs milliseconds.
MAX_PIECES = 10_000
# Exif tables of cameras have some dozens of entries.
MAX_EXIF_TAGS = 1_000
# Bytes between two segments, which decoders skip.
MAX_JPEG_PADDING = 1_024
# Each scan of a progressive JPEG passes over all blocks, however few bytes it has; encoders write about ten.
JPEG_SCAN_PIXELS = 12 << 25

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])")
_ORIENTATION_TAG = 0x0112
_UNREADABLE = (
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<?xml", "SVG or XML"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"\x1aE\xdf\xa3", "WebM"),
)


class PictureHeader(Struct, frozen=True):
    """What a picture file says of itself.

    format         PNG, JPEG, WEBP or GIF, Pillow's names
    width, height  pixels as stored, before `orientation` is applied
    orientation    Exif's 1 to 8; 1 is upright
    file           the file for the decoder, without comments, profiles and later frames
    """

    format: str
    width: int
    height: int
    orientation: int
    file: bytes


def read_picture_header(data: bytes, *, param: str) -> PictureHeader:
    """Walk the container; nothing is decoded. Raises RequestError naming what is not right with the file."""
    try:
        if data.startswith(_PNG):
            header = _png(data, param)
        elif data.startswith(b"\xff\xd8\xff"):
            header = _jpeg(data, param)
        elif data.startswith((b"GIF87a", b"GIF89a")):
            header = _gif(data, param)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            header = _webp(data, param)
        else:
            raise RequestError(
                f"the picture is {_name_of(data)}; send PNG, JPEG, WebP or GIF", param=param, code="invalid_image"
            )
    except (struct.error, IndexError):
        raise damaged(param, "it ends inside its header") from None
    if header.width < 1 or header.height < 1:
        raise damaged(param, f"its header says {header.width} x {header.height} pixels")
    return header


def damaged(param: str, why: str) -> RequestError:
    """The error for a picture that cannot be decoded."""
    return RequestError(f"the picture is damaged: {why}", param=param, code="invalid_image")


def _name_of(data: bytes) -> str:
    if not data:
        return "empty"
    if data[4:8] == b"ftyp":
        return "HEIC, AVIF or a video (an ISO media file)"
    return next((name for magic, name in _UNREADABLE if data.startswith(magic)), "of an unknown format")


def _too_many_pieces(param: str) -> RequestError:
    return damaged(param, f"it is cut into more than {MAX_PIECES} pieces; save it anew")


def _png(data: bytes, param: str) -> PictureHeader:
    kept, exif, offset = [_PNG], b"", len(_PNG)
    for _ in range(MAX_PIECES):
        if offset + 8 > len(data):
            break
        size, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + 12 + size
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            kept.append(data[offset:end])
        elif kind == b"eXIf":
            exif = data[offset + 8 : end - 4]
        offset = end
        if kind == b"IEND":
            break
    else:
        raise _too_many_pieces(param)
    if data[12:16] != b"IHDR":
        raise damaged(param, "a PNG must begin with IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    return PictureHeader("PNG", width, height, _orientation(exif), b"".join(kept))


def _jpeg(data: bytes, param: str) -> PictureHeader:
    kept, exif, offset = [b"\xff\xd8"], b"", 2
    size: tuple[int, int] | None = None
    for _ in range(MAX_PIECES):
        found = _JPEG_MARKER.search(data, offset, offset + MAX_JPEG_PADDING)
        if found is None:
            raise damaged(param, "a JPEG without a scan")
        kind, start = found.group(1)[0], found.start()
        if kind in (0x01, 0xD8) or 0xD0 <= kind <= 0xD7:
            offset = found.end()
            continue
        if kind == 0xD9:
            raise damaged(param, "a JPEG without a scan")
        if kind == 0xDA:
            break
        (length,) = struct.unpack_from(">H", data, found.end())
        offset = found.end() + length
        if length < 2 or offset > len(data):
            raise damaged(param, "a JPEG segment runs past the end of the file")
        body = data[found.end() + 2 : offset]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            if size is not None:
                raise damaged(param, "a JPEG with two frames")
            height, width = struct.unpack_from(">HH", body, 1)
            size = width, height
        if kind == 0xE1 and body.startswith(b"Exif\0\0") and not exif:
            exif = body[6:]
        # JFIF and Adobe say how the channels are coded; all other application segments and comments go.
        if (kind == 0xE0 and body.startswith(b"JFIF")) or kind == 0xEE or not (0xE0 <= kind <= 0xEF or kind == 0xFE):
            kept.append(data[start:offset])
    else:
        raise _too_many_pieces(param)
    if size is None:
        raise damaged(param, "a JPEG scan before its frame header")
    # Inside a scan 0xFF is followed by 0 or a restart marker, so these two bytes are the end. A video may follow.
    end = data.find(b"\xff\xd9", start)
    end = len(data) if end < 0 else end + 2
    num_scans = data.count(b"\xff\xda", start, end)
    if num_scans * size[0] * size[1] > JPEG_SCAN_PIXELS:
        raise damaged(param, f"{num_scans} scans of {size[0]} x {size[1]} pixels are too many; save it anew")
    kept.append(data[start:end])
    return PictureHeader("JPEG", size[0], size[1], _orientation(exif), b"".join(kept))


def _gif(data: bytes, param: str) -> PictureHeader:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    offset = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    kept = [data[:offset]]
    num_pieces = 0
    while data[offset] == 0x21:
        start, offset = offset, offset + 2
        while data[offset]:
            offset += 1 + data[offset]
            num_pieces += 1
            if num_pieces > MAX_PIECES:
                raise _too_many_pieces(param)
        offset += 1
        num_pieces += 1
        if data[start + 1] == 0xF9:
            kept.append(data[start:offset])
    if data[offset] != 0x2C:
        raise damaged(param, "a GIF without a frame")
    left, top, frame_width, frame_height = struct.unpack_from("<4H", data, offset + 1)
    kept.append(data[offset:])
    # A frame that reaches over the screen makes the picture larger, as Pillow has it.
    return PictureHeader("GIF", max(width, left + frame_width), max(height, top + frame_height), 1, b"".join(kept))


def _webp(data: bytes, param: str) -> PictureHeader:
    kind = data[12:16]
    exif = b""
    if kind == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
        if data[20] & 0x08:
            exif = _webp_exif(data, param)
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    elif kind == b"VP8L":
        (sides,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    else:
        raise damaged(param, "a WebP must begin with VP8, VP8L or VP8X")
    return PictureHeader("WEBP", width, height, _orientation(exif), data)


def _webp_exif(data: bytes, param: str) -> bytes:
    offset = 12
    for _ in range(MAX_PIECES):
        if offset + 8 > len(data):
            return b""
        kind, size = struct.unpack_from("<4sI", data, offset)
        if kind == b"EXIF":
            return data[offset + 8 : offset + 8 + size].removeprefix(b"Exif\0\0")
        offset += 8 + size + size % 2
    raise _too_many_pieces(param)


def _orientation(exif: bytes) -> int:
    """Tag 0x0112 of the first table of a TIFF structure; 1 where there is none, as a broken table turns no picture."""
    endian = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if endian is None:
        return 1
    orientation = 1
    try:
        (table,) = struct.unpack_from(endian + "I", exif, 4)
        (num_tags,) = struct.unpack_from(endian + "H", exif, table)
        for i in range(min(num_tags, MAX_EXIF_TAGS)):
            tag, kind, count = struct.unpack_from(endian + "HHI", exif, table + 2 + 12 * i)
            if tag == _ORIENTATION_TAG and kind in (3, 4) and count == 1:
                (value,) = struct.unpack_from(endian + ("H" if kind == 3 else "I"), exif, table + 10 + 12 * i)
                orientation = value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return orientation
