"""Picture file -> RGB pixels: PNG, JPEG, WebP and the first frame of a GIF, sizes checked before anything is decoded.

The pixels are those of transformers' load_image: turned upright by Exif, then Pillow's convert("RGB"), which drops
alpha. 16-bit greys are cut to 8 bits by Pillow's rule.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from autoglm.errors import RequestError
from autoglm.media.limits import MediaLimits
from autoglm.media.picture_header import PictureHeader, damaged, read_picture_header

# Exif's orientation -> the name of what turns a picture upright, in Pillow's words.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class Picture(Struct, frozen=True, weakref=True):
    """A decoded picture.

    rgb           u8 [height, width, 3], upright, read only
    format        PNG, JPEG, WEBP or GIF
    content_hash  SHA-256 of size and pixels: equal for equal pixels, whatever file they came in
    """

    rgb: NDArray[np.uint8]
    format: str
    content_hash: bytes

    @property
    def width(self) -> int:
        """Pixels, upright: what coordinates 0 to 999 across stand for."""
        return int(self.rgb.shape[1])

    @property
    def height(self) -> int:
        """Pixels, upright: what coordinates 0 to 999 down stand for."""
        return int(self.rgb.shape[0])

    @property
    def nbytes(self) -> int:
        return self.rgb.nbytes


# What decoding holds at its widest moment. Measured with 24 megapixels: PNG 15, JPEG 14 and turned 18, WebP 21; a
# progressive JPEG keeps its coefficients too.
DECODING_BYTES_PER_PIXEL = 26


def checked_header(data: bytes, *, limits: MediaLimits, param: str) -> PictureHeader:
    """The header of a picture file within `limits`; nothing is decoded. Raises RequestError as decode_picture does."""
    if len(data) > limits.max_picture_bytes:
        raise RequestError(
            f"the picture has {len(data)} bytes, at most {limits.max_picture_bytes} are read; send a smaller file",
            param=param,
            code="image_too_large",
        )
    header = read_picture_header(data, param=param)
    if header.width * header.height > limits.max_picture_pixels:
        raise RequestError(
            f"the picture is {header.width} x {header.height} pixels, at most {limits.max_picture_pixels} in all are "
            "read; send a smaller picture",
            param=param,
            code="image_too_large",
        )
    return header


def decode_picture(data: bytes, *, limits: MediaLimits, param: str) -> Picture:
    """Decode one picture file.

    Raises RequestError for an unknown format, a damaged or truncated file, and one over `limits`.
    """
    header = checked_header(data, limits=limits, param=param)
    rgb = _decode(header, param)
    digest = hashlib.sha256(struct.pack("<II", rgb.shape[1], rgb.shape[0]))
    digest.update(rgb.data)
    return Picture(rgb, header.format, digest.digest())


def _decode(header: PictureHeader, param: str) -> NDArray[np.uint8]:
    from PIL import Image  # here, since a model without eyes never needs it and every start would wait 8 ms

    try:
        with Image.open(io.BytesIO(header.file), formats=[header.format]) as image:
            if image.size != (header.width, header.height):
                raise damaged(param, "its header gives two sizes")
            image.load()
            turn = _UPRIGHT.get(header.orientation)
            upright = image.transpose(Image.Transpose[turn]) if turn else image
            rgb = np.array(upright.convert("RGB"))
    except (OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, struct.error, zlib.error):
        # What Pillow's readers let through for broken files; its words may quote the file, so they stay here.
        raise damaged(param, f"its {header.format} data cannot be decoded; it may be cut short") from None
    rgb.setflags(write=False)
    return rgb
