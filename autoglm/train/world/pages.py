"""What pages share: status and title bar, app icons, buttons, text fields, tab bar, keyboard, spinner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

from PIL import Image

from autoglm.train.world.canvas import UNITS, Box, Canvas, Color, Style
from autoglm.train.world.labels import BY_KEY, VISIBLE_CLASS, Kind, Label
from autoglm.train.world.split import rng_for
from autoglm.train.world.wallpapers import hsv

T = TypeVar("T")
STATUS_HEIGHT = 84.0
TITLE_HEIGHT = 150.0
MARGIN = 56.0
WHITE: Color = (255, 255, 255)
KEYBOARD_HEIGHT = 720.0


@dataclass(frozen=True)
class PageState:
    """What a page is, beside its elements."""

    page: Label
    app: Label | None
    keyboard: bool = False
    field_focused: bool = False
    loading: bool = False


def label(kind: Kind, key: str) -> Label:
    """The label of a kind by its key."""
    return BY_KEY[(kind, key)]


def draw_some(canvas: Canvas, items: Sequence[T], count: int) -> list[T]:
    """`count` different ones of `items` in random order."""
    order = canvas.rng.permutation(len(items))[:count]
    return [items[int(index)] for index in order]


def one_of(canvas: Canvas, items: Sequence[T]) -> T:
    """One of `items`."""
    return items[int(canvas.rng.integers(len(items)))]


def hue_of(named: Label) -> float:
    """A thing's own colour, the same on every screen: golden-ratio steps keep neighbours apart."""
    return (VISIBLE_CLASS[(named.kind, named.key)] * 0.618034) % 1.0


def words(canvas: Canvas, zh: str, en: str) -> str:
    """One of the filler texts separated by | in the screen's language; none of them is a label."""
    choices = (zh if canvas.style.language == "zh" else en).split("|")
    return one_of(canvas, choices).strip()


def on_color(ground: Color) -> Color:
    """White or near-black, whichever is read better on `ground` (Rec. 601 luma)."""
    return WHITE if 0.299 * ground[0] + 0.587 * ground[1] + 0.114 * ground[2] < 150 else (20, 20, 24)


def clock_time(canvas: Canvas) -> str:
    """A time of day such as 14:05."""
    return f"{canvas.integer(0, 23)}:{canvas.integer(0, 59):02d}"


def price(canvas: Canvas) -> str:
    """A price in the screen's currency."""
    sign = "¥" if canvas.style.language == "zh" else "$"
    return f"{sign}{canvas.integer(5, 999)}"


def status_bar(canvas: Canvas, color: Color) -> None:
    """Time and battery along the upper edge."""
    canvas.text((MARGIN, STATUS_HEIGHT / 2), clock_time(canvas), 38, color)
    right = UNITS - MARGIN
    canvas.rect((right - 60, 28, right, 56), color, 8)
    if canvas.chance(0.5):
        for step in range(3):
            canvas.rect((right - 140 + step * 18, 50 - step * 10, right - 128 + step * 18, 56), color)


def back_arrow(canvas: Canvas, y: float, color: Color) -> None:
    """A chevron at the left edge."""
    canvas.lines([(MARGIN + 22, y - 28), (MARGIN - 4, y), (MARGIN + 22, y + 28)], color, 8)


def title_bar(canvas: Canvas, app: Label, *, actions: Sequence[Label] = ()) -> float:
    """The app's name (with its icon at times) and icon buttons at the right; returns the bar's lower edge."""
    style = canvas.style
    middle = STATUS_HEIGHT + TITLE_HEIGHT / 2
    if canvas.chance(0.3):
        canvas.rect((0, 0, UNITS, STATUS_HEIGHT + TITLE_HEIGHT), style.surface)
    status_bar(canvas, style.text)
    size = canvas.uniform(58, 72) * min(style.font_scale, 1.12)
    centered = canvas.chance(0.35)
    inks: list[Box] = []
    x = MARGIN
    if canvas.chance(0.4):
        back_arrow(canvas, middle, style.text)
        x += 62
    if centered:
        inks.append(
            canvas.text((UNITS / 2, middle), app.text(style.language), size, style.text, align="center", bold=True)
        )
    else:
        if canvas.chance(0.35):
            inks.append(app_icon(canvas, app, (x + 46, middle), 92))
            x += 92 + 24
        inks.append(canvas.text((x, middle), app.text(style.language), size, style.text, bold=True))
    ink = inks[0] if len(inks) == 1 else (inks[0][0], min(i[1] for i in inks), inks[-1][2], max(i[3] for i in inks))
    canvas.element(app, "title", (ink[0] - 10, middle - 60, ink[2] + 10, middle + 60), [ink], tappable=False)
    right = UNITS - MARGIN - 40
    for action in actions:
        assert action.icon is not None
        icon_ink = canvas.icon(action.icon, (right, middle), 76, style.text)
        canvas.element(action, "icon", (right - 66, middle - 66, right + 66, middle + 66), [icon_ink])
        right -= 136
    return STATUS_HEIGHT + TITLE_HEIGHT


def app_icon(canvas: Canvas, app: Label, center: tuple[float, float], size: float, tint: float | None = None) -> Box:
    """An app's icon: a glyph on a coloured tile (`tint` replaces its own hue); returns the tile's box."""
    assert app.icon is not None
    hue = hue_of(app) + canvas.uniform(-0.03, 0.03) if tint is None else tint
    plain = canvas.chance(0.2)
    tile = hsv(hue, 0.12, 0.97) if plain else hsv(hue, canvas.uniform(0.55, 0.85), canvas.uniform(0.6, 0.88))
    glyph = hsv(hue, 0.85, 0.5) if plain else on_color(tile)
    half = size / 2
    box = (center[0] - half, center[1] - half, center[0] + half, center[1] + half)
    canvas.rect(box, tile, canvas.style.radius * size)
    canvas.icon(app.icon, center, size * 0.64, glyph)
    return box


