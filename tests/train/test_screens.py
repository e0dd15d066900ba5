"""Screens: the same from the same seed, true boxes and inks, one layout at every width, splits apart."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("resvg_py", reason="screens are drawn with the extra autoglm[train]")

from autoglm.errors import ConfigError  # noqa: E402
from autoglm.train.world import assets, glyphs, pages, pages_apps, screens  # noqa: E402
from autoglm.train.world.canvas import Box, Canvas, overlaps  # noqa: E402
from autoglm.train.world.labels import LABELS, LANGUAGES, VISIBLE, Language  # noqa: E402
from autoglm.train.world.preview import INK, NAME, TAP, contact_sheet, mark  # noqa: E402
from autoglm.train.world.screens import DEVICES, PAGE_NAMES, Screen, draw_screen  # noqa: E402
from autoglm.train.world.split import SPLITS, Split, rng_for  # noqa: E402
from autoglm.train.world.wallpapers import KINDS, draw_wallpaper  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
WORLD = ROOT / "autoglm" / "train" / "world"
# Enough seeds to meet every branch of every page, few enough for two seconds.
SEEDS = range(12)
WIDTH = 448


def many() -> list[Screen]:
    return [
        draw_screen(seed, split, width=WIDTH, page=page) for split in SPLITS for page in PAGE_NAMES for seed in SEEDS
    ]


@pytest.fixture(scope="module")
def drawn() -> list[Screen]:
    return many()


def forget_glyphs() -> None:
    for cache in (glyphs._font, glyphs.text_glyphs, glyphs._icon_master, glyphs.icon_glyphs, pages._keyboard_picture):
        cache.cache_clear()


@pytest.fixture
def no_assets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that has no font and no icon; what was drawn before is forgotten, before and after."""
    forget_glyphs()
    monkeypatch.setattr(glyphs, "font_file", lambda name: None)
    monkeypatch.setattr(glyphs, "icon_file", lambda icon_set, stem: None)
    yield
    forget_glyphs()


def blank_canvas(language: Language, width: int) -> Canvas:
    rng = rng_for("train", "canvas")
    return Canvas(width, width, screens._style(rng, "train", language), rng)


def ink_of_pixels(canvas: Canvas) -> Box:
    """The tight box of everything that is not background, in units."""
    changed = (np.asarray(canvas.image) != np.array(canvas.style.background)).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    x0, y0, x1, y1 = (float(edge) / canvas.scale for edge in edges)
    return x0, y0, x1, y1


def test_a_stream_belongs_to_its_split_and_key() -> None:
    first = rng_for("train", "screen", 1).random(4)
    assert (rng_for("train", "screen", 1).random(4) == first).all()
    others = [("test", "screen", 1), ("train", "screen", 2), ("train", "screen", "1"), ("train", "screen1")]
    for split, *key in others:
        assert (rng_for(split, *key).random(4) != first).all()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split"):
        rng_for("dev", 1)  # type: ignore[arg-type]


def test_a_screen_is_the_same_from_the_same_seed() -> None:
    for seed in range(6):
        one, two = draw_screen(seed, "train", width=WIDTH), draw_screen(seed, "train", width=WIDTH)
        assert one.image.tobytes() == two.image.tobytes()
        assert one.elements == two.elements
    assert draw_screen(1, "train", width=WIDTH).image.tobytes() != draw_screen(1, "test", width=WIDTH).image.tobytes()


def test_the_splits_share_no_font_no_icons_and_no_wallpaper() -> None:
    for language in LANGUAGES:
        train, test = (
            {file for face in assets.FACES[language, split] for file in (face.regular, face.bold)} for split in SPLITS
        )
        assert train and test and not train & test
    assert not set(assets.SETS_OF["train"]) & set(assets.SETS_OF["test"])
    assert not set(KINDS["train"]) & set(KINDS["test"])


@pytest.mark.parametrize("width", [WIDTH, 1080])
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_ink_of_a_text_is_where_its_pixels_are(language: Language, width: int) -> None:
    for label, size, align in zip(
        VISIBLE[::3], itertools.cycle((38, 53, 70)), itertools.cycle(("left", "center", "right"))
    ):
        canvas = blank_canvas(language, width)
        ink = canvas.text((540, 500), label.text(language), size, canvas.style.text, align=align)
        assert ink == pytest.approx(ink_of_pixels(canvas))


@pytest.mark.parametrize("width", [WIDTH, 1080])
def test_the_ink_of_an_icon_is_where_its_pixels_are(width: int) -> None:
    for stem in list(assets.ICONS)[::3]:
        canvas = blank_canvas("en", width)
        assert canvas.icon(stem, (500, 600), 83, canvas.style.text) == pytest.approx(ink_of_pixels(canvas))


