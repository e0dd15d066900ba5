"""Checks before the build: ports, files, and command lines that are none of its business."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoglm.deploy import preflight


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_taken_port_suggests_a_free_one(taken_port: int) -> None:
    with pytest.raises(ValueError, match=rf"port {taken_port} on 127.0.0.1 is taken .*--port (\d+)") as caught:
        preflight.check_port("127.0.0.1", taken_port)
    preflight.check_port("127.0.0.1", int(str(caught.value).rpartition(" ")[2]))


def test_free_ports_pass() -> None:
    preflight.check_port("127.0.0.1", 0)
    preflight.check_port("localhost", 0)


def test_foreign_and_nonsense_addresses_are_refused() -> None:
    with pytest.raises(ValueError, match="not an address of this machine"):
        preflight.check_port("192.0.2.1", 8000)
    with pytest.raises(ValueError, match="not an address of this machine"):
        preflight.check_port("no.such.host.invalid", 8000)
    with pytest.raises(ValueError, match="expected 0 to 65535"):
        preflight.check_port("127.0.0.1", 70000)


def test_model_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not found"):
        preflight.check_model_file(str(tmp_path / "none.gguf"))
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "mmproj-a.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it holds a\.gguf: name one"):
        preflight.check_model_file(str(tmp_path))
    preflight.check_model_file(str(tmp_path / "a.gguf"))


def test_missing_projector_has_the_words_of_the_product() -> None:
    with pytest.raises(ValueError, match=r"^Cannot load multimodal projector, file 'mmproj-x\.gguf' not found"):
        preflight.check_mmproj_file("mmproj-x.gguf")


@pytest.mark.parametrize(
    "arguments",
    [["--port"], ["--port", "x"], ["--help", "--mmproj", "none.gguf"], ["-np", "4", "-ctk", "f16", "--port", "0"]],
)
def test_what_it_does_not_know_passes(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert preflight.main(arguments) == 0
    assert capfd.readouterr() == ("", "")


def test_names_instead_of_files_pass() -> None:
    for name in ("smollm2-135m", "hf:owner/repo", "modelscope:owner/repo:Q4_K_M"):
        assert preflight.main(["--port", "0", "-m", name]) == 0


def test_runs_by_path_without_the_package(taken_port: int, tmp_path: Path) -> None:
    """-I and -S leave nothing but the standard library, as on a fresh machine."""
    result = subprocess.run(
        [sys.executable, "-I", "-S", preflight.__file__, "--port", str(taken_port)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("ERROR: port ") and result.stderr.count("\n") == 1