def button(
    canvas: Canvas, named: Label, box: Box, *, filled: bool, size: float, bare: bool = False, icon: bool = False
) -> None:
    """A button with its words in the middle: filled, outlined by a pale tile, or bare words."""
    style = canvas.style
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    color = on_color(style.accent) if filled else style.accent if canvas.chance(0.5) else style.text
    if not bare:
        canvas.rect(box, style.accent if filled else style.line, canvas.style.radius * 140)
    text = named.text(style.language)
    with_icon = icon and named.icon is not None
    size = canvas.fit(text, size, box[2] - box[0] - 40 - (80 if with_icon else 0), bold=True)
    inks: list[Box] = []
    x = middle[0]
    if with_icon and named.icon is not None:
        width = canvas.text_width(text, size, bold=True)
        inks.append(canvas.icon(named.icon, (x - width / 2 - 4, middle[1]), 64, color))
        x += 40
    inks.append(canvas.text((x, middle[1]), text, size, color, align="center", bold=True))
    canvas.element(named, "button", box, inks)


def text_field(canvas: Canvas, box: Box, *, focused: bool, hint: str) -> None:
    """A text field; focused: a ring, a cursor and no hint."""
    style = canvas.style
    radius = min((box[3] - box[1]) / 2, 30 + style.radius * 60)
    if focused:
        canvas.rect((box[0] - 5, box[1] - 5, box[2] + 5, box[3] + 5), style.accent, radius + 5)
    canvas.rect(box, style.surface if focused else style.line, radius)
    middle = (box[1] + box[3]) / 2
    if focused:
        canvas.rect((box[0] + 40, middle - 32, box[0] + 47, middle + 32), style.accent)
    else:
        canvas.text((box[0] + 40, middle), hint, canvas.fit(hint, 44, box[2] - box[0] - 70), style.secondary)


def tab_bar(canvas: Canvas) -> float:
    """Four unnamed tabs along the lower edge; returns its upper edge."""
    style = canvas.style
    top = canvas.height - 170
    canvas.rect((0, top, UNITS, canvas.height), style.surface)
    canvas.rect((0, top, UNITS, top + 3), style.line)
    for step in range(4):
        x = UNITS * (step + 0.5) / 4
        canvas.rect(
            (x - 34, top + 38, x + 34, top + 106), style.accent if step == 0 else style.secondary, 20 + 14 * (step % 2)
        )
    return top


def keyboard(canvas: Canvas) -> float:
    """The on-screen keyboard along the lower edge; returns its upper edge."""
    picture = _keyboard_picture(
        canvas.width_px, replace(canvas.style, background=(0, 0, 0), accent=(0, 0, 0)), canvas.integer(0, 3)
    )
    top_px = canvas.height_px - picture.height
    canvas.image.paste(picture, (0, top_px))
    return top_px / canvas.scale


@lru_cache(maxsize=256)
def _keyboard_picture(width_px: int, style: Style, variant: int) -> Image.Image:
    back: Color = (34, 35, 38) if style.dark else (209, 212, 219)
    key: Color = (78, 79, 84) if style.dark else (252, 252, 254)
    ink: Color = (240, 240, 240) if style.dark else (30, 30, 32)
    height = KEYBOARD_HEIGHT + 20 * variant
    board = Canvas(
        width_px, round(height * width_px / UNITS), replace(style, background=back), rng_for("train", "keyboard")
    )
    step = (height - 80) / 4
    for row, letters in enumerate(("qwertyuiop", "asdfghjkl", "zxcvbnm")):
        wide = UNITS / 10
        start = (UNITS - wide * len(letters)) / 2
        for column, letter in enumerate(letters):
            x, y = start + column * wide, 20 + row * step
            board.rect((x + 8, y + 10, x + wide - 8, y + step - 10), key, 14)
            board.text((x + wide / 2, y + step / 2), letter.upper() if variant % 2 else letter, 50, ink, align="center")
    y = 20 + 3 * step
    for x0, x1 in ((8, 190), (206, 800), (816, 1072)):
        board.rect((x0, y + 10, x1, y + step - 10), key, 14)
    return board.image


def spinner(canvas: Canvas, center: tuple[float, float]) -> None:
    """Dots on a circle, fading round it, and a word that nothing asks for."""
    style = canvas.style
    radius, count = canvas.uniform(70, 110), 10
    start = canvas.integer(0, count - 1)
    for step in range(count):
        angle = 2 * math.pi * (step + start) / count
        x, y = center[0] + radius * math.cos(angle), center[1] + radius * math.sin(angle)
        part = (step + 1) / count
        near, far = style.accent, style.background
        color = (
            round(far[0] + (near[0] - far[0]) * part),
            round(far[1] + (near[1] - far[1]) * part),
            round(far[2] + (near[2] - far[2]) * part),
        )
        canvas.rect((x - 20, y - 20, x + 20, y + 20), color, 20)
    if canvas.chance(0.7):
        text = words(canvas, "加载中…|请稍候…", "Loading…|Please wait…")
        canvas.text((center[0], center[1] + radius + 110), text, 50, style.secondary, align="center")
