"""GLM-4.1V's preprocessing held to transformers' own processor: sizes on 500 screens, pixels bit for bit."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from autoglm.errors import RequestError
from autoglm.media.glm4v_pixels import MAX_PIXELS, MIN_PIXELS, patch_grid, pixel_values
from autoglm.media.limits import MediaLimits
from autoglm.media.pictures import decode_picture

hf = pytest.importorskip("transformers.models.glm4v.image_processing_pil_glm4v")

PHONES = [
    (1080, 2400), (1080, 2340), (1080, 1920), (1440, 3200), (720, 1600), (1170, 2532), (1290, 2796), (1320, 2868),
    (828, 1792), (750, 1334), (640, 1136), (480, 854), (540, 1200), (320, 480), (240, 320), (1260, 2800), (1440, 2560),
]  # fmt: skip
FOLDABLES = [(2176, 1812), (1768, 2208), (2200, 2480), (904, 2316), (1080, 2636), (1840, 2208), (2076, 2152)]
LARGE = [(3840, 2160), (7680, 4320), (5120, 2880), (4000, 3000), (2160, 3840), (1440, 20000), (1080, 15000)]
TINY = [(1, 1), (1, 100), (27, 27), (28, 28), (13, 29), (14, 14), (42, 42), (70, 14), (100, 1), (56, 55), (20, 4000)]


def screens() -> list[tuple[int, int]]:
    """500 sizes (width, height): known screens both ways up, sides at half multiples of 28, then spread at random."""
    sizes = [size for known in (PHONES, FOLDABLES, LARGE, TINY) for size in known]
    sizes += [(height, width) for width, height in sizes]
    sizes += [(14 + 28 * i, 14 + 28 * (i * 7 % 90)) for i in range(1, 90)]
    rng = np.random.default_rng(0)
    while len(sizes) < 500:
        width, height = (int(side) for side in np.exp(rng.uniform(np.log(8), np.log(6000), 2)))
        if max(width, height) <= 150 * min(width, height):
            sizes.append((width, height))
    return sizes


@pytest.mark.parametrize("max_pixels", [MAX_PIXELS, 9_633_792, 5_000_000, 1_003_520, 100_352, MIN_PIXELS])
def test_sizes_and_grids_equal_the_processors_on_500_screens(max_pixels: int) -> None:
    sizes = screens()
    assert len(sizes) == 500 and sum(width * height > 5_000_000 for width, height in sizes) >= 30
    processor = hf.Glm4vImageProcessorPil()
    for width, height in sizes:
        expected = hf.smart_resize(2, height, width, min_pixels=MIN_PIXELS, max_pixels=max_pixels)
        grid = patch_grid(width, height, max_pixels=max_pixels)
        assert (grid.height, grid.width) == expected, (width, height)
        size = {"shortest_edge": MIN_PIXELS, "longest_edge": max_pixels}
        num_patches = processor.get_number_of_image_patches(height, width, {"size": size})
        assert int(np.prod(grid.image_grid_thw)) == num_patches == 4 * grid.num_tokens


def test_limits_are_the_processors() -> None:
    assert hf.Glm4vImageProcessorPil.size == {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}


def test_the_screens_of_the_model_card() -> None:
    assert patch_grid(1080, 2400).num_tokens == 3354
    assert patch_grid(1440, 3200, max_pixels=5_000_000).num_tokens == 3108


@pytest.mark.parametrize(
    ("size", "max_pixels"),
    [
        ((63, 140), MAX_PIXELS),
        ((250, 111), 60_000),
        ((9, 30), MAX_PIXELS),
        ((300, 200), MIN_PIXELS),
        ((112, 84), 20_000),
    ],
)
def test_pixel_values_equal_the_processors_bit_for_bit(size: tuple[int, int], max_pixels: int) -> None:
    """From the PNG on: decoding, stretching, normalizing, order. Both resize with Pillow: no tolerance."""
    rgb = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG")
    processor = hf.Glm4vImageProcessorPil(size={"shortest_edge": MIN_PIXELS, "longest_edge": max_pixels})
    expected = processor(Image.open(file), return_tensors="np")
    picture = decode_picture(file.getvalue(), limits=MediaLimits(), param="image")
    grid = patch_grid(picture.width, picture.height, max_pixels=max_pixels)
    ours = pixel_values(picture.rgb, grid)
    assert expected["image_grid_thw"].tolist() == [list(grid.image_grid_thw)]
    assert ours.dtype == np.float32 and ours.flags.c_contiguous
    two_frames = np.repeat(ours.reshape(-1, 3, 1, 196), 2, axis=2).reshape(len(ours), -1)
    np.testing.assert_array_equal(two_frames, expected["pixel_values"])


@pytest.mark.parametrize("size", [(1, 300), (30, 6001), (0, 10)])
def test_shapes_no_screen_has_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(RequestError):
        patch_grid(*size)
    with pytest.raises((ValueError, ZeroDivisionError)):
        hf.smart_resize(2, size[1], size[0])
