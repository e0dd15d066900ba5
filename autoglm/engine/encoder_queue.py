"""Encodes the media of waiting prompts, one job after another in slices, and remembers what it made."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable

from autoglm.errors import EngineError
from autoglm.media.prompt_media import Encoded, MediaJob
from autoglm.media.recently_used import RecentlyUsed

logger = logging.getLogger(__name__)


class EncoderQueue:
    """The line of jobs, and a memory of embeddings within a budget of bytes.

    num_encoded  jobs done since start; num_remembered: asked for and found
    """

    def __init__(self, max_bytes: int) -> None:
        self.memory = RecentlyUsed[Encoded](max_bytes)
        self.num_encoded = 0
        self.num_remembered = 0
        self._waiting: deque[MediaJob] = deque()
        self._asked: set[bytes] = set()
        self._errors: OrderedDict[bytes, Exception] = OrderedDict()
        self._seconds: OrderedDict[bytes, float] = OrderedDict()
        self._current: tuple[MediaJob, Generator[None, float | None, Encoded]] | None = None

    def has_work(self) -> bool:
        return self._current is not None or bool(self._waiting)

    def get(self, job: MediaJob) -> Encoded | None:
        """What a job made, or None and it is put in line. Raises what encoding it raised."""
        error = self._errors.pop(job.key, None)
        if error is not None:
            raise error
        found = self.memory.get(job.key)
        if found is not None:
            self.num_remembered += 1
            return found
        if job.key not in self._asked:
            self._asked.add(job.key)
            self._waiting.append(job)
        return None

    def forget(self, keys: Iterable[bytes]) -> None:
        """Nobody waits for these any more: drop what was not begun, and stop what was."""
        gone = set(keys)
        self._waiting = deque(job for job in self._waiting if job.key not in gone)
        if self._current is not None and self._current[0].key in gone:
            self._current[1].close()
            self._current = None
        self._asked -= gone

    def advance(self, slice_s: float) -> None:
        """Work on the first job in line for about slice_s seconds."""
        if not self.has_work():
            return
        job = self._waiting.popleft() if self._current is None else self._current[0]
        started_s = time.monotonic()
        try:
            if self._current is None:
                self._current = job, job.encode(slice_s)
                next(self._current[1])
            else:
                self._current[1].send(slice_s)
        except StopIteration as end:
            self._finish(job)
            self._keep(job, end.value)
        except Exception as error:
            self._finish(job)
            self._note_error(job, error)
        self._note_seconds(job.key, time.monotonic() - started_s)

    def _keep(self, job: MediaJob, made: Encoded) -> None:
        num_places = sum(span.end - span.start for span in job.spans)
        if len(made.embeddings) != num_places:
            # Fewer rows would leave placeholders to be read as words, and shift what follows.
            self._note_error(
                job, EngineError(f"an encoder made {len(made.embeddings)} tokens of a medium that has {num_places}")
            )
            return
        self.num_encoded += 1
        self.memory.put(job.key, made)

    def _note_error(self, job: MediaJob, error: Exception) -> None:
        self._errors[job.key] = error
        logger.error("encoding a medium failed with %s", type(error).__name__)
        while len(self._errors) > 64:
            self._errors.popitem(last=False)

    def take_seconds(self, job: MediaJob) -> float:
        """Seconds that encoding a job took, told once; 0 for what was remembered."""
        return self._seconds.pop(job.key, 0.0)

    def _note_seconds(self, key: bytes, seconds: float) -> None:
        self._seconds[key] = self._seconds.get(key, 0.0) + seconds
        while len(self._seconds) > 256:
            self._seconds.popitem(last=False)

    def _finish(self, job: MediaJob) -> None:
        self._current = None
        self._asked.discard(job.key)
