"""The files that a start reads, remembered beside the compiled modules: the next start asks for all of them at once.

From a cold page cache Python waits for some six hundred files, one after another. The list is a hint: what is missing
or wrong in it costs a start its head start, and nothing else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from autoglm.kernels import ask_for_files
from autoglm.whole_file import whole_file

_LIST = Path(__file__).parent / "__pycache__" / f"start-files.{sys.implementation.cache_tag}.txt"
_MAX_FILES = 4096


def ask() -> None:
    """Have the system read what the last start read, while this one goes on."""
    ask_for_files(_remembered())


def remember() -> None:
    """Write down what this process has read so far, if the list lacks any of it and Python may write such files."""
    if sys.dont_write_bytecode:
        return
    files = sorted(_modules() | _mapped())[:_MAX_FILES]
    if set(files) <= set(_remembered()):
        return
    try:
        with whole_file(_LIST) as path:
            path.write_text("\n".join(files), encoding="utf-8")
    except OSError:  # an installation that only root writes to
        pass


def _remembered() -> list[str]:
    try:
        with open(_LIST, encoding="utf-8") as file:
            return [line.rstrip("\n") for line, _ in zip(file, range(_MAX_FILES), strict=False)]
    except (OSError, UnicodeDecodeError):
        return []


def _modules() -> set[str]:
    """Compiled modules, and extensions. Some packages put objects into sys.modules that make up any attribute."""
    found = set()
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        for path in (names.get("__cached__"), names.get("__file__")):
            if isinstance(path, str) and "\n" not in path and os.path.isfile(path):
                found.add(os.path.abspath(path))
                break
    return found


def _mapped() -> set[str]:
    """Shared libraries."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="ignore") as file:
            paths = {line.split(maxsplit=5)[5].rstrip("\n") for line in file if "/" in line}
    except OSError:
        return set()
    return {path for path in paths if ".so" in os.path.basename(path) and os.path.isfile(path)}
