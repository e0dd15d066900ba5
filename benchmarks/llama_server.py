"""llama.cpp's own server for comparisons: the one there is, or built from the source that its Python binding ships.

    python benchmarks/llama_server.py        prints the path of a llama-server that runs, building it if need be

LLAMA_SERVER names one; else `llama-server` in PATH is taken; else the sdist of llama-cpp-python (pinned, so that every
comparison meets the same peer) is fetched with pip and its vendored llama.cpp built for this very CPU, without web page
and TLS, which nobody measures. That takes 8 minutes of one core, once; it lies in the cache folder afterwards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import platformdirs

SDIST = "llama-cpp-python==0.3.36"
CMAKE_FLAGS = (
    "CMAKE_BUILD_TYPE=Release",
    "GGML_NATIVE=ON",
    "LLAMA_BUILD_SERVER=ON",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_APP=OFF",
    "LLAMA_BUILD_UI=OFF",
    "LLAMA_USE_PREBUILT_UI=OFF",
    "LLAMA_OPENSSL=OFF",
)


def find_llama_server() -> Path:
    """The llama-server to compare with, built first where there is none. Raises SystemExit saying what is missing."""
    named = os.environ.get("LLAMA_SERVER")
    found = named or shutil.which("llama-server")
    if found:
        return _checked(Path(found))
    built = cache_folder() / "bin" / "llama-server"
    if not built.exists():
        _build(cache_folder())
    return _checked(built)


def llama_server_version(server: Path) -> str:
    """What it says of itself, on one line."""
    said = subprocess.run([str(server), "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in (said.stdout + said.stderr).splitlines() if line.startswith(("version", "built"))]
    return ", ".join(lines)


def cache_folder() -> Path:
    return Path(platformdirs.user_cache_dir("autoglm")) / "benchmarks" / SDIST.replace("==", "-")


def _checked(server: Path) -> Path:
    try:
        subprocess.run([str(server), "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{server} does not run ({error}); mend: name another with LLAMA_SERVER") from None
    return server


def _build(folder: Path) -> None:
    missing = [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"to build llama-server {', '.join(missing)} must be there; or name one with LLAMA_SERVER")
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"building llama-server of {SDIST} (minutes, once)", file=sys.stderr)
    # Built beside its place and moved there whole, so that a broken build is not taken for one.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".llama-server-") as scratch:
        source = _source(Path(scratch))
        build = Path(scratch) / "build"
        flags = [f"-D{flag}" for flag in CMAKE_FLAGS]
        # Its libraries lie beside the program and are looked for there.
        flags += ["-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN"]
        _run(["cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", *flags])
        _run(["ninja", "-C", str(build), "llama-server"])
        folder.mkdir(exist_ok=True)
        (build / "bin").rename(folder / "bin")


def _source(scratch: Path) -> Path:
    """The vendored llama.cpp out of the sdist."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python"]
    _run([*pip, "--dest", str(scratch), SDIST])
    archive = next(scratch.glob("*.tar.gz"))
    with tarfile.open(archive) as file:
        file.extractall(scratch / "sdist", filter="data")
    return next((scratch / "sdist").glob("*/vendor/llama.cpp"))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ... failed:\n{done.stdout[-2000:]}")


if __name__ == "__main__":
    print(find_llama_server())
