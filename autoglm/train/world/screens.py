"""Phone screens from seeds: a picture, the page it shows, and the true box of everything that can be named on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from autoglm.errors import ConfigError
from autoglm.train.world.assets import FACES, SETS_OF
from autoglm.train.world.canvas import Canvas, Element, Style
from autoglm.train.world.labels import LANGUAGES, Label, Language
from autoglm.train.world.pages import PageState
from autoglm.train.world.pages_apps import chat, chat_list, loading, search_page, shop
from autoglm.train.world.pages_system import dialog, launcher, settings_list
from autoglm.train.world.split import Split, rng_for
from autoglm.train.world.wallpapers import hsv

__all__ = ["DEVICES", "PAGE_NAMES", "Element", "Screen", "Split", "draw_screen"]

# Sizes of phones on sale, pixels (width, height), 16:9 to 20:9.
DEVICES = ((720, 1280), (720, 1600), (1080, 1920), (1080, 2160), (1080, 2340), (1080, 2400), (1440, 2960), (1440, 3200))

_PAGES: dict[str, tuple[float, Callable[[Canvas], PageState]]] = {
    "launcher": (0.25, launcher),
    "settings_list": (0.15, settings_list),
    "search_page": (0.13, search_page),
    "chat_list": (0.09, chat_list),
    "chat": (0.11, chat),
    "shop": (0.13, shop),
    "loading": (0.03, loading),
}
_DIALOG_SHARE = 0.11
PAGE_NAMES = (*_PAGES, "dialog")


@dataclass(frozen=True)
class Screen:
    """A drawn screen.

    image          RGB
    page           which page it is (kind `page`)
    app            the app whose name it shows, None on a launcher
    elements       everything named on it, tappable or not
    keyboard       an on-screen keyboard is up
    field_focused  a text field has the cursor
    loading        a spinner instead of content
    """

    image: Image.Image
    page: Label
    app: Label | None
    language: Language
    elements: tuple[Element, ...]
    keyboard: bool
    field_focused: bool
    dark: bool
    loading: bool


def _style(rng: np.random.Generator, split: Split, language: Language) -> Style:
    faces = FACES[(language, split)]
    weights = np.array([face.weight for face in faces])
    face = faces[int(rng.choice(len(faces), p=weights / weights.sum()))]
    sets = SETS_OF[split]
    icon_set = sets[int(rng.integers(len(sets)))]
    dark = bool(rng.random() < 0.4)
    hue, tone = float(rng.random()), float(rng.uniform(0, 0.08))
    if dark:
        background, surface = hsv(hue, tone * 3, rng.uniform(0.03, 0.11)), hsv(hue, tone * 3, rng.uniform(0.14, 0.22))
        text, secondary, line = (240, 240, 243), (158, 159, 166), hsv(hue, tone * 3, 0.27)
    else:
        background, surface = hsv(hue, tone, rng.uniform(0.93, 0.97)), hsv(hue, tone / 3, 1.0)
        text, secondary, line = (24, 24, 28), (128, 129, 136), hsv(hue, tone, 0.87)
    return Style(
        split=split,
        language=language,
        face=face,
        icon_set=icon_set,
        dark=dark,
        font_scale=float(rng.uniform(0.96, 1.2)),
        radius=float(rng.choice([0.12, 0.22, 0.28, 0.5])),
        background=background,
        surface=surface,
        text=text,
        secondary=secondary,
        accent=hsv(float(rng.random()), 0.7, 0.9 if dark else 0.55),
        line=line,
        heavy=bool(rng.random() < 0.15),
    )


def _draw_page(canvas: Canvas, page: str | None) -> PageState:
    wants_dialog = page == "dialog" if page is not None else canvas.chance(_DIALOG_SHARE)
    name = page
    if page is None or page == "dialog":
        weights = np.array([weight for weight, _ in _PAGES.values()])
        name = tuple(_PAGES)[int(canvas.rng.choice(len(_PAGES), p=weights / weights.sum()))]
    if wants_dialog and name == "loading":
        name = "launcher"
    assert name is not None
    state = _PAGES[name][1](canvas)
    return dialog(canvas, state) if wants_dialog else state


def draw_screen(
    seed: int, split: Split, *, width: int | None = None, language: Language | None = None, page: str | None = None
) -> Screen:
    """Draw the screen of (seed, split), the same on every call.

    width     pixels; None takes the size of the seed's own device. Another width draws the same layout at that scale.
    language  None lets the seed choose
    page      one of PAGE_NAMES; None lets the seed choose
    Raises ConfigError for a page that does not exist or assets that are not installed.
    """
    if page is not None and page not in PAGE_NAMES:
        raise ConfigError(f"there is no page {page!r}; pages are {', '.join(PAGE_NAMES)}")
    rng = rng_for(split, "screen", seed)
    device = DEVICES[int(rng.integers(len(DEVICES)))]
    drawn = LANGUAGES[int(rng.integers(len(LANGUAGES)))]
    style = _style(rng, split, language or drawn)
    width_px = width or device[0]
    canvas = Canvas(width_px, round(width_px * device[1] / device[0]), style, rng)
    state = _draw_page(canvas, page)
    return Screen(
        image=canvas.image,
        page=state.page,
        app=state.app,
        language=style.language,
        elements=tuple(canvas.elements),
        keyboard=state.keyboard,
        field_focused=state.field_focused,
        dark=style.dark,
        loading=state.loading,
    )
