"""autoglm pack: separate encoder files of every kind in, one mmproj out; nothing in a file is ever run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autoglm.cli import main
from autoglm.errors import ConfigError, FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.train.checkpoint_gguf import read_pair
from autoglm.train.encoder_files import assemble, read_weights
from autoglm.train.export import export_mmproj, export_pair
from autoglm.train.model import AutoGLMPhone
from autoglm.train.tokenizer import load_tokenizer
from tests.train.phones import make_phone

Save = Callable[[dict[str, torch.Tensor], Path], None]
PROJECTORS = ("vision_projector.", "audio_projector.", "fusion.")


@pytest.fixture(scope="module")
def model() -> AutoGLMPhone:
    return make_phone()


def part(model: AutoGLMPhone, *prefixes: str, strip: str = "") -> dict[str, torch.Tensor]:
    return {n.removeprefix(strip): v for n, v in model.state_dict().items() if n.startswith(prefixes)}


def legacy(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("vision", "audio", "save"),
    [
        ("vit-b16.pt", "conformer-tiny.bin", torch.save),
        ("vit-b16.pt", "conformer-tiny.bin", legacy),
        ("vit.safetensors", "conformer.safetensors", save_file),
        ("wrapped.pt", "ddp.bin", lambda s, p: torch.save({"state_dict": {f"module.{n}": v for n, v in s.items()}}, p)),
    ],
)
def test_every_kind_of_file_gives_the_mmproj_of_the_model(
    model: AutoGLMPhone, tmp_path: Path, vision: str, audio: str, save: Save
) -> None:
    save(part(model, "vision.", strip="vision."), tmp_path / vision)
    save(part(model, "audio.", strip="audio."), tmp_path / audio)
    save(part(model, *PROJECTORS), tmp_path / "projectors")
    packed = tmp_path / "packed.gguf"
    flags = ["--vision", vision, "--audio", audio, "--projectors", "projectors"]
    command = ["pack", *(f if f.startswith("-") else str(tmp_path / f) for f in flags), "-o", str(packed)]
    assert main([*command, "--name", "AutoGLM-Phone-Nano"]) == 0
    whole = export_pair(model.state_dict(), model.config, load_tokenizer().gguf_metadata(), tmp_path)
    read = read_pair(whole.text, packed)
    assert read.config == model.config.without_stem_norms()
    assert packed.read_bytes() == whole.mmproj.read_bytes()


def test_parts_may_share_a_file_and_ears_may_be_missing(model: AutoGLMPhone, tmp_path: Path) -> None:
    state, config = assemble(part(model, "vision.", "vision_projector."), None, None)
    assert config.audio is None and config.fusion.mode == "concat" and config.text.hidden_size == 256
    export_mmproj(tmp_path / "eyes.gguf", state, config)
    with GGUFFile.open(tmp_path / "eyes.gguf") as file:
        assert file.get("clip.has_audio_encoder", bool) is False
        assert {name.split(".")[0] for name in file.tensors} == {"v", "mm"}


def test_new_projectors_for_a_decoder_of_any_width(model: AutoGLMPhone, tmp_path: Path) -> None:
    state, config = assemble(part(model, "vision."), part(model, "audio."), None, width=512)
    again, _ = assemble(part(model, "vision."), part(model, "audio."), None, width=512)
    assert config.text.hidden_size == 512 and config.fusion.mode == "gcmf"
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    export_mmproj(tmp_path / "new.gguf", state, config)


def test_missing_parts_are_named(model: AutoGLMPhone) -> None:
    vision, audio = part(model, "vision."), part(model, "audio.")
    with pytest.raises(ConfigError, match="no projectors.*--projectors.*--width"):
        assemble(vision, audio, None)
    with pytest.raises(ConfigError, match=r"audio_projector\.norm\.weight is missing"):
        assemble(vision, audio, part(model, "vision_projector.", "fusion."))
    with pytest.raises(ConfigError, match=r"vision_projector\.fc1\.weight or fc2"):
        assemble(vision, audio, part(model, "fusion."))
    del vision["vision.blocks.1.norm2.bias"]
    with pytest.raises(ConfigError, match=r"vision encoder is of no preset.*smoke's, .*blocks\.1\.norm2\.bias"):
        assemble(vision, audio, part(model, *PROJECTORS))


class Attack:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["ATTACK_FOLDER"],)


def write_attack(path: Path) -> None:
    torch.save({"patch_embed.weight": Attack()}, path)


def write_cut(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def write_cut_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_attack, "not a file of tensors alone.*never opened"),
        (write_cut, "cut short"),
        (write_cut_safetensors, "damaged or cut short"),
        (lambda path: path.write_bytes(b""), "is no PyTorch or safetensors file"),
        (lambda path: path.write_bytes(b"hello, what is this?"), "never opened|no PyTorch or safetensors file"),
        (lambda path: path.write_bytes(b"GGUF" + bytes(30)), "is a GGUF already"),
        (lambda path: torch.save(torch.zeros(3), path), "holds a Tensor"),
        (lambda path: torch.save({"a": torch.zeros(3), "epoch": 3}, path), "'epoch', which is no tensor"),
        (lambda path: torch.save({}, path), "holds no tensors"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: None, "cannot be read .*No such file"),
    ],
)
def test_bad_files_are_refused_and_never_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[Path], None],
    message: str,
) -> None:
    monkeypatch.setenv("ATTACK_FOLDER", str(tmp_path / "attacked"))
    path = tmp_path / "vit-b16.pt"
    write(path)
    with pytest.raises(FormatError, match=message):
        read_weights(path)
    assert main(["pack", "--vision", str(path), "-o", str(tmp_path / "out.gguf")]) == 3
    error = capsys.readouterr().err
    assert error.startswith("ERROR: ") and error.count("\n") == 1
    assert not (tmp_path / "attacked").exists() and not (tmp_path / "out.gguf").exists()
