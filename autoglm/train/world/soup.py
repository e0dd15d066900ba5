"""Soup: pictures full of words and icons in no order, from which the eyes learn to read before they see a screen.

A real screen shows a dozen named things in four hundred patches; a soup shows five times as many, so the same
computation teaches five times as much.
"""

from __future__ import annotations

import numpy as np

from autoglm.train.world.assets import FACES, SETS_OF
from autoglm.train.world.canvas import Canvas, Color, Element, Style, union
from autoglm.train.world.labels import LANGUAGES, VISIBLE, Language
from autoglm.train.world.pages import hue_of
from autoglm.train.world.split import Split, rng_for
from autoglm.train.world.wallpapers import hsv

WIDTH_PX, HEIGHT_PX = 448, 960
# In 1/1080 of the width. Few sizes, so that drawn glyphs are found again in the cache.
TEXT_SIZES = (36, 40, 45, 50, 56, 62)
ICON_SIZES = (52, 62, 74, 88, 104, 124)


def _style(rng: np.random.Generator, split: Split, language: Language, variety: float) -> Style:
    faces = FACES[language, split] if rng.random() < variety else FACES[language, split][:1]
    weights = np.array([face.weight for face in faces])
    face = faces[int(rng.choice(len(faces), p=weights / weights.sum()))]
    sets = SETS_OF[split] if rng.random() < variety else SETS_OF[split][:1]
    grey = (255, 255, 255)
    return Style(
        split,
        language,
        face,
        sets[int(rng.integers(len(sets)))],
        False,
        1.0,
        0.0,
        *(grey,) * 6,
        heavy=bool(rng.random() < 0.2 * variety),
    )


def _colors(rng: np.random.Generator, variety: float) -> tuple[Color, Color]:
    """A background and an ink that stands out from it."""
    if rng.random() >= variety:
        return (255, 255, 255), (0, 0, 0)
    kind = rng.random()
    if kind < 0.45:  # a light page
        return hsv(rng.random(), 0.1 * rng.random(), 0.9 + 0.1 * rng.random()), hsv(
            rng.random(), rng.random() ** 2, 0.4 * rng.random()
        )
    if kind < 0.7:  # a dark page
        return hsv(rng.random(), 0.4 * rng.random(), 0.25 * rng.random()), hsv(
            rng.random(), 0.15 * rng.random(), 0.8 + 0.2 * rng.random()
        )
    return hsv(rng.random(), 0.3 + 0.7 * rng.random(), 0.3 + 0.45 * rng.random()), (255, 255, 255)


def draw_soup(seed: int, split: Split, variety: float = 1.0) -> tuple[Canvas, tuple[Element, ...]]:
    """A picture of 448 x 960 pixels and what is on it; deterministic by (seed, split, variety).

    variety 0: black on white in one font and size; 1: everything there is. Who learns to read starts with the former.
    """
    rng = rng_for(split, "soup", seed)
    canvas = Canvas(WIDTH_PX, HEIGHT_PX, _style(rng, split, LANGUAGES[int(rng.integers(2))], variety), rng)
    y = 0.0
    while y < canvas.height - 60:
        row = canvas.uniform(110, 110 + 60 * variety)
        background, ink = _colors(rng, variety)
        canvas.rect((0, y, 1080, y + row), background)
        canvas.style = _style(rng, split, LANGUAGES[int(rng.integers(2))], variety)
        _fill_row(canvas, y, row, ink, variety)
        y += row
    return canvas, tuple(canvas.elements)


def _size(rng: np.random.Generator, sizes: tuple[int, ...], room: float, variety: float) -> float:
    """One of the sizes smaller than `room`; without variety the third."""
    return float(rng.choice([size for size in sizes if size < room]) if rng.random() < variety else min(sizes[2], room))


def _fill_row(canvas: Canvas, y: float, row: float, ink: Color, variety: float) -> None:
    """Words and icons from left to right, as many as fit."""
    rng = canvas.rng
    x = canvas.uniform(-20, 60)
    while x < 1040:
        label = VISIBLE[int(rng.integers(len(VISIBLE)))]
        middle = y + row / 2 + canvas.uniform(-1, 1) * max(0.0, row / 2 - 40)
        inks = []
        left = x
        draw_icon = label.icon is not None and canvas.chance(0.45)
        if label.icon is not None and draw_icon:
            size = _size(rng, ICON_SIZES, row, variety)
            middle_of_icon, color = (x + size / 2, y + row / 2), ink
            if canvas.chance(0.5 * variety):  # on a tile, as launchers draw it
                hue = hue_of(label) if label.kind == "app" else canvas.uniform(0, 1)
                tile = (x, y + row / 2 - size / 2, x + size, y + row / 2 + size / 2)
                color = (255, 255, 255)
                canvas.rect(
                    tile,
                    hsv(hue + canvas.uniform(-0.03, 0.03), canvas.uniform(0.5, 0.9), canvas.uniform(0.55, 0.95)),
                    size * canvas.uniform(0.1, 0.5),
                )
                inks.append(tile)
                size *= 0.66
            inks.append(canvas.icon(label.icon, middle_of_icon, size, color))
            x = union(inks)[2] + canvas.uniform(14, 40)
        if not draw_icon or canvas.chance(0.25):
            size = _size(rng, TEXT_SIZES, row - 20, variety)
            inks.append(
                canvas.text(
                    (x, middle), label.text(canvas.style.language), size, ink, bold=canvas.chance(0.2 * variety)
                )
            )
            x = inks[-1][2]
        box = union(inks)
        if box[2] <= 1080 and box[0] >= 0 and box[3] <= canvas.height:
            canvas.element(label, "soup", box, inks)
        x = max(x, left + 30) + canvas.uniform(30, 110)
