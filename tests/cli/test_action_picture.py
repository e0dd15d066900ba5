"""The drawn action: on the right pixels, visible on any screen, of the screen's own size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFont

from autoglm.actions import Action, Back, DoubleTap, Finish, LongPress, Swipe, Tap, Type
from autoglm.cli import action_picture
from autoglm.cli.action_picture import draw_action, save_drawn, touched_pixels, was_drawn_here

SCREEN = (360, 800)
MARK = (0xE6, 0x00, 0x3C)


def drawn(action: Action, colour: str = "gray", size: tuple[int, int] = SCREEN) -> NDArray[np.uint8]:
    return np.asarray(draw_action(Image.new("RGB", size, colour), action))


def where(pixels: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.intp]:
    """Rows of (y, x)."""
    return np.argwhere((pixels == colour).all(axis=2))


@pytest.mark.parametrize(
    ("point", "size", "pixel"),
    [
        ((0, 0), (1080, 2400), (0, 1)),
        ((999, 999), (1080, 2400), (1079, 2398)),
        ((500, 250), (1000, 2000), (500, 501)),
        ((999, 0), (1, 1), (0, 0)),
    ],
)
def test_coordinates_become_pixels(point: tuple[int, int], size: tuple[int, int], pixel: tuple[int, int]) -> None:
    assert touched_pixels(Tap(*point), *size) == (pixel,)


@pytest.mark.parametrize("colour", ["black", "white", "#e6003c", "#808080"])
@pytest.mark.parametrize("kind", [Tap, DoubleTap, LongPress])
def test_rings_are_around_the_pixel_and_show_on_any_screen(kind: type[Tap], colour: str) -> None:
    pixels = drawn(kind(300, 400), colour)
    ((x, y),) = touched_pixels(kind(300, 400), *SCREEN)
    around = pixels[y - 40 : y + 41, x - 40 : x + 41]
    for layer in ((0, 0, 0), (255, 255, 255), MARK):
        assert len(where(around, layer)) > 60, "one of three colours stands out against every screen"
    if colour != "#e6003c":
        assert np.abs(where(pixels, MARK).mean(axis=0) - (y, x)).max() <= 1


def test_a_swipe_ends_in_a_head() -> None:
    pixels = drawn(Swipe(500, 700, 500, 300))
    (x, start_y), (_, end_y) = touched_pixels(Swipe(500, 700, 500, 300), *SCREEN)
    marks = where(pixels, MARK)
    assert abs(marks[:, 0].min() - end_y) <= 3 and abs(marks[:, 0].max() - start_y) <= 3
    at_end, at_start = (marks[np.abs(marks[:, 0] - y) < 15][:, 1] for y in (end_y, start_y))
    assert np.ptp(at_end) > 2 * np.ptp(at_start) and abs(at_end.mean() - x) <= 1
    drawn(Swipe(500, 500, 500, 500))  # goes nowhere: no division by its length


@pytest.mark.parametrize("action", [Back(), Type("hello"), Finish("你好。" * 200), Tap(0, 0), Swipe(0, 0, 999, 999)])
@pytest.mark.parametrize("size", [(1, 1), (30, 60), (360, 800), (3200, 1440)])
def test_every_action_fits_every_screen(action: Action, size: tuple[int, int]) -> None:
    pixels = drawn(action, size=size)
    assert pixels.shape == (size[1], size[0], 3)
    if size[0] > 300:
        assert len(where(pixels, (255, 255, 255))) > 50, "its text is there"


def test_the_text_gives_way_to_the_action() -> None:
    plate = (0x10, 0x10, 0x14)
    assert where(drawn(Tap(500, 500)), plate)[:, 0].min() > 700
    assert where(drawn(Tap(500, 980)), plate)[:, 0].max() < 100


def test_without_a_chinese_font_the_rest_is_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(action_picture, "_CHINESE_FONTS", ("no-such-font.ttc",))
    text, font = action_picture._font_for('Type("你好 ok")', 20)
    assert text == 'Type("... ok")' and isinstance(font, ImageFont.FreeTypeFont)


def test_a_drawn_file_is_known_again(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    save_drawn(image, tmp_path / "ours.png")
    image.save(tmp_path / "theirs.png")
    assert was_drawn_here(tmp_path / "ours.png") and not was_drawn_here(tmp_path / "theirs.png")
    assert Image.open(tmp_path / "ours.png").size == (8, 8)
