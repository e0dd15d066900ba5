"""serve's self-check: the shipped Nano passes it, a wrong weight does not, and who has no card is not asked."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from autoglm.actions import Tap
from autoglm.cli.loading import LoadedModel, ModelOptions, load_model
from autoglm.cli.self_check import KnownScreen, card_path, check_taps, read_known_screen
from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.errors import FormatError
from autoglm.formats.gguf import GGUFFile
from tests.cli.serving import serving

NANO = SHIPPED_MODELS["nano"]


def copy_of_nano(folder: Path) -> Path:
    card = card_path(NANO.path)
    for file in (NANO.path, NANO.mmproj, card, card.with_suffix(".png")):
        shutil.copyfile(file, folder / file.name)
    return folder / NANO.path.name


def load(path: Path, **options: int) -> LoadedModel:
    chosen = {"ctx_size": 1024, **options}
    return load_model(path, ModelOptions(threads=2, takes_media=True, **chosen), lambda what, done, total: None)  # type: ignore[arg-type]


def damage(mmproj: Path, tensor: str) -> None:
    """Turn the rows of a matrix around: a file of the right form and size, and of finite weights."""
    with GGUFFile.open(mmproj) as gguf:
        info = gguf.tensors[tensor]
    data = np.fromfile(mmproj, np.uint8)
    rows = data[info.offset : info.offset + info.nbytes].reshape(info.shape[0], -1)
    rows[:] = rows[::-1].copy()
    data.tofile(mmproj)


def test_the_shipped_model_passes(caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(NANO.path)
    with caplog.at_level(logging.INFO, "autoglm.cli"):
        check_taps(loaded)
    assert caplog.messages[-1].startswith("Self-check: the known screen is tapped inside its box")
    assert loaded.engine.stats().num_requests_total == 1 and not loaded.engine.has_work()


def test_a_wrong_weight_is_refused(tmp_path: Path) -> None:
    path = copy_of_nano(tmp_path)
    damage(tmp_path / NANO.mmproj.name, "mm.2.weight")
    with pytest.raises(FormatError, match="fails its self-check: told .* on its known screen it .*; mend: fetch"):
        check_taps(load(path))


def test_serve_refuses_to_start_unless_told(tmp_path: Path) -> None:
    path = copy_of_nano(tmp_path)
    damage(tmp_path / NANO.mmproj.name, "mm.2.weight")
    with pytest.raises(AssertionError, match="fails its self-check"):
        with serving("-m", str(path), "-c", "1024"):
            pass
    with serving("-m", str(path), "-c", "1024", "--skip-self-check") as server:
        assert not any("Self-check" in line for line in server.lines)
        assert server.stop() == 0


def test_without_a_card_nothing_is_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = copy_of_nano(tmp_path)
    card_path(path).unlink()
    loaded = load(path)
    with caplog.at_level(logging.INFO, "autoglm.cli"):
        check_taps(loaded)
    assert loaded.engine.stats().num_requests_total == 0
    assert not any("elf-check" in message for message in caplog.messages)


def test_a_context_too_small_for_the_screen_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(copy_of_nano(tmp_path), ctx_size=64)
    check_taps(loaded)
    assert "Self-check left out, the known screen does not fit: the prompt has" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", '{"self_check": {"say": "x", "box": [1, 2, 3]}}', '{"rows": []}'])
def test_a_damaged_card_is_one_clear_error(content: str, tmp_path: Path) -> None:
    card_path(tmp_path / "m.gguf").write_text(content)
    with pytest.raises(FormatError, match=r"m\.click-card\.json: is no click card; mend: delete it"):
        read_known_screen(tmp_path / "m.gguf")


def test_a_missing_picture_is_one_clear_error(tmp_path: Path) -> None:
    path = copy_of_nano(tmp_path)
    card_path(path).with_suffix(".png").unlink()
    with pytest.raises(FormatError, match="the click card's picture cannot be read"):
        check_taps(load(path))


def test_the_edges_of_a_box_count() -> None:
    screen = KnownScreen(Path("x.png"), "tap it", (10, 20, 30, 40))
    assert all(screen.holds(Tap(x, y)) for x, y in ((10, 20), (30, 40), (20, 30)))
    assert not any(screen.holds(Tap(x, y)) for x, y in ((9, 30), (31, 30), (20, 19), (20, 41)))


def test_the_shipped_card_is_about_the_shipped_files() -> None:
    import hashlib

    card = json.loads(card_path(NANO.path).read_text(encoding="utf-8"))
    for file in (NANO.path, NANO.mmproj):
        assert card["model"][file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert len(card["rows"]) == 4 and card["screens"] == 240
