"""ARM's kernels on a machine that is not one: cross-compiled, emulated, and held to the portable ones bit for bit.

Runs where Debian's g++-aarch64-linux-gnu and qemu-user are installed. tests/kernels runs on ARM itself as it does here.
"""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
ENGINE = ("dispatch", "program", "quantize", "thread_pool", "weights")
# CMakeLists.txt's, but for the portable kernels, which need not be fast here.
FLAGS = ("-std=c++17", "-ffp-contract=off", "-fno-math-errno", f"-I{NATIVE}")
KERNELS = {"neon": ("-O3", "-march=armv8.2-a+dotprod", "-fno-schedule-insns"), "scalar": ("-O1",)}


@pytest.mark.skipif(not COMPILER or not EMULATOR, reason="no g++-aarch64-linux-gnu and qemu-user: nothing emulates ARM")
def test_every_kernel_gives_the_portable_ones_bits(tmp_path: Path) -> None:
    sources = {NATIVE / f"{name}.cpp": KERNELS.get(name, ("-O1",)) for name in (*KERNELS, *ENGINE)}
    sources[Path(__file__).with_name("two_tables.cpp")] = ("-O1",)

    def build(source: Path) -> Path:
        made = tmp_path / f"{source.stem}.o"
        subprocess.run([str(COMPILER), *FLAGS, *sources[source], "-c", str(source), "-o", str(made)], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    program = tmp_path / "two_tables"
    subprocess.run([str(COMPILER), "-static", "-pthread", *map(str, objects), "-o", str(program)], check=True)
    command = [str(EMULATOR), "-cpu", "max", str(program), "neon"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "neon-dotprod: 174 results, 0 differ" in run.stdout
