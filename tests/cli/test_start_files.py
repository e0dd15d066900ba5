"""What a start reads is remembered, and asked for by the next one."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from pathlib import Path

import pytest

from autoglm import kernels
from autoglm.cli import start_files


@pytest.fixture
def list_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(start_files, "_LIST", tmp_path / "folder" / "start-files.txt")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(start_files, "_MAX_FILES", 1 << 20)  # a process of tests has read more than any start
    return tmp_path / "folder" / "start-files.txt"


def test_modules_and_libraries_are_remembered(list_path: Path) -> None:
    start_files.remember()
    files = list_path.read_text().splitlines()
    assert all(os.path.isfile(path) for path in files)
    assert any("start_files" in path for path in files)
    assert kernels._native.__file__ in files


def test_nothing_is_written_twice_or_against_the_setting(list_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_files.remember()
    list_path.write_text(list_path.read_text() + "\n/one/more")
    start_files.remember()
    assert list_path.read_text().endswith("/one/more")
    list_path.unlink()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    start_files.remember()
    assert not list_path.exists()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice on files")
def test_a_file_asked_for_is_read(list_path: Path, tmp_path: Path) -> None:
    """Behind what no start can read: a missing file, a folder, a pipe without a writer."""
    wanted = tmp_path / "wanted"
    wanted.write_bytes(os.urandom(1 << 20))
    descriptor = os.open(wanted, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    os.mkfifo(tmp_path / "pipe")
    list_path.parent.mkdir()
    list_path.write_text("\n".join(map(str, (tmp_path / "missing", tmp_path, tmp_path / "pipe", wanted))))
    start_files.ask()
    give_up = time.monotonic() + 30
    while (resident := resident_pages(wanted)) < 256 and time.monotonic() < give_up:
        time.sleep(0.01)
    assert resident == 256


def resident_pages(path: Path) -> int:
    """Pages of 4 kB that the page cache holds of a file; a page cache is all a memory disk has."""
    flags = (ctypes.c_ubyte * 256)()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 1 << 20, access=mmap.ACCESS_COPY) as view:
        start = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(1 << 20), flags)
        del start
    assert not failed
    return sum(flag & 1 for flag in flags)


def test_a_damaged_list_is_no_list(list_path: Path) -> None:
    list_path.parent.mkdir()
    list_path.write_bytes(b"\xff\xfe\x00/\n" * 10)
    start_files.ask()
    start_files.remember()
    assert kernels._native.__file__ in list_path.read_text().splitlines()
