"""A drawing surface in units of 1/1080 of the width, which remembers where each named thing lies.

A page is laid out once in these units, so the same page drawn at 448 pixels is the full one shrunk,
up to the rounding of glyphs. Ink boxes come from the masks that were pasted, not from font metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from autoglm.train.world.assets import FACES, Face
from autoglm.train.world.glyphs import Glyphs, icon_glyphs, text_glyphs
from autoglm.train.world.labels import Label, Language
from autoglm.train.world.split import Split

Box = tuple[float, float, float, float]
Color = tuple[int, int, int]
UNITS = 1080.0
# Sizes of text and icons are rounded to this many units, so that drawn glyphs are found again in the cache.
_SIZE_STEP = 3.0


@dataclass(frozen=True)
class Element:
    """One named thing on a screen.

    label     what it is
    role      title, app, row, tab, button, field, item, bubble, icon ... (how it is drawn)
    box       (x0, y0, x1, y1) where a tap counts, parts 0..1 of width and height
    ink       the tight box of its drawn text and icon, same units
    tappable  False for titles, and for what lies dimmed under a dialog
    """

    label: Label
    role: str
    box: Box
    ink: Box
    tappable: bool


@dataclass(frozen=True)
class Style:
    """What one screen's drawing has in common; colours are RGB 0..255."""

    split: Split
    language: Language
    face: Face
    icon_set: str
    dark: bool
    font_scale: float
    radius: float
    background: Color
    surface: Color
    text: Color
    secondary: Color
    accent: Color
    line: Color
    heavy: bool = False


def union(boxes: list[Box]) -> Box:
    """The smallest box around all of `boxes`."""
    return (
        min(box[0] for box in boxes),
        min(box[1] for box in boxes),
        max(box[2] for box in boxes),
        max(box[3] for box in boxes),
    )


def overlaps(one: Box, other: Box) -> bool:
    """Whether two boxes share any area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@lru_cache(maxsize=4096)
def _rounded_mask(width: int, height: int, radius: int) -> Image.Image:
    big = Image.new("L", (width * 2, height * 2))
    ImageDraw.Draw(big).rounded_rectangle((0, 0, width * 2 - 1, height * 2 - 1), radius * 2, fill=255)
    return big.reduce(2)


@dataclass
class Canvas:
    """An image of `width_px` x `height_px` drawn in units of 1/1080 of its width."""

    width_px: int
    height_px: int
    style: Style
    rng: np.random.Generator
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scale = self.width_px / UNITS
        self.image = Image.new("RGB", (self.width_px, self.height_px), self.style.background)
        self.draw = ImageDraw.Draw(self.image)

    @property
    def height(self) -> float:
        """The screen's height in units."""
        return self.height_px / self.scale

    def fraction(self, box: Box) -> Box:
        """A box in units as parts of width and height, cut to the screen."""
        x0, y0, x1, y1 = (edge * self.scale for edge in box)
        width, height = self.width_px, self.height_px
        return (max(x0, 0.0) / width, max(y0, 0.0) / height, min(x1, width) / width, min(y1, height) / height)

    def element(self, label: Label, role: str, box: Box, inks: list[Box], *, tappable: bool = True) -> None:
        """Remember a named thing; boxes in units."""
        self.elements.append(Element(label, role, self.fraction(box), self.fraction(union(inks)), tappable))

    def rect(self, box: Box, color: Color, radius: float = 0.0) -> None:
        """A filled rectangle with rounded corners."""
        x0, y0, x1, y1 = (round(edge * self.scale) for edge in box)
        if x1 <= x0 or y1 <= y0:
            return
        corner = min(round(radius * self.scale), (x1 - x0) // 2, (y1 - y0) // 2)
        if corner < 1:
            self.image.paste(color, (x0, y0, x1, y1))
        else:
            self.image.paste(color, (x0, y0), _rounded_mask(x1 - x0, y1 - y0, corner))

    def lines(self, points: list[tuple[float, float]], color: Color, width: float) -> None:
        """A polyline."""
        scaled = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.line(scaled, fill=color, width=max(1, round(width * self.scale)), joint="curve")

    def _half_px(self, size: float) -> int:
        return max(8, round(2 * _SIZE_STEP * round(size / _SIZE_STEP) * self.scale))

    def _paste(self, glyphs: Glyphs, x: float, y: float, color: Color) -> Box:
        left, top = round(x) + glyphs.left, round(y) + glyphs.top
        self.image.paste(color, (left, top), glyphs.mask)
        width, height = glyphs.mask.size
        return (left / self.scale, top / self.scale, (left + width) / self.scale, (top + height) / self.scale)

    def _text_glyphs(self, text: str, size: float, bold: bool) -> Glyphs:
        face = self.style.face
        if not face.latin and any(ord(letter) < 0x2E80 for letter in text):  # digits and brackets of filler
            face = FACES[(self.style.language, self.style.split)][0]
        return text_glyphs(
            face.bold if bold or self.style.heavy else face.regular, face.index, self._half_px(size), text
        )

    def text_width(self, text: str, size: float, *, bold: bool = False) -> float:
        """The advance of `text` in units."""
        return self._text_glyphs(text, size, bold).advance / self.scale

    def fit(self, text: str, size: float, room: float, *, bold: bool = False) -> float:
        """`size`, or the largest smaller one at which `text` is no wider than `room`."""
        width = self.text_width(text, size, bold=bold)
        return size if width <= room else _SIZE_STEP * (size * room / width // _SIZE_STEP)

    def text(
        self,
        xy: tuple[float, float],
        text: str,
        size: float,
        color: Color,
        *,
        align: str = "left",
        bold: bool = False,
        shadow: Color | None = None,
    ) -> Box:
        """Draw one line with its middle at y and its left end, centre or right end at x; returns its ink in units."""
        glyphs = self._text_glyphs(text, size, bold)
        x = xy[0] * self.scale - {"left": 0.0, "center": 0.5, "right": 1.0}[align] * glyphs.advance
        y = xy[1] * self.scale
        if shadow is not None:
            self._paste(glyphs, x + max(1, 2.5 * self.scale), y + max(1, 2.5 * self.scale), shadow)
        return self._paste(glyphs, x, y, color)

    def icon(self, stem: str, center: tuple[float, float], size: float, color: Color) -> Box:
        """Draw an icon of the style's set around `center`; returns its ink in units."""
        size_px = max(4, round(_SIZE_STEP * round(size / _SIZE_STEP) * self.scale))
        glyphs = icon_glyphs(self.style.icon_set, stem, size_px)
        return self._paste(glyphs, center[0] * self.scale - size_px / 2, center[1] * self.scale - size_px / 2, color)

    def chance(self, probability: float) -> bool:
        """One biased coin."""
        return bool(self.rng.random() < probability)

    def uniform(self, low: float, high: float) -> float:
        """One number in [low, high)."""
        return float(low + (high - low) * self.rng.random())

    def integer(self, low: int, high: int) -> int:
        """One whole number in [low, high]."""
        return int(self.rng.integers(low, high + 1))
