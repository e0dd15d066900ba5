"""The model inside the package goes by a name, and an installation without its files says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoglm.deploy import pull, shipped
from autoglm.errors import ConfigError


def make_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "_FOLDER", folder)
    (folder / "AutoGLM-Phone-Nano-Q4_K_M.gguf").write_bytes(b"text")
    (folder / "mmproj-AutoGLM-Phone-Nano-Q8_0.gguf").write_bytes(b"eyes and ears")


@pytest.mark.parametrize("name", ["nano", "Nano"])
def test_nano_is_a_name_for_both_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, monkeypatch)
    model = pull.pull(name)
    assert model.name == "AutoGLM-Phone-Nano" and model.mmproj is not None
    assert (model.path.read_bytes(), model.mmproj.read_bytes()) == (b"text", b"eyes and ears")
    assert pull.is_model_name(name) and pull.is_cached(pull.NAMED_MODELS["nano"])
    assert pull.NAMED_MODELS["nano"].file_bytes == 17


@pytest.mark.parametrize("missing", ["AutoGLM-Phone-Nano-Q4_K_M.gguf", "mmproj-AutoGLM-Phone-Nano-Q8_0.gguf"])
def test_an_installation_without_the_pair_says_so(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, monkeypatch)
    (tmp_path / missing).unlink()
    assert not pull.is_cached(pull.NAMED_MODELS["nano"]) and pull.NAMED_MODELS["nano"].file_bytes == 0
    with pytest.raises(ConfigError, match="does not hold its two files; mend: install autoglm again"):
        pull.pull("nano")
