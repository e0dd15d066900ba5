"""autoglm data preview: the files it writes, and one clear error for each wrong flag."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from PIL import Image  # noqa: E402

from autoglm.errors import ConfigError  # noqa: E402
from autoglm.train.world.screens import draw_screen  # noqa: E402
from autoglm.train.world.speech import voices  # noqa: E402
from tests.cli.test_commands import only_error, run  # noqa: E402


def need_world() -> None:
    """Skip where scripts/install_train_assets.sh has not run."""
    try:
        draw_screen(0, "train", width=224)
        for language in ("zh", "en"):
            voices(language, "train")
    except ConfigError as error:
        pytest.skip(str(error))


def samples(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def test_preview_writes_screens_and_sounds(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    need_world()
    arguments = ["data", "preview", "--out", str(tmp_path / "a"), "--screens", "3", "--sounds", "2"]
    code, out, err = run(capfd, *arguments)
    assert code == 0, err
    with Image.open(tmp_path / "a" / "screens.png") as sheet:
        assert sheet.width > 3 * 300
        colors = {color for _, color in sheet.convert("RGB").getcolors(maxcolors=1 << 24)}
    assert (230, 30, 60) in colors and (20, 170, 60) in colors, "boxes are drawn"
    for name in ("sound-01-zh", "sound-02-en"):
        clean, heard = samples(tmp_path / "a" / f"{name}.wav"), samples(tmp_path / "a" / f"{name}-heard.wav")
        assert len(clean) > 4000 and np.abs(clean).max() > 8000 and np.abs(heard).max() > 100
        assert len(clean) != len(heard) or (clean != heard).any()
        assert f"{name}.wav" in out
    # The same seed gives the same files, another seed others.
    run(capfd, *arguments[:3], str(tmp_path / "b"), *arguments[4:])
    run(capfd, *arguments[:3], str(tmp_path / "c"), *arguments[4:], "--seed", "1")
    for name in ("screens.png", "sound-01-zh-heard.wav"):
        first, second, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert first == second != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "dev"], "--split is 'dev', expected train or test"),
        (["--language", "fr"], "--language is 'fr', expected zh or en"),
        (["--screens", "-1"], "--screens"),
        (["--sounds", "many"], "--sounds"),
    ],
)
def test_wrong_flags_are_one_line(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, out, err = run(capfd, "data", "preview", "--out", str(tmp_path / "x"), *arguments)
    assert code == 2 and out == "" and message in only_error(err)
    assert not (tmp_path / "x").exists()


def test_a_file_is_no_folder(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    code, _, err = run(capfd, "data", "preview", "--out", str(tmp_path / "x"))
    assert code == 2 and "is no folder to write to" in only_error(err)


def test_without_the_extra_the_mend_is_named(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else find(name))
    for command in (["train", "nano"], ["eval"], ["data", "preview", "--out", str(tmp_path / "x")]):
        code, _, err = run(capfd, *command)
        assert code == 2 and "torch is not installed" in only_error(err) and "autoglm[train]" in err
