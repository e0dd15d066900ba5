"""Files out of the system's page cache, and how much of a file is in it; and memory that the host has handed out.

A start from a cold cache is one whose files were not read since the machine came up. Advice drops clean pages that no
process maps; whether it did is counted, not believed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path


def drop(paths: Iterable[Path]) -> None:
    """Ask the system to forget what it keeps of these files."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only clean pages are dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read(paths: Iterable[Path]) -> None:
    """Read every file once, so that it is in the cache."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def resident_bytes(paths: Iterable[Path]) -> int:
    """Bytes of the files that are in the page cache, in whole pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = 0
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as view:
            start = ctypes.c_char.from_buffer(view)
            flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), flags)
            del start  # or the map could not be closed
            if failed:
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            pages += sum(flag & 1 for flag in bytes(flags))
    return pages * mmap.PAGESIZE


def touch_memory(num_bytes: int) -> None:
    """Use so much memory and give it back.

    The host of a virtual machine finds a page for it when it is first used, which takes ten times as long as using it;
    who starts first would pay for all that come after. A host that is told of free pages takes them back after some two
    seconds, so on a machine too busy to come to its weights by then this helps little.
    """
    child = os.fork()
    if child == 0:
        with mmap.mmap(-1, num_bytes) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            for at in range(0, num_bytes, mmap.PAGESIZE):
                memory[at] = 1
        os._exit(0)
    os.waitpid(child, 0)
