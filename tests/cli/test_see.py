"""autoglm see: Nano taps what is named and the tap is drawn there; everything that cannot be asked is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from autoglm import cli
from autoglm.cli.embedded import EmbeddedServer
from autoglm.cli.loading import ModelOptions, find_model, load_model
from tests.cli.conftest import FakeServer
from tests.cli.test_commands import only_error, run
from tests.tiny_models import TinyModel

ROOT = Path(__file__).resolve().parents[2]
SPOKEN = ROOT / "docs" / "command.flac"  # "tap wallet"
WALLET = (0.259, 0.510, 0.5, 0.734)  # its box on docs/screen.png, in parts of the sides
TINY_GLM4V = ROOT / "tests" / "fixtures" / "glm4v-tiny"
URL = ["--url", "http://x/v1"]


@pytest.fixture(scope="module")
def nano() -> Iterator[list[str]]:
    """The flags that ask one loaded Nano."""
    options = ModelOptions(threads=1, ctx_size=1024, parallel=1, takes_media=True)
    loaded = load_model(find_model(options, _ignore), options, _ignore)
    with EmbeddedServer(loaded, api_key="key") as server:
        yield ["--url", server.url, "--api-key", "key"]


def _ignore(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def screen(tmp_path: Path) -> Path:
    return Path(shutil.copy(ROOT / "docs" / "screen.png", tmp_path))


def is_in_wallet(told: dict[str, Any]) -> bool:
    ((x, y),) = told["pixels"]
    width, height = told["screen"]["width"], told["screen"]["height"]
    return WALLET[0] * width <= x <= WALLET[2] * width and WALLET[1] * height <= y <= WALLET[3] * height


def test_a_typed_command_with_the_model_loaded_here(screen: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No flags about the model: what the README's command does."""
    code, out, err = run(capfd, "see", str(screen), "tap Wallet", "-t", "1", "-c", "1024")
    drawn = screen.with_name("screen-seen.png")
    assert (code, err) == (0, "")
    assert out.startswith('Tap Wallet\ndo(action="Tap", element=[3') and out.endswith(f"Drawn in {drawn}\n")
    with Image.open(screen) as before, Image.open(drawn) as after:
        assert after.size == before.size
        above = (0, 0, 360, 600)
        changed = ImageChops.difference(before.convert("RGB").crop(above), after.crop(above)).getbbox()
    assert changed is not None
    left, top, right, bottom = changed
    # Above its text only the ring is new, and that is on the wallet.
    assert WALLET[0] * 360 < (left + right) / 2 < WALLET[2] * 360 and right - left < 60
    assert WALLET[1] * 640 < (top + bottom) / 2 < WALLET[3] * 640 and bottom - top < 60


def test_a_spoken_command_as_json(screen: Path, nano: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, "see", str(screen), "--say", str(SPOKEN), "--json", *nano)
    assert (code, err) == (0, "") and out.count("\n") == 1
    told = json.loads(out)
    assert told["thought"].lower() == "heard: tap wallet\ntap wallet" and told["action"]["kind"] == "Tap"
    assert told["screen"] == {"width": 360, "height": 640} and is_in_wallet(told)
    assert Path(told["drawn"]).is_file() and told["timings"]["images"][0]["original_height"] == 640


