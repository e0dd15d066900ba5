"""Masks of words and icons, drawn once for a (font, size, text) or (icon set, size) and kept.

Where a font or icon is not installed a stand-in is drawn: Pillow's own font for letters, a pattern of squares made from
the name for ideographs and icons. So the training program can be tried on a machine that has none of them.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache

import resvg_py
from PIL import Image, ImageDraw, ImageFont

from autoglm.errors import ConfigError
from autoglm.train.world.assets import INSTALLER, font_file, icon_file

ICON_MASTER_PX = 192
# Half the height of a capital letter in parts of the size; the middle of an ideograph lies within 0.02 of it.
_MIDDLE = 0.36
_FIRST_IDEOGRAPH = 0x2E80


@dataclass(frozen=True)
class Glyphs:
    """A drawn text or icon: `mask` L cropped to its ink, whose corner is `left`, `top` pixels from the origin.

    The origin of a text is its left end on the middle line, that of an icon the upper left corner of its square.
    `advance` is the width a text takes, or the side of the square, in pixels.
    """

    mask: Image.Image
    left: int
    top: int
    advance: float


def _pattern(name: str, size_px: int) -> Image.Image:
    """A square of 6 x 6 cells, mirrored, different for every name."""
    bits = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") | 1 << 17
    cells = Image.new("L", (6, 6))
    for index in range(18):
        if bits >> index & 1:
            row, column = divmod(index, 3)
            cells.putpixel((column, row), 255)
            cells.putpixel((5 - column, row), 255)
    return cells.resize((size_px, size_px), Image.Resampling.NEAREST)


@lru_cache(maxsize=1024)
def _font(name: str, index: int, half_px: int) -> ImageFont.FreeTypeFont | None:
    path = font_file(name)
    if path is None:
        return None
    try:
        return ImageFont.truetype(path, half_px / 2, index=index, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise ConfigError(f"font {path.name} cannot be opened ({error}). Mend: sh {INSTALLER}") from None


def _stand_in_text(text: str, half_px: int) -> Image.Image:
    """Each character in a cell of its own, as wide as real fonts make it; rows as in `text_glyphs`."""
    size, pad = half_px / 2, half_px
    canvas = Image.new("L", (round(_stand_in_advance(text, half_px)) + 2 * pad, 3 * half_px))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size)
    x = float(pad)
    for character in text:
        width = _stand_in_advance(character, half_px)
        if ord(character) < _FIRST_IDEOGRAPH:
            draw.text((x + width / 2, 2 * half_px), character, font=font, fill=255, anchor="ms")
        else:
            square = _pattern(character, max(1, round(0.84 * size)))
            canvas.paste(square, (round(x), round(2 * half_px - (_MIDDLE + 0.42) * size)))
        x += width
    return canvas


def _stand_in_advance(text: str, half_px: int) -> float:
    return sum(0.55 if ord(character) < _FIRST_IDEOGRAPH else 1.0 for character in text) * half_px / 2


@lru_cache(maxsize=30_000)
def text_glyphs(font_name: str, index: int, half_px: int, text: str) -> Glyphs:
    """The mask of `text` in a font of assets.FACES at half_px / 2 pixels.

    Raises ConfigError for a font file that cannot be opened.
    """
    font = _font(font_name, index, half_px)
    pad, baseline = half_px, 2 * half_px
    if font is None:
        canvas, advance = _stand_in_text(text, half_px), _stand_in_advance(text, half_px)
    else:
        advance = font.getlength(text)
        canvas = Image.new("L", (int(advance) + 2 * pad, 3 * half_px))
        ImageDraw.Draw(canvas).text((pad, baseline), text, font=font, fill=255, anchor="ls")
    box = canvas.getbbox() or (pad, baseline, pad + 1, baseline + 1)
    return Glyphs(canvas.crop(box), box[0] - pad, round(box[1] - baseline + _MIDDLE * half_px / 2), advance)


@lru_cache(maxsize=2048)
def _icon_master(icon_set: str, stem: str) -> Image.Image:
    path = icon_file(icon_set, stem)
    if path is None:
        margin = ICON_MASTER_PX // 12
        master = Image.new("L", (ICON_MASTER_PX, ICON_MASTER_PX))
        master.paste(_pattern(stem, ICON_MASTER_PX - 2 * margin), (margin, margin))
        return master
    try:
        svg = path.read_text(encoding="utf-8")
        png = resvg_py.svg_to_bytes(svg_string=svg, width=ICON_MASTER_PX, height=ICON_MASTER_PX, skip_system_fonts=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"icon {path.name} of the set {icon_set} cannot be drawn ({error}). Mend: sh {INSTALLER}"
        ) from None
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA").getchannel("A")


@lru_cache(maxsize=20_000)
def icon_glyphs(icon_set: str, stem: str, size_px: int) -> Glyphs:
    """The mask of an icon of assets.ICONS in a square of size_px.

    Raises ConfigError for a file that cannot be drawn.
    """
    mask = _icon_master(icon_set, stem).resize((size_px, size_px), Image.Resampling.LANCZOS)
    box = mask.getbbox() or (0, 0, 1, 1)
    return Glyphs(mask.crop(box), box[0], box[1], float(size_px))
