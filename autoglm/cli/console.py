"""What the command line shows: log lines, progress bars, sizes and counts for people, safe text."""

from __future__ import annotations

import logging
import sys
import time
import unicodedata
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

LOG_LEVELS = ("debug", "info", "warning", "error")
logger = logging.getLogger("autoglm.cli")


def set_up_logging(level: str) -> None:
    """Log lines of the package go to standard error as `LEVEL: message`; other libraries' only from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("autoglm").setLevel(level.upper())


class ProgressBars:
    """A context whose `report` draws one bar per kind of work on a terminal, and logs one line for it elsewhere.

    report(what, done_bytes, total_bytes) is the callback that pull and the model loader call; total 0 = unknown.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID | None] = {}

    def __enter__(self) -> ProgressBars:
        if not sys.stderr.isatty():  # rich takes a while to read, and a server's log is seldom a terminal
            return self
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                DownloadColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def report(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Draw `what` at done_bytes of total_bytes."""
        task = self._tasks.get(what)
        if self._progress is None:
            if what not in self._tasks:
                self._tasks[what] = None
                logger.info(f"{what[:1].upper()}{what[1:]}" + (f" ({size(total_bytes)})" if total_bytes else ""))
            return
        if task is None:
            task = self._tasks[what] = self._progress.add_task(what, total=total_bytes or None)
        self._progress.update(task, completed=done_bytes, total=total_bytes or None)


class CountBar:
    """A context whose `report(done, total)` draws one bar of counted things, or logs a line now and then elsewhere."""

    _LINE_EVERY_S = 30.0

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._what = what
        self._last_line = time.monotonic()
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> CountBar:
        if self._progress.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress.console.is_terminal:
            self._progress.stop()

    def report(self, done: int, total: int) -> None:
        """Draw or log `done` of `total`."""
        now = time.monotonic()
        if self._progress.console.is_terminal:
            self._progress.update(self._task, completed=done, total=total)
        elif now - self._last_line >= self._LINE_EVERY_S:
            self._last_line = now
            logger.info(f"{self._what}: {done} of {total}")


def size(num_bytes: float) -> str:
    """Bytes for people, in decimal units: 98.4 MB, 6.17 GB."""
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.{digits}f} {unit}"
    return f"{num_bytes:.0f} B"


def parameter_count(count: int) -> str:
    """A model's size as people name it: 9B, 1.7B, 135M."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.9995 * scale:
            value = count / scale
            return (f"{value:.1f}".removesuffix(".0") if value < 4.95 else f"{value:.0f}") + unit
    return str(count)


def printable(text: str, limit: int = 200) -> str:
    """Text out of a file or a server without what could steer a terminal (escape codes, direction marks)."""
    kept = "".join(
        c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"


class AnswerPiece(Struct, frozen=True):
    """Some text of an answer while it streams: of its thought, or of what it says."""

    text: str
    is_thought: bool = False


def print_answer(console: Console, pieces: Iterable[AnswerPiece]) -> None:
    """Print an answer as it comes and end its line: the thought dim and on lines of its own, nothing that could steer
    the terminal."""
    last = AnswerPiece("")
    for piece in pieces:
        if last.is_thought and not piece.is_thought and not last.text.endswith("\n"):
            print()
        # Line breaks and tabs stay.
        steady = "".join(c if c in "\n\t" else printable(c) for c in piece.text)
        console.print(steady, style="dim" if piece.is_thought else None, end="", markup=False, soft_wrap=True)
        last = piece
    print()
