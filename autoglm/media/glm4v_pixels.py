"""A picture -> the patches GLM-4.1V's vision tower reads, equal to transformers' Glm4vImageProcessor (Pillow backend).

The picture is stretched, not letterboxed, to multiples of 28 (patch 14, merge 2), so that coordinates in 0 to 999 keep
their meaning on both axes. A still picture counts as two frames (temporal patch 2) in every number of pixels below, as
in the processor's `size`: a budget of 5,000,000 leaves a picture of at most 2,500,000. The two frames are the same, so
patches hold one; the tower adds its two kernels instead.

Source of the size rule and constants: transformers 5 models/glm4v/image_processing_pil_glm4v.py, class and
smart_resize; docs there name no paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from autoglm.errors import RequestError

PATCH_SIZE = 14
MERGE_SIZE = 2
TEMPORAL_PATCH_SIZE = 2
FACTOR = PATCH_SIZE * MERGE_SIZE
MIN_PIXELS = 112 * 112
MAX_PIXELS = 28 * 28 * 15_000
MAX_ASPECT_RATIO = 200
# OpenAI CLIP's, red, green, blue.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PatchGrid:
    """What a picture becomes: its effective size, its patches and its tokens.

    width, height   pixels after resizing, multiples of 28
    """

    width: int
    height: int

    @property
    def image_grid_thw(self) -> tuple[int, int, int]:
        """(1, rows, columns) of patches, as the processor's output of that name."""
        return 1, self.height // PATCH_SIZE, self.width // PATCH_SIZE

    @property
    def num_tokens(self) -> int:
        """Image tokens: one for 2 x 2 patches, begin and end markers not counted."""
        return self.height // FACTOR * (self.width // FACTOR)


def patch_grid(width: int, height: int, *, max_pixels: int = MAX_PIXELS, min_pixels: int = MIN_PIXELS) -> PatchGrid:
    """The grid for a picture of `width` x `height` pixels; no pixel is touched.

    A strip so long that its short side is one row may stay over `max_pixels`, as in the processor.
    Raises RequestError for an empty picture or one more than 200 times as long as it is wide.
    """
    if min(width, height) < 1:
        raise RequestError(f"the picture has no pixels ({width} x {height})", param="image", code="invalid_image")
    scaled_height, scaled_width = height, width
    if height < FACTOR or width < FACTOR:
        scale = max(FACTOR / height, FACTOR / width)
        scaled_height, scaled_width = int(height * scale), int(width * scale)
    if max(scaled_height, scaled_width) > MAX_ASPECT_RATIO * min(scaled_height, scaled_width):
        raise RequestError(
            f"the picture is {width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other",
            param="image",
            code="invalid_image",
        )
    rows, columns = round(scaled_height / FACTOR), round(scaled_width / FACTOR)
    pixels = TEMPORAL_PATCH_SIZE * scaled_height * scaled_width
    effective = TEMPORAL_PATCH_SIZE * rows * columns * FACTOR * FACTOR
    if effective > max_pixels:
        shrink = math.sqrt(pixels / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / FACTOR)) for side in (scaled_height, scaled_width))
    elif effective < min_pixels:
        grow = math.sqrt(min_pixels / pixels)
        rows, columns = (math.ceil(side * grow / FACTOR) for side in (scaled_height, scaled_width))
    return PatchGrid(width=columns * FACTOR, height=rows * FACTOR)


def pixel_values(rgb: NDArray[np.uint8], grid: PatchGrid) -> NDArray[np.float32]:
    """Resize, normalize and cut a picture into the tower's patches.

    rgb  u8 [height, width, 3]
    Returns f32 [rows * columns, 588]: patches in 2 x 2 groups, groups row by row, inside a group row by row; a patch
    is channel, y, x. The processor's 1176 values are these with each channel's 196 twice (two frames).
    """
    from PIL import Image

    size = (grid.width, grid.height)
    resized = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
    _, rows, columns = grid.image_grid_thw
    groups = resized.reshape(
        rows // MERGE_SIZE, MERGE_SIZE, PATCH_SIZE, columns // MERGE_SIZE, MERGE_SIZE, PATCH_SIZE, 3
    )
    values = np.empty((rows * columns, 3, PATCH_SIZE * PATCH_SIZE), np.float32)
    for channel, levels in enumerate(_levels()):
        patches = groups[..., channel].transpose(0, 3, 1, 4, 2, 5)
        values[:, channel] = levels.take(patches).reshape(rows * columns, -1)
    return values.reshape(rows * columns, -1)


@cache
def _levels() -> NDArray[np.float32]:
    """f32 [3, 256]: what each of a channel's 256 levels becomes, rounded where the processor rounds."""
    levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None] for values in (IMAGE_MEAN, IMAGE_STD))
    table: NDArray[np.float32] = (levels - mean) / std
    table.setflags(write=False)
    return table