def test_the_picture_is_drawn_upright_in_its_own_pixels(
    screen: Path, nano: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """A photo stored on its side, at three times the size: coordinates are of what a person sees."""
    side = screen.with_name("side.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(screen) as image:
        stored = image.convert("RGB").resize((1080, 1920)).transpose(Image.Transpose.ROTATE_90)
    stored.save(side, quality=95, exif=exif)
    assert cli.main(["see", str(side), "tap Wallet", "--json", *nano]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["screen"] == {"width": 1080, "height": 1920} and is_in_wallet(told)
    assert Image.open(told["drawn"]).size == (1080, 1920)


def test_what_is_sent(screen: Path, fake: FakeServer, capfd: pytest.CaptureFixture[str]) -> None:
    fake.deltas = [{"reasoning_content": "think"}, {"content": 'do(action="Back")'}]
    flags = ["--system", "be brief", "-n", "99", "--max-pixels", "50000"]
    code, out, _ = run(capfd, "see", str(screen), "go back", "--say", str(SPOKEN), *flags, *URL)
    assert code == 0 and out.startswith('think\ndo(action="Back")\n')
    (body,) = fake.requests
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert [part["type"] for part in body["messages"][1]["content"]] == ["image_url", "input_audio", "text"]
    assert body["response_format"] == {"type": "autoglm_action"} and body["temperature"] == 0
    assert (body["max_tokens"], body["max_pixels"]) == (99, 50000)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_answer_that_is_no_action_is_shown_and_said(
    screen: Path, fake: FakeServer, capfd: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """A server of somebody else may not know the action language."""
    code, out, err = run(capfd, "see", str(screen), "hi", *URL, *flags)
    assert code == 3 and "nothing was drawn" in only_error(err) and "no action" in err
    assert out == "Hello\n" if not flags else json.loads(out)["answer"] == "Hello" and not json.loads(out)["action"]
    assert not screen.with_name("screen-seen.png").exists()


def test_files_of_others_are_never_replaced(screen: Path, fake: FakeServer, capfd: pytest.CaptureFixture[str]) -> None:
    fake.deltas = [{"content": 'do(action="Tap", element=[1,1])'}]
    other = screen.with_name("screen-seen.png")
    other.write_bytes(b"a holiday picture")
    ask = ["see", str(screen), "hi", *URL]
    for flags in ([], ["-o", str(other)], ["-o", str(screen)]):
        code, _, err = run(capfd, *ask, *flags)
        assert code == 2 and "was not drawn by autoglm see" in only_error(err)
    assert other.read_bytes() == b"a holiday picture" and fake.requests == [], "refused before anything is asked"
    mine = str(screen.with_name("mine.png"))
    assert run(capfd, *ask, "-o", mine)[0] == run(capfd, *ask, "-o", mine)[0] == 0, "its own it may draw again"
    code, _, err = run(capfd, "see", mine, "hi", "-o", mine, *URL)
    assert code == 2 and "was not drawn" in only_error(err), "and never over the screen it was given"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png", "hi"], "picture file 'none.png' not found"),
        ([str(ROOT), "hi"], "cannot be read: Is a directory"),
        ([str(ROOT / "LICENSE"), "hi"], "the picture is of an unknown format; send PNG, JPEG, WebP or GIF"),
        (["SCREEN"], "nothing is asked of the screen; give a text"),
        (["SCREEN", "  "], "nothing is asked of the screen"),
        (["SCREEN", "--say", "none.wav"], "sound file 'none.wav' not found"),
        (["SCREEN", "--say", str(ROOT / "LICENSE")], "the sound is of an unknown format; send wav, mp3, flac or ogg"),
        (["SCREEN", "hi", "-o", "seen.jpg"], "no name for a PNG"),
        (["SCREEN", "hi", "-o", "no-such-folder/x.png"], "'no-such-folder' is no folder this user can write to"),
        (["SCREEN", "hi", "--mmproj", "none.gguf"], "Cannot load multimodal projector, file 'none.gguf' not found"),
        (["SCREEN", "hi", "-m", "none.gguf"], "model file 'none.gguf' not found"),
        (["SCREEN", "hi", *URL, "--mmproj", "x.gguf"], "--mmproj loads a model here and --url asks a server elsewhere"),
        (
            ["SCREEN", "--say", str(SPOKEN), "-m", str(TINY_GLM4V / "main-f32.gguf"),
             "--mmproj", str(TINY_GLM4V / "mmproj-q8_0.gguf")],
            "main has no ears, mmproj-q8_0.gguf holds no audio encoder; mend: give the words as text",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_one_sentence(
    screen: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capfd, "see", *(str(screen) if word == "SCREEN" else word for word in arguments))
    assert code == 2 and out == "" and message in only_error(err)


def test_a_model_without_eyes(screen: Path, tiny_llama: TinyModel, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capfd, "see", str(screen), "hi", "-m", str(tiny_llama.path))
    assert code == 2 and "reads text only: no mmproj-*.gguf of its name lies beside it; mend: " in only_error(err)


def test_a_refusal_of_the_server_is_one_sentence(
    screen: Path, nano: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capfd, "see", str(screen), "hi", "--max-pixels", "99999999", *nano)
    assert code == 1 and "max_pixels" in only_error(err)
