"""Model and mmproj: found by name, checked against each other before anything slow, refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from autoglm.cli import pairing
from autoglm.cli.http_server import _media_door
from autoglm.cli.loading import ModelOptions, find_mmproj, load_model
from autoglm.cli.serve import ServeOptions
from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.errors import ConfigError, FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.kernels import Runtime
from autoglm.model.loader import WeightReader, read_model_config
from autoglm.model.multimodal import Multimodal
from autoglm.model.projector import check_projector, find_media_tokens
from tests.tiny_models import TinyModel

NANO = SHIPPED_MODELS["nano"]
FIXTURE = Path(__file__).parent.parent / "fixtures" / "glm4v-tiny"


def load(model: Path, mmproj: Path | None) -> object:
    return load_model(model, ModelOptions(mmproj=mmproj, threads=1, ctx_size=256), lambda what, done, total: None)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["mmproj-Phone-Q8_0.gguf"], "mmproj-Phone-Q8_0.gguf"),
        (["mmproj-Phone.gguf", "mmproj-Other-Q8_0.gguf"], "mmproj-Phone.gguf"),
        (["mmproj-Phone-F16.gguf", "mmproj-Phone-Q8_0.gguf"], "mmproj-Phone-Q8_0.gguf"),
        (["mmproj-Other-Q8_0.gguf"], None),
        ([], None),
    ],
)
def test_the_models_own_projector_is_found_beside_it(tmp_path: Path, files: list[str], found: str | None) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"x" * (20 if "F16" in name else 10))
    path = find_mmproj(tmp_path / "Phone-Q4_K_M.gguf", ModelOptions(takes_media=True))
    assert (path and path.name) == found


def test_an_explicit_projector_wins(tmp_path: Path) -> None:
    (tmp_path / "mmproj-Phone-Q8_0.gguf").touch()
    other = tmp_path / "other.gguf"
    assert find_mmproj(tmp_path / "Phone-Q4_K_M.gguf", ModelOptions(mmproj=other)) == other


def test_a_projector_of_another_width_is_refused() -> None:
    with pytest.raises(FormatError, match="makes tokens of width 256, and .* takes 64; mend: give the mmproj"):
        load(FIXTURE / "main-f32.gguf", NANO.mmproj)


def test_two_models_are_no_pair() -> None:
    with pytest.raises(FormatError, match="model of architecture 'glm4', not a multimodal projector"):
        load(NANO.path, NANO.path)


def test_a_projector_is_no_model() -> None:
    with pytest.raises(FormatError, match="this is a multimodal projector"):
        load(NANO.mmproj, None)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    cut = tmp_path / "mmproj-cut.gguf"
    cut.write_bytes(NANO.mmproj.read_bytes()[:-4096])
    with pytest.raises(FormatError, match="fetch it again"):
        load(NANO.path, cut)


def test_a_model_cut_short_is_refused(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(NANO.path.read_bytes()[:-4096])
    with pytest.raises(FormatError, match="fetch it again"):
        load(cut, NANO.mmproj)


@pytest.fixture
def nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before weights are read, or while native threads begin to: nobody waits for them."""
    monkeypatch.setattr(WeightReader, "wait", lambda reader: pytest.fail("the weights were waited for"))


def test_a_backbone_that_cannot_place_pictures_is_refused() -> None:
    """Without rotary sections every token of a picture would stand at one place."""
    mmproj = GGUFFile.open(FIXTURE / "mmproj-q8_0.gguf")
    backbone = replace(read_model_config(GGUFFile.open(FIXTURE / "main-f32.gguf")), mrope_section=None)
    with pytest.raises(FormatError, match="no rotary sections .*; mend: give a text model made for pictures"):
        check_projector(mmproj, backbone)


def test_a_vocabulary_without_markers_is_refused_before_loading(
    nothing_slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairing, "find_media_tokens", lambda _: find_media_tokens({"<|image|>": 5}.get))
    with pytest.raises(FormatError, match="no token for sounds, so this mmproj cannot belong to it; mend"):
        load(NANO.path, NANO.mmproj)


def test_a_template_without_markers_is_refused_before_loading(nothing_slow: None, tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}<|user|>\n{{ m.content if m.content is string }}{% endfor %}")
    options = ModelOptions(mmproj=NANO.mmproj, threads=1, ctx_size=256, chat_template_file=template)
    with pytest.raises(FormatError, match=r"makes 0 places for a part of type 'image', expected 1 <\|image\|>; mend"):
        load_model(NANO.path, options, lambda what, done, total: None)


def test_a_backbone_without_picture_tokens_is_refused() -> None:
    backbone = read_model_config(GGUFFile.open(FIXTURE / "main-f32.gguf"))
    mmproj = GGUFFile.open(FIXTURE / "mmproj-q8_0.gguf")
    tokens = find_media_tokens({"<|user|>": 5}.get)
    with pytest.raises(FormatError, match="has no token for pictures"):
        Multimodal(mmproj, Runtime(1), backbone, tokens, lambda ids: np.zeros((len(ids), 64), np.float32))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (ServeOptions(allow_remote_media=("example.com",)), "--allow-remote-media"),
        (ServeOptions(media_path=Path("/tmp")), "--media-path"),
        (ServeOptions(max_pixels=5000), "--max-pixels"),
    ],
)
def test_media_flags_without_a_projector_are_errors(
    tmp_path: Path, options: ServeOptions, flag: str, tiny_glm4: TinyModel
) -> None:
    loaded = load(tiny_glm4.path, None)
    with pytest.raises(ConfigError, match=f"{flag} has no effect: no mmproj is loaded"):
        _media_door(loaded, options)  # type: ignore[arg-type]
