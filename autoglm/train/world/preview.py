"""A contact sheet of generated screens with the box of every element drawn on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from autoglm.train.world.canvas import Box
from autoglm.train.world.labels import Language
from autoglm.train.world.screens import Screen, draw_screen
from autoglm.train.world.split import Split

TAP, INK, NAME = (230, 30, 60), (20, 170, 60), (40, 90, 240)


def _pixels(box: Box, image: Image.Image) -> Box:
    return (box[0] * image.width, box[1] * image.height, box[2] * image.width - 1, box[3] * image.height - 1)


def mark(screen: Screen) -> Image.Image:
    """The screen with its boxes: red where a tap counts, blue around what is only named, green around ink."""
    image = screen.image.copy()
    draw = ImageDraw.Draw(image)
    for element in screen.elements:
        draw.rectangle(_pixels(element.box, image), outline=TAP if element.tappable else NAME, width=2)
        draw.rectangle(_pixels(element.ink, image), outline=INK)
    return image


def contact_sheet(
    path: Path,
    split: Split,
    *,
    count: int = 12,
    columns: int = 6,
    width: int = 320,
    first_seed: int = 0,
    language: Language | None = None,
    pages: Sequence[str] | None = None,
) -> None:
    """Write a PNG of `count` marked screens, `columns` in a row, each `width` pixels wide."""
    marked = []
    for index in range(count):
        page = pages[index % len(pages)] if pages else None
        marked.append(mark(draw_screen(first_seed + index, split, width=width, language=language, page=page)))
    row_height = max(image.height for image in marked) + 8
    sheet = Image.new("RGB", (columns * (width + 8), -(-count // columns) * row_height), (90, 90, 90))
    for index, image in enumerate(marked):
        sheet.paste(image, ((index % columns) * (width + 8), index // columns * row_height))
    sheet.save(path)
