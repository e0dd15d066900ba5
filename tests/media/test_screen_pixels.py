"""The size rule of our own encoder, and the pixels at a size found before."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from autoglm.media.screen_pixels import encoder_pixels, encoder_size, stretched


@pytest.mark.parametrize("size", [(1080, 1920), (1080, 2400), (449, 883), (2000, 300), (20, 31)])
def test_pixels_have_the_size_that_was_told(size: tuple[int, int]) -> None:
    """1080 x 1920 becomes 224 x 448 under a budget of 107520, but 224 x 416 under one of 224 * 448."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8))
    told = encoder_size(*size, max_pixels=107_520)
    pixels = stretched(image, told)
    assert pixels.shape == (3, told[1], told[0]) and told[0] * told[1] <= 107_520
    assert np.array_equal(pixels, encoder_pixels(image, max_pixels=107_520))
