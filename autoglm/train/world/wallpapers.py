"""Wallpapers of launcher screens: low-resolution patterns blown up; two kinds are kept for the test split."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autoglm.train.world.split import Split

Array = NDArray[np.float32]
GRID = (80, 36)  # rows, columns of the pattern before it is blown up


def hsv(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    """A colour as RGB 0..255; all arguments 0..1."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _axes(rng: np.random.Generator) -> tuple[Array, Array]:
    rows, columns = GRID
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    angle = float(rng.uniform(0, 2 * np.pi))
    x, y = x / columns - 0.5, y / rows - 0.5
    return x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)


def _gradient(rng: np.random.Generator) -> Array:
    along, _ = _axes(rng)
    return along + 0.5


def _clouds(rng: np.random.Generator) -> Array:
    coarse = Image.fromarray(rng.random((6, 4), dtype=np.float32))
    return np.asarray(coarse.resize(GRID[::-1], Image.Resampling.BICUBIC), dtype=np.float32)


def _grain(rng: np.random.Generator) -> Array:
    return 0.35 + 0.3 * rng.random(GRID, dtype=np.float32)


def _stripes(rng: np.random.Generator) -> Array:
    along, _ = _axes(rng)
    return np.asarray(np.floor(along * float(rng.uniform(3, 7))) % 2 * 0.6 + 0.2, dtype=np.float32)


def _discs(rng: np.random.Generator) -> Array:
    rows, columns = GRID
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32) / columns
    pattern = np.full(GRID, 0.3, dtype=np.float32)
    for _ in range(int(rng.integers(2, 6))):
        center_x, center_y, radius = rng.uniform(0, 1), rng.uniform(0, rows / columns), rng.uniform(0.15, 0.5)
        pattern[(x - center_x) ** 2 + (y - center_y) ** 2 < radius**2] = float(rng.uniform(0, 1))
    return pattern


def _rings(rng: np.random.Generator) -> Array:
    rows, columns = GRID
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32) / columns
    distance = np.hypot(x - rng.uniform(0, 1), y - rng.uniform(0, 2))
    return np.asarray(0.5 + 0.5 * np.sin(distance * float(rng.uniform(8, 16))), dtype=np.float32)


def _facets(rng: np.random.Generator) -> Array:
    along, across = _axes(rng)
    count = float(rng.uniform(3, 6))
    return np.asarray((np.floor(along * count) + np.floor(across * count)) % 3 / 2, dtype=np.float32)


KINDS: dict[Split, tuple[Callable[[np.random.Generator], Array], ...]] = {
    "train": (_gradient, _clouds, _grain, _stripes, _discs),
    "test": (_rings, _facets),
}


def draw_wallpaper(rng: np.random.Generator, split: Split, size: tuple[int, int], *, dark: bool) -> Image.Image:
    """A wallpaper of size (width, height) pixels whose brightness leaves room for labels: dark, or light."""
    kinds = KINDS[split]
    pattern = np.clip(kinds[int(rng.integers(len(kinds)))](rng), 0.0, 1.0)[..., None]
    hue, contrast = float(rng.random()), float(rng.uniform(0.08, 0.28))
    low = float(rng.uniform(0.08, 0.3)) if dark else float(rng.uniform(0.62, 0.78))
    saturation = float(rng.uniform(0.1, 0.7)) * (1.0 if dark else 0.45)
    first = np.array(hsv(hue, saturation, low), dtype=np.float32)
    second = np.array(hsv(hue + float(rng.uniform(-0.2, 0.2)), saturation, min(low + contrast, 1.0)), dtype=np.float32)
    tiles = (first + (second - first) * pattern).astype(np.uint8)
    return Image.fromarray(tiles).resize(size, Image.Resampling.BILINEAR)
