"""The two scripts on machines that lack something: one line with the mend, and nothing slow before it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    "sh dirname uname id mktemp grep head rm df awk cat cksum find sort tail sed cut date sleep tr getconf env mkdir"
).split()
SHELL = shutil.which("dash") or "/bin/sh"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX shell scripts")


class Machine:
    """A clone of the scripts and a PATH with nothing on it but what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "clone"
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None, tool
            (self.bin / tool).symlink_to(found)
        for name in ("run_autoglm_server.sh", "run_tests.sh", "pyproject.toml", "CMakeLists.txt", "scripts/env.sh"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "native").mkdir()
        (self.root / "native" / "a.cpp").write_text("int a;\n")
        (self.root / "autoglm" / "deploy").mkdir(parents=True)
        shutil.copy(ROOT / "autoglm" / "deploy" / "preflight.py", self.root / "autoglm" / "deploy")

    def command(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!{SHELL}\n{body}\n")
        path.chmod(0o755)

    def python(self, name: str = "python3", *, failing_on: str = "no such text") -> None:
        """The real interpreter, except that a -c program that holds the given text fails."""
        self.command(name, f'case "$*" in *"{failing_on}"*) exit 1;; esac\nexec "{sys.executable}" "$@"')

    def compiler(self, body: str = "exit 0") -> None:
        self.command("c++", body)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SHELL, str(self.root / script), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            env={"PATH": str(self.bin), "HOME": str(self.root), **environment},
        )

    def refusal(self, script: str = "run_autoglm_server.sh", *arguments: str, **environment: str) -> str:
        """The one line it refuses with, before it made anything."""
        arguments = arguments or ("--port", "0") if script == "run_autoglm_server.sh" else arguments
        result = self.run(script, *arguments, **environment)
        assert result.returncode != 0
        assert result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith("ERROR: ")
        assert not (self.root / ".venv").exists()
        return result.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", ["run_autoglm_server.sh", "run_tests.sh"])
def test_no_python(machine: Machine, script: str) -> None:
    assert "needs Python 3.10 or newer" in machine.refusal(script)


def test_old_python(machine: Machine) -> None:
    machine.command("python3", 'case "$2" in *sys.exit*) exit 1;; *) echo 3.8.10;; esac')
    line = machine.refusal()
    assert "python3 is Python 3.8.10" in line and "PYTHON=/path/to/python3" in line


def test_a_newer_python_beside_an_old_one_is_found(machine: Machine) -> None:
    machine.command("python3", "exit 1")
    machine.python("python3.12")
    assert "no C++ compiler" in machine.refusal()


def test_no_compiler_names_this_systems_command(machine: Machine) -> None:
    machine.python()
    assert "looked for c++, g++, clang++" in machine.refusal()
    machine.command("apt-get", "exit 0")
    assert "apt-get install -y build-essential" in machine.refusal()
    (machine.bin / "apt-get").unlink()
    machine.command("dnf", "exit 0")
    assert "dnf install -y gcc-c++" in machine.refusal()
    (machine.bin / "uname").unlink()
    machine.command("uname", "echo Darwin")
    assert "xcode-select --install" in machine.refusal()


def test_a_compiler_that_is_only_a_stub(machine: Machine) -> None:
    machine.python()
    machine.compiler("echo 'xcrun: error: invalid active developer path' >&2; exit 1")
    assert "cannot compile C++17 (xcrun: error: invalid active developer path)" in machine.refusal()


def test_no_venv_module(machine: Machine) -> None:
    machine.python(failing_on="ensurepip")
    machine.compiler()
    machine.command("apt-get", "exit 0")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert f"apt-get install -y {version}-venv" in machine.refusal()


def test_no_python_headers(machine: Machine) -> None:
    machine.python(failing_on="Python.h")
    machine.compiler()
    assert "Python.h" in machine.refusal()


def test_full_disk(machine: Machine) -> None:
    machine.python()
    machine.compiler()
    (machine.bin / "df").unlink()
    machine.command("df", "echo 'Filesystem 1024-blocks Used Available Capacity Mounted on'; echo 'x 9 9 102400 9% /'")
    assert "only 100 MB are free" in machine.refusal()


def test_taken_port_and_missing_files_come_before_the_build(machine: Machine) -> None:
    machine.python()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert f"port {port} on 127.0.0.1 is taken" in machine.refusal("run_autoglm_server.sh", "--port", port)
    assert "'none.gguf' not found" in machine.refusal("run_autoglm_server.sh", "-m", "none.gguf")
    line = machine.refusal("run_autoglm_server.sh", "--mmproj", "mmproj-x.gguf")
    assert "Cannot load multimodal projector, file 'mmproj-x.gguf' not found" in line


def test_an_unreachable_package_index_is_one_line(machine: Machine) -> None:
    """The only one that makes an environment: pip itself has to fail."""
    machine.python()
    machine.compiler()
    result = machine.run(
        "run_autoglm_server.sh",
        "--port",
        "0",
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_CONFIG_FILE=os.devnull,
        PIP_RETRIES="0",
    )
    assert result.returncode == 4
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ERROR: ") and "could not be reached" in last and "PIP_INDEX_URL" in last
    assert not list((machine.root / ".venv").glob("*.stamp")), "a failed installation is not taken for done"


def installed(machine: Machine, extra: str) -> None:
    """An environment as a finished installation leaves it, with commands that say that they ran."""
    venv = machine.root / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(
        f'#!{SHELL}\nif [ "$1" = -c ]; then exec "{sys.executable}" "$@"; fi\necho "$@"\n'
    )
    (venv / "bin" / "autoglm").write_text(f'#!{SHELL}\necho "autoglm $*"\nexit 7\n')
    for name in ("python", "autoglm"):
        (venv / "bin" / name).chmod(0o755)
    program = f'ROOT="{machine.root}"; . "$ROOT/scripts/env.sh"; fingerprint "$VENV/bin/python"'
    result = subprocess.run([SHELL, "-c", program], capture_output=True, text=True, check=True)
    # As the shell's own substitution does, without the line's end.
    (venv / f"autoglm-{extra}.stamp").write_text(result.stdout.rstrip("\n"))


def test_second_start_goes_straight_to_serving(machine: Machine) -> None:
    machine.python()
    installed(machine, "serve")
    result = machine.run("run_autoglm_server.sh", "--port", "0", "--alias", "a b")
    assert (result.stdout, result.stderr) == ("autoglm serve --port 0 --alias a b\n", "")
    assert result.returncode == 7, "the server's exit code is the script's"


@pytest.mark.parametrize("changed", ["native/a.cpp", "native/new.h", "CMakeLists.txt", "pyproject.toml"])
def test_changed_sources_are_noticed(machine: Machine, changed: str) -> None:
    machine.python()
    installed(machine, "serve")
    with open(machine.root / changed, "a") as file:
        file.write("\n// changed\n")
    result = machine.run("run_autoglm_server.sh", "--port", "0")
    assert "no C++ compiler" in result.stderr, "it set out to build"


def test_tests_need_their_own_stamp_and_pass_arguments_on(machine: Machine) -> None:
    machine.python()
    installed(machine, "serve")
    assert "no C++ compiler" in machine.run("run_tests.sh").stderr
    shutil.rmtree(machine.root / ".venv")
    installed(machine, "test")
    result = machine.run("run_tests.sh", "tests/cli", "-k", "a or b")
    assert result.stdout == "-m pytest tests/cli -k a or b\n" and result.returncode == 0
