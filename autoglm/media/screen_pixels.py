"""A picture -> the pixels a ViT-B/16 style encoder reads: the size rule, the resize, values in -1..1."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoglm.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image  # read with the first picture, as in pictures.py

MAX_ASPECT_RATIO = 16


def encoder_size(width: int, height: int, *, max_pixels: int, factor: int = 32) -> tuple[int, int]:
    """The (width, height) a picture of `width` x `height` pixels is resized to.

    Both are multiples of `factor` (patch size times merge size), the area is at most `max_pixels`, and the aspect is
    kept as nearly as that allows. A smaller picture is not enlarged beyond one `factor` a side.
    Raises RequestError for an empty picture or one more than 16 times as long as it is wide.
    """
    if min(width, height) < 1:
        raise RequestError(f"the picture has no pixels ({width} x {height})", param="image")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise RequestError(
            f"the picture is {width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other",
            param="image",
        )
    scale = min(1.0, math.sqrt(max_pixels / (width * height)))
    columns = max(1, round(width * scale / factor))
    rows = max(1, round(height * scale / factor))
    while columns * rows * factor * factor > max_pixels and max(columns, rows) > 1:
        # Shrink the side that rounding favoured more.
        if columns * height > rows * width and columns > 1:
            columns -= 1
        else:
            rows -= 1
    return columns * factor, rows * factor


def encoder_pixels(image: Image.Image, *, max_pixels: int, factor: int = 32) -> NDArray[np.float32]:
    """The picture stretched to its `encoder_size` (antialiased bicubic): f32 [3, height, width], -1 black, 1 white."""
    return stretched(image, encoder_size(*image.size, max_pixels=max_pixels, factor=factor))


def stretched(image: Image.Image, size: tuple[int, int]) -> NDArray[np.float32]:
    """The picture at an `encoder_size` (width, height) found before: f32 [3, height, width] as encoder_pixels."""
    from PIL.Image import Resampling

    resized = image.convert("RGB").resize(size, Resampling.BICUBIC)
    values = np.asarray(resized, dtype=np.float32) / 127.5 - 1.0
    return np.ascontiguousarray(values.transpose(2, 0, 1))