def test_a_text_stands_where_it_was_asked_to() -> None:
    canvas = blank_canvas("en", 1080)
    ink = canvas.text((540, 500), "HEH", 60, canvas.style.text, align="center")
    assert (ink[0] + ink[2]) / 2 == pytest.approx(540, abs=4)
    assert (ink[1] + ink[3]) / 2 == pytest.approx(500, abs=4)


def test_boxes_lie_on_the_screen_and_hold_their_ink(drawn: list[Screen]) -> None:
    for screen in drawn:
        for element in screen.elements:
            for box in (element.box, element.ink):
                assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1, element
            x, y = (element.ink[0] + element.ink[2]) / 2, (element.ink[1] + element.ink[3]) / 2
            assert element.box[0] <= x <= element.box[2] and element.box[1] <= y <= element.box[3], element


def test_a_tap_on_one_thing_never_hits_another(drawn: list[Screen]) -> None:
    for screen in drawn:
        tappable = [element for element in screen.elements if element.tappable]
        assert len({element.label for element in tappable}) == len(tappable), screen.page
        for one, other in itertools.combinations(tappable, 2):
            shrunk = (one.box[0] + 0.003, one.box[1] + 0.002, one.box[2] - 0.003, one.box[3] - 0.002)
            assert not overlaps(shrunk, other.box), (one, other)


def test_inks_of_different_things_do_not_overlap(drawn: list[Screen]) -> None:
    for screen in drawn:
        for one, other in itertools.combinations(screen.elements, 2):
            assert one.label == other.label or not overlaps(one.ink, other.ink), (screen.page.key, one, other)


def test_every_nameable_thing_is_met(drawn: list[Screen]) -> None:
    met = {element.label for screen in drawn for element in screen.elements}
    assert met == set(VISIBLE)


def test_labels_are_no_smaller_than_a_phone_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, list[float]] = {}
    draw = Canvas.text

    def record(
        canvas: Canvas, xy: tuple[float, float], text: str, size: float, *rest: object, **options: object
    ) -> Box:
        written.setdefault(text, []).append(size)
        return draw(canvas, xy, text, size, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Canvas, "text", record)
    many()
    sizes = [size for label in VISIBLE for language in LANGUAGES for size in written.get(label.text(language), [])]
    assert len(sizes) > 1000
    assert min(sizes) >= 33
    assert np.quantile(sizes, 0.02) >= 36


def test_a_keyboard_is_up_where_a_field_is_focused_and_hides_nothing(drawn: list[Screen]) -> None:
    assert any(screen.keyboard for screen in drawn)
    for screen in drawn:
        assert screen.keyboard == screen.field_focused
        if screen.keyboard:
            assert screen.page.key in ("search_page", "chat")
            top = 1 - 720 / 1080 * screen.image.width / screen.image.height
            assert all(element.box[3] <= top + 0.01 for element in screen.elements)


def test_a_page_still_loading_has_its_title_alone(drawn: list[Screen]) -> None:
    loading = [screen for screen in drawn if screen.loading]
    assert len(loading) == len(SPLITS) * len(SEEDS)
    for screen in loading:
        assert [(element.label, element.tappable) for element in screen.elements] == [(screen.app, False)]


def test_a_page_belongs_to_the_app_it_names(drawn: list[Screen]) -> None:
    for screen in drawn:
        titles = [element.label for element in screen.elements if element.role == "title"]
        assert titles == ([] if screen.app is None else [screen.app])
        if screen.page.key in ("chat", "chat_list"):
            assert screen.app is not None and screen.app.key == "wechat"


def test_what_lies_under_a_dialog_cannot_be_tapped(drawn: list[Screen]) -> None:
    dialogs = [screen for screen in drawn if screen.page.key == "dialog"]
    assert any(element.role == "dimmed" for screen in dialogs for element in screen.elements)
    for screen in dialogs:
        tappable = [element for element in screen.elements if element.tappable]
        assert 1 <= len(tappable) <= 3
        assert all(element.role == "button" for element in tappable)


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_a_small_drawing_is_the_full_one_shrunk(page: str) -> None:
    for seed in (3, 4, 5):
        full, small = draw_screen(seed, "train", page=page), draw_screen(seed, "train", page=page, width=WIDTH)
        assert full.image.size in DEVICES
        assert [(e.label, e.role, e.tappable) for e in full.elements] == [
            (e.label, e.role, e.tappable) for e in small.elements
        ]
        for one, other in zip(full.elements, small.elements, strict=True):
            # Letters are fitted to whole pixels (hinting), so long words end up to a few pixels elsewhere.
            assert one.box == pytest.approx(other.box, abs=0.03)
            assert one.ink == pytest.approx(other.ink, abs=0.03)
        shrunk = np.asarray(full.image.resize((56, 112)), dtype=np.float32)
        assert np.abs(shrunk - np.asarray(small.image.resize((56, 112)), dtype=np.float32)).mean() < 6


