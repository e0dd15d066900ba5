"""The committed type stub is what the built module says: a signature cannot drift unseen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nanobind", reason="nanobind is not installed: it writes the stub")

import autoglm.kernels


def test_stub_matches_the_module(tmp_path: Path) -> None:
    stub = tmp_path / "_native.pyi"
    command = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "autoglm.kernels._native", "-o", str(stub)]
    subprocess.run(command, check=True, capture_output=True)
    committed = Path(autoglm.kernels.__file__).with_name("_native.pyi")
    assert stub.read_text() == committed.read_text(), "write it anew with nanobind.stubgen"
