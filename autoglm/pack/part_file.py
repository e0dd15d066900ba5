"""A file of known size that is filled over several runs: NAME.part, and a journal of what is in it for good.

The journal's first line is the fingerprint of what the file is made from; each further line names a piece that was on
the disk before the line was written. Another fingerprint or size, or no journal, means beginning anew. NAME itself
appears by a rename when every piece is there, and never before.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from autoglm.errors import ConfigError


class PartFile:
    """The `.part` of `path`, open for writing; however the `with` block ends, the next one goes on from there.

    part        the file being filled
    done        names of the pieces that need not be written again
    is_changed  whether an older part was thrown away because it was made from something else
    """

    def __init__(self, path: Path, fingerprint: str, header: bytes, file_bytes: int) -> None:
        """Go on with what is there, or begin with `header` and nothing else; fingerprint is one line of ASCII.

        Raises ConfigError if the folder cannot be written.
        """
        self.path = path
        self.part, self._journal = part_of(path), path.with_name(path.name + ".part.done")
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._journal.read_text().split("\n") if self._journal.is_file() else []
            is_ours = lines[:1] == [fingerprint] and self.part.is_file() and self.part.stat().st_size == file_bytes
            # What follows the last line end was cut short by a crash.
            self.done = set(lines[1:-1]) if is_ours else set[str]()
            self.is_changed = bool(lines) and not is_ours
            if not is_ours:
                self._journal.unlink(missing_ok=True)
                with open(self.part, "wb") as file:
                    file.write(header)
                    file.truncate(file_bytes)
            self._write_journal([fingerprint, *sorted(self.done)], "w")
            self._file: BinaryIO = open(self.part, "rb+")

    def _write_journal(self, lines: list[str], mode: str) -> None:
        with open(self._journal, mode) as journal:
            journal.write("".join(f"{line}\n" for line in lines))
            journal.flush()
            os.fsync(journal.fileno())

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Bytes of a piece, at their place from the start of the file. Raises ConfigError if the disk is full."""
        with write_errors(self.path):
            self._file.seek(offset)
            self._file.write(data.data)

    def finish_piece(self, name: str) -> None:
        """Every byte of a piece was written; returns when they are on the disk."""
        with write_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._write_journal([name], "a")
            self.done.add(name)

    def publish(self) -> None:
        """Give the file its name; the caller has made sure that all pieces are there."""
        with write_errors(self.path):
            self._file.close()
            os.replace(self.part, self.path)
            self._journal.unlink()

    def forget(self) -> None:
        """What is in the part is no good: the next run begins anew."""
        self._journal.unlink(missing_ok=True)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """What the system says against writing becomes a ConfigError with the mend."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            mend = "free some space and run the same command again, it goes on where it stopped"
        else:
            mend = "name a folder you may write to with --out"
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}; {mend}") from None


def check_space(files: dict[Path, int]) -> None:
    """Raises ConfigError unless the disk has room for what these files of (bytes) still lack, in one folder.

    What an older part of a file holds already counts as room.
    """
    for folder in {path.parent for path in files}:
        needed = sum(size - _held_bytes(path) for path, size in files.items() if path.parent == folder)
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise ConfigError(
                f"{folder} has {free / 1e9:.2f} GB free and the files need {needed / 1e9:.2f} GB; "
                "free some space, or name another folder with --out"
            )


def _held_bytes(path: Path) -> int:
    return sum(place.stat().st_blocks * 512 for place in (path, part_of(path)) if place.is_file())