def filler_texts() -> list[str]:
    """Every word that pages draw beside labels: the arguments of `words(...)` and the previews of chats."""
    texts = [pages_apps.PREVIEWS_ZH, pages_apps.PREVIEWS_EN]
    for path in WORLD.glob("pages*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "words":
                texts += [
                    c.value
                    for a in node.args
                    for c in ast.walk(a)
                    if isinstance(c, ast.Constant) and isinstance(c.value, str)
                ]
    return texts


def test_filler_never_says_a_label() -> None:
    texts = filler_texts()
    assert len(texts) > 12
    for text, label in itertools.product(texts, LABELS):
        assert label.zh not in text
        assert f" {label.en.lower()} " not in f" {text.lower().replace('|', ' ')} ", (text, label.en)


@pytest.mark.skipif(bool(assets.missing_assets()), reason="fonts or icons are not installed")
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_font_has_every_letter(language: Language) -> None:
    letters = {letter for label in LABELS for letter in label.text(language)} - {" "}
    for split in SPLITS:
        for face in assets.FACES[language, split]:
            for file in {face.regular, face.bold}:
                unknown = glyphs.text_glyphs(file, face.index, 80, "\U000fffff").mask.tobytes()
                boxes = {
                    letter
                    for letter in letters
                    if glyphs.text_glyphs(file, face.index, 80, letter).mask.tobytes() == unknown
                }
                assert not boxes, (face.name, boxes)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dark", [True, False])
def test_a_wallpaper_leaves_room_for_labels(split: Split, dark: bool) -> None:
    for seed in range(30):
        pixels = np.asarray(
            draw_wallpaper(rng_for(split, seed), split, (90, 200), dark=dark).convert("L"), dtype=np.float32
        )
        assert pixels.max() < 170 if dark else pixels.min() > 80


def test_stand_ins_are_drawn_where_nothing_is_installed(no_assets: None) -> None:
    shapes = {glyphs.text_glyphs("none.ttf", 0, 40, label.zh).mask.tobytes() for label in LABELS}
    assert len(shapes) == len({label.zh for label in LABELS})
    assert len({glyphs.icon_glyphs("lucide", stem, 48).mask.tobytes() for stem in assets.ICONS}) == len(assets.ICONS)
    for language in LANGUAGES:
        canvas = blank_canvas(language, WIDTH)
        ink = canvas.text((300, 500), VISIBLE[0].text(language), 50, canvas.style.text)
        assert ink == pytest.approx(ink_of_pixels(canvas))
    assert all(draw_screen(seed, "test", width=224).elements for seed in range(8))


def test_training_asks_for_everything_in_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(assets, "_SYSTEM", tmp_path)
    monkeypatch.setattr(assets, "assets_dir", lambda: tmp_path / "none")
    with pytest.raises(ConfigError, match="fonts-noto-cjk.*install_train_assets.sh") as error:
        assets.require_assets()
    assert all(entry.package in str(error.value) for entry in assets.ICON_SETS.values())


def test_a_damaged_font_and_an_unknown_page_are_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"not a font")
    monkeypatch.setattr(glyphs, "font_file", lambda name: broken)
    with pytest.raises(ConfigError, match=r"broken\.ttf.*install_train_assets\.sh"):
        glyphs.text_glyphs("broken", 0, 33, "word")
    with pytest.raises(ConfigError, match="no page 'lock screen'"):
        draw_screen(0, "train", page="lock screen")


def test_the_installer_brings_what_is_drawn_with() -> None:
    script = (ROOT / assets.INSTALLER).read_text(encoding="utf-8").split()
    words = {word.strip("'\"").partition("='")[2] or word.strip("'\"") for word in script}
    faces = [face for split_faces in assets.FACES.values() for face in split_faces]
    assert {face.package for face in faces} <= words
    assert {f"{entry.package}@{entry.version}" for entry in assets.ICON_SETS.values()} <= words
    assert {face.package for face in faces} == set(assets.FONT_LICENCES)
    table = assets.licence_table()
    assert all(package in table for package in assets.FONT_LICENCES)


def test_the_contact_sheet_shows_tap_boxes_names_and_ink(tmp_path: Path) -> None:
    screen = draw_screen(2, "train", width=WIDTH, page="chat")
    colors = {tuple(int(part) for part in color) for color in np.asarray(mark(screen)).reshape(-1, 3)}
    assert {TAP, INK, NAME} <= colors
    path = tmp_path / "sheet.png"
    contact_sheet(path, "train", count=3, columns=2, width=120)
    assert path.read_bytes().startswith(b"\x89PNG")
