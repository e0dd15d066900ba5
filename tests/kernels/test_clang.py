"""The native sources are C++ and not GCC's idea of it: a Mac has Clang alone."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"
CLANG = next(filter(None, map(shutil.which, ("clang++", *(f"clang++-{n}" for n in range(22, 10, -1))))), None)
ARM = platform.machine() in ("aarch64", "arm64")
FLAGS = {  # CMakeLists.txt's; bindings.cpp needs nanobind's headers and none of these
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avxvnni": ("-mavx2", "-mfma", "-mf16c", "-mavxvnni"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c"),
    "neon": ("-march=armv8.2-a+dotprod",),
}
SOURCES = sorted(path.stem for path in NATIVE.glob("*.cpp") if path.stem != "bindings")


@pytest.mark.skipif(not CLANG, reason="Clang is not installed")
@pytest.mark.parametrize("name", SOURCES)
def test_clang_accepts(name: str) -> None:
    if name in FLAGS and (name == "neon") != ARM:
        pytest.skip("kernels of another machine")
    command = [str(CLANG), "-fsyntax-only", "-std=c++17", "-Wall", "-Wextra", "-Werror", *FLAGS.get(name, ())]
    run = subprocess.run([*command, str(NATIVE / f"{name}.cpp")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
