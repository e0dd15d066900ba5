"""The click card's arithmetic on replies made by hand, and what it writes beside the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")

from PIL import Image  # noqa: E402

from autoglm.actions import LongPress, Tap, format_action, parse_action  # noqa: E402
from autoglm.cli import click_card  # noqa: E402
from autoglm.cli.click_card import CardOptions, Pair, make_card  # noqa: E402
from autoglm.cli.self_check import read_known_screen  # noqa: E402
from autoglm.deploy.shipped import SHIPPED_MODELS  # noqa: E402
from autoglm.errors import ConfigError, FormatError  # noqa: E402
from autoglm.train.world.tasks import Example  # noqa: E402

NANO = SHIPPED_MODELS["nano"]
COUNT = 12


def right(example: Example) -> str:
    return f"<think></think>\n<answer>{example.answer}</answer>"


def moved(example: Example) -> str:
    """Three thousandths to the right and four down of where it should be."""
    action = parse_action(example.answer)
    if isinstance(action, Tap | LongPress):
        action = type(action)(min(action.x + 3, 999), min(action.y + 4, 999))
    return f"<answer>{format_action(action)}</answer>"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of Nano whose reference is always right, and which taps beside it and once says nothing."""

    def ask(pair: Pair, examples: list[Example]) -> list[str]:
        if pair.name == "F32 + F32":
            return [right(example) for example in examples]
        replies = [moved(example) for example in examples]
        touched = [n for n, example in enumerate(examples) if example.target is not None]
        replies[touched[0]] = "I do not know"
        return replies

    monkeypatch.setattr(click_card, "_ask", ask)
    for file in (NANO.path, NANO.mmproj):
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path / NANO.path.name


def test_errors_hits_and_agreement_are_counted(model: Path) -> None:
    text = make_card(CardOptions(model, examples=COUNT)).read_text(encoding="utf-8")
    card = json.loads((model.parent / f"{model.stem}.click-card.json").read_text(encoding="utf-8"))
    reference, measured = card["rows"]
    assert reference["weights"] == "F32 + F32 (reference)" and measured["weights"] == "Q4_K_M + Q8_0"
    assert (reference["median_error"], reference["worst_error"]) == (0, 0)
    assert reference["inside"]["right"] == reference["inside"]["total"] > 1
    assert reference["agreement"]["right"] == reference["agreement"]["total"] == COUNT
    assert measured["median_error"] == measured["p95_error"] == measured["worst_error"] == 5.0
    assert measured["median_to_centre"] == 5.0
    assert measured["num_taps"] == reference["num_taps"] - 1
    assert measured["agreement"]["right"] == COUNT - 1
    assert measured["nbytes"] == NANO.file_bytes
    assert "| Q4_K_M + Q8_0 | 12.8 |" in text and f"--card -n {COUNT} --seed 0" in text


def test_the_known_screen_lies_beside_the_model(model: Path) -> None:
    make_card(CardOptions(model, examples=COUNT))
    known = read_known_screen(model)
    assert known is not None and known.say
    with Image.open(known.picture) as picture:
        assert picture.format == "PNG" and picture.width == 448
    left, top, right_, bottom = known.box
    assert 0 <= left < right_ <= 999 and 0 <= top < bottom <= 999


def test_a_model_that_taps_nowhere_right_gets_no_card(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click_card, "_ask", lambda pair, examples: ["no action"] * len(examples))
    with pytest.raises(FormatError, match="taps inside no box of 12 held-out screens"):
        make_card(CardOptions(model, examples=COUNT))
    assert not list(model.parent.glob("*click-card*"))


def test_a_model_without_eyes_gets_no_card(tmp_path: Path) -> None:
    shutil.copyfile(NANO.path, tmp_path / "alone.gguf")
    with pytest.raises(ConfigError, match="no mmproj of its name lies beside"):
        make_card(CardOptions(tmp_path / "alone.gguf", examples=1))
