"""An action drawn on its screen: rings where it touches, an arrow where it swipes, and its text on a plate.

Every stroke is a coloured core in a white and a black rim, so that it shows on whatever lies below it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from autoglm.actions import MAX_COORDINATE, Action, DoubleTap, LongPress, Swipe, Tap, format_action
from autoglm.whole_file import whole_file

Pixel = tuple[int, int]
Stroke = Callable[[ImageDraw.ImageDraw, str, float], None]  # draws itself in one colour and width

# From the widest to the core: colour, and width in units.
_LAYERS = (("black", 3.6), ("white", 3.0), ("#e6003c", 1.6))
_RING, _SECOND_RING, _HEAD = 9.0, 14.0, 8.0  # radii and the arrow's head, in units
_MAX_LINES = 3
# Pillow's own font has no Chinese; the names of what Linux, macOS and Windows bring.
_CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf",
    "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc",
)  # fmt: skip
_SOFTWARE = "autoglm see"


def touched_pixels(action: Action, width: int, height: int) -> tuple[Pixel, ...]:
    """The pixels (x, y) of a width x height screen that an action names: none, one, or both ends of a swipe.

    A coordinate stands for a thousandth of the side; the pixel is the one in that thousandth's middle.
    """

    def pixel(x: int, y: int) -> Pixel:
        parts = MAX_COORDINATE + 1
        return (2 * x + 1) * width // (2 * parts), (2 * y + 1) * height // (2 * parts)

    if isinstance(action, Swipe):
        return pixel(action.x, action.y), pixel(action.to_x, action.to_y)
    if isinstance(action, (Tap, DoubleTap, LongPress)):
        return (pixel(action.x, action.y),)
    return ()


def draw_action(screen: Image.Image, action: Action) -> Image.Image:
    """A copy of the RGB screen, of its size, with the action on it."""
    image = screen.copy()
    draw = ImageDraw.Draw(image)
    unit = max(1.0, min(image.size) / 180)
    points = touched_pixels(action, *image.size)
    _draw_plate(draw, image.size, points, format_action(action))
    strokes = _strokes(action, points, unit)
    for colour, width in _LAYERS:
        for stroke in strokes:
            stroke(draw, colour, width * unit)
    return image


def save_drawn(image: Image.Image, path: Path) -> None:
    """Write the picture as a PNG that was_drawn_here knows again. Raises OSError."""
    told = PngInfo()
    told.add_text("Software", _SOFTWARE)
    with whole_file(path) as temporary:
        image.save(temporary, "PNG", pnginfo=told, optimize=True)


def was_drawn_here(path: Path) -> bool:
    """Whether the file is one that save_drawn wrote: its first chunk after the header says so. Raises OSError."""
    with open(path, "rb") as file:
        return f"tEXtSoftware\0{_SOFTWARE}".encode() in file.read(128)


def _strokes(action: Action, points: tuple[Pixel, ...], unit: float) -> list[Stroke]:
    if not points:
        return []
    if len(points) == 2:
        return [_arrow(points[0], points[1], unit)]
    radii = [_RING, _SECOND_RING] if isinstance(action, DoubleTap) else [_RING]
    return [_dot(points[0]), *(_ring(points[0], radius * unit) for radius in radii)]


def _ring(centre: Pixel, radius: float) -> Stroke:
    def stroke(draw: ImageDraw.ImageDraw, colour: str, width: float) -> None:
        draw.ellipse(_around(centre, radius + width / 2), outline=colour, width=max(1, round(width)))

    return stroke


def _dot(centre: Pixel) -> Stroke:
    def stroke(draw: ImageDraw.ImageDraw, colour: str, width: float) -> None:
        draw.ellipse(_around(centre, width / 2), fill=colour)

    return stroke


def _arrow(start: Pixel, end: Pixel, unit: float) -> Stroke:
    """A shaft with a head of two lines at its end; a swipe that goes nowhere is a dot."""
    tip = np.array(end, dtype=float)
    shaft = tip - np.array(start)
    length = float(np.hypot(*shaft))
    along = shaft / length if length else np.zeros(2)
    across = np.array((-along[1], along[0]))
    head = min(_HEAD * unit, length)
    ends = [np.array(start, dtype=float), *(tip - head * (along + side * across) for side in (0.6, -0.6))]

    def stroke(draw: ImageDraw.ImageDraw, colour: str, width: float) -> None:
        for point in ends:
            draw.line([tuple(point), tuple(tip)], fill=colour, width=max(1, round(width)))
        for x, y in (*ends, tip):
            draw.ellipse(_around((x, y), width / 2), fill=colour)

    return stroke


def _around(centre: tuple[float, float], radius: float) -> tuple[float, float, float, float]:
    x, y = centre
    return x - radius, y - radius, x + radius, y + radius


def _draw_plate(draw: ImageDraw.ImageDraw, size: tuple[int, int], points: tuple[Pixel, ...], text: str) -> None:
    """The text on a dark plate at the bottom, or at the top where the action touches the bottom."""
    width, height = size
    font_px = max(11, min(size) // 27)
    text, font = _font_for(text, font_px)
    margin = font_px // 2
    lines = _wrapped(text, font, width - 4 * margin)
    line_px = round(1.3 * font_px)
    plate_px = len(lines) * line_px + 2 * margin
    if plate_px + 2 * margin > height // 3:
        return  # a thumbnail: its action would hide under the words
    at_top = bool(points) and max(y for _, y in points) > 0.75 * height and min(y for _, y in points) > 0.25 * height
    top = margin if at_top else height - margin - plate_px
    box = (margin, top, width - 1 - margin, top + plate_px)
    draw.rounded_rectangle(box, radius=margin, fill="#101014", outline="white", width=max(1, font_px // 12))
    for number, line in enumerate(lines):
        draw.text((2 * margin, top + margin + number * line_px), line, fill="white", font=font)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _font_for(text: str, size_px: int) -> tuple[str, Font]:
    """A font that has the text's characters; without one on this machine, the text without them."""
    if not text.isascii():
        for name in _CHINESE_FONTS:
            try:
                return text, ImageFont.truetype(name, size_px)
            except OSError:
                continue
        text = re.sub(r"[^\x20-\x7e]+", "...", text)
    return text, ImageFont.load_default(size_px)


def _wrapped(text: str, font: Font, width_px: float) -> list[str]:
    """The text in lines of at most width_px, cut with dots after the last line that is shown."""
    lines = [""]
    for character in text:
        if font.getlength(lines[-1] + character) > width_px and lines[-1]:
            if len(lines) == _MAX_LINES:
                lines[-1] = lines[-1][:-3] + "..."
                break
            lines.append("")
        lines[-1] += character
    return lines
