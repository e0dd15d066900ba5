"""The one engine thread and its queues to asyncio: submit, cancel, drain, bounded hand-over.

The event loop never waits for the engine: it appends to an inbox and reads from a mailbox. The
engine thread sleeps on a condition while there is nothing to do, and hands the outputs of a step
over with one call per event loop, however many sequences took part. A slow reader costs memory
only for text its request may produce at most, as outputs nobody has read yet are merged.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Protocol

from autoglm.config import EngineConfig
from autoglm.engine.engine import EngineStats
from autoglm.engine.sequence import Sequence, SequenceOutput
from autoglm.errors import AutoglmError, CapacityError, EngineError
from autoglm.server.problems import log_failure

logger = logging.getLogger("autoglm.server")


class EngineLike(Protocol):
    """What the server asks of an engine. Only stats and the limit are read from other threads than the engine's."""

    config: EngineConfig

    @property
    def max_sequence_tokens(self) -> int: ...

    def stats(self) -> EngineStats: ...

    def add(self, sequence: Sequence) -> None: ...

    def prebuild(self, sequence: Sequence) -> None: ...

    def cancel(self, request_id: str) -> bool: ...

    def has_work(self) -> bool: ...

    def step(self) -> list[SequenceOutput]: ...


class OutputStream(AsyncIterator[SequenceOutput]):
    """What the sequences of one request produce, merged while nobody reads. Belongs to one event loop."""

    def __init__(self, driver: EngineDriver, request_ids: list[str]) -> None:
        self._driver = driver
        self._loop = asyncio.get_running_loop()
        self._open = set(request_ids)
        self._unread: dict[str, SequenceOutput] = {}
        self._error: Exception | None = None
        self._is_accepted = False
        self._wake = asyncio.Event()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that reads this stream."""
        return self._loop

    async def wait_accepted(self, timeout_s: float) -> bool:
        """Wait until the engine took the sequences; False when that takes longer than timeout_s.

        Raises what the engine refused them with (ContextLengthError, CapacityError, ...).
        """
        deadline = time.monotonic() + timeout_s
        while not (self._is_accepted or self._error):
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), max(0.0, deadline - time.monotonic()))
            except (asyncio.TimeoutError, TimeoutError):
                return False
        if self._error is not None:
            raise self._error
        return True

    async def __anext__(self) -> SequenceOutput:
        while True:
            if self._unread:
                return self._unread.pop(next(iter(self._unread)))
            if self._error is not None:
                raise self._error
            if not self._open:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()

    def cancel(self) -> None:
        """Give up what has not finished; the engine frees it before its next step. Safe to call twice."""
        for request_id in sorted(self._open):
            self._driver.cancel(request_id)
        self._open.clear()
        self._wake.set()

    def _accept(self) -> None:
        self._is_accepted = True
        self._wake.set()

    def _push(self, output: SequenceOutput) -> None:
        if output.request_id not in self._open:
            return
        earlier = self._unread.get(output.request_id)
        self._unread[output.request_id] = output if earlier is None else merge_outputs(earlier, output)
        if output.finish_reason is not None:
            self._open.discard(output.request_id)
        self._wake.set()

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._open.clear()
        self._wake.set()


def merge_outputs(earlier: SequenceOutput, later: SequenceOutput) -> SequenceOutput:
    """Two outputs of one sequence as one; lists are joined, everything else is the later one's."""
    later.token_ids = earlier.token_ids + later.token_ids
    later.text = earlier.text + later.text
    if earlier.logprobs is not None:
        later.logprobs = earlier.logprobs + (later.logprobs or [])
    return later


class EngineDriver:
    """Runs one engine on one thread and serves it to asyncio.

    Sequences beyond what the engine's batch and line hold are refused with 429 at once, without
    waiting for the engine to come out of its step.
    """

    def __init__(self, engine: EngineLike) -> None:
        self.engine = engine
        self.max_in_flight = engine.config.max_num_seqs + engine.config.max_waiting
        self._wake = threading.Condition()
        self._submitted: deque[tuple[list[Sequence], OutputStream]] = deque()
        self._cancelled: deque[str] = deque()
        self._prebuilds: deque[Sequence] = deque()
        self._streams: dict[str, OutputStream] = {}
        self._is_stopping = False
        self._is_draining = False
        self._has_failed = False
        self._thread: threading.Thread | None = None

    # -- any thread ------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """loading, ready, draining, stopped or failed."""
        if self._has_failed:
            return "failed"
        if self._is_draining:
            return "draining"
        if self._is_stopping:
            return "stopped"
        return "loading" if self._thread is None else "ready"

    @property
    def num_in_flight(self) -> int:
        """Sequences accepted and not finished."""
        return len(self._streams)

    def start(self) -> None:
        """Start the engine thread; a second call does nothing."""
        if self._thread is None:
            self._is_stopping = False
            self._thread = threading.Thread(target=self._run, name="autoglm-engine", daemon=True)
            self._thread.start()

    def begin_drain(self) -> None:
        """Refuse new work with 503 from now on; what runs goes on."""
        self._is_draining = True

    @property
    def is_running(self) -> bool:
        """Whether the engine thread is still there."""
        return self._thread is not None and self._thread.is_alive()

    def request_stop(self) -> None:
        """Ask the engine thread to end after the step it is in; whoever still waits gets a 503."""
        self.begin_drain()
        with self._wake:
            self._is_stopping = True
            self._wake.notify()

    def stop(self, drain: bool = False, timeout_s: float = 60.0) -> None:
        """Stop the engine thread; with drain, after what runs has finished or timeout_s have passed."""
        thread = self._thread
        if thread is None:
            return
        self.begin_drain()
        if drain:
            deadline = time.monotonic() + timeout_s
            while self._streams and thread.is_alive() and time.monotonic() < deadline:
                time.sleep(0.02)
        self.request_stop()
        thread.join(timeout=timeout_s)
        self._thread = None
        self._is_draining = False

    # -- event loop ------------------------------------------------------------------------------

    def submit(self, *sequences: Sequence) -> OutputStream:
        """Queue the sequences of one request, all or none; read the result for their outputs.

        Raises CapacityError: 503 while loading, draining or failed, 429 when too much is queued.
        """
        self.check_ready()
        with self._wake:
            if len(self._streams) + len(sequences) > self.max_in_flight:
                raise CapacityError(
                    f"{len(self._streams)} sequences are running or waiting, the most this server takes is "
                    f"{self.max_in_flight}; try again in a moment",
                    retry_after_s=1 + len(self._streams) // 16,
                )
            stream = OutputStream(self, [sequence.request_id for sequence in sequences])
            for sequence in sequences:
                self._streams[sequence.request_id] = stream
            self._submitted.append((list(sequences), stream))
            self._wake.notify()
        return stream

    def prebuild(self, sequence: Sequence) -> None:
        """Have a prefix computed when the engine idles; from any thread. Nothing comes back."""
        with self._wake:
            if self.status == "ready":
                self._prebuilds.append(sequence)
                self._wake.notify()

    def check_ready(self) -> None:
        """Raise CapacityError 503 unless new work is taken."""
        status = self.status
        if status == "failed":
            raise CapacityError("the engine stopped after an internal error", status=503, retry_after_s=30)
        if status != "ready":
            raise CapacityError(f"the server is {status}; try again later", status=503, retry_after_s=5)

    def cancel(self, request_id: str) -> None:
        """Give a sequence up; its blocks are free before the next step."""
        with self._wake:
            self._cancelled.append(request_id)
            self._wake.notify()

    # -- engine thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._is_stopping or self._has_news() or self.engine.has_work()):
                    self._wake.wait()
                if self._is_stopping:
                    break
                submitted, self._submitted = self._submitted, deque()
                cancelled, self._cancelled = self._cancelled, deque()
                prebuilds, self._prebuilds = self._prebuilds, deque()
            self._take_in(submitted, cancelled)
            for prefix in prebuilds:
                self.engine.prebuild(prefix)
            if not self.engine.has_work():
                continue
            try:
                outputs = self.engine.step()
            except Exception as error:
                # The engine ends single sequences itself; what reaches us leaves its books in doubt.
                log_failure(error, "the engine's step")
                self._has_failed = True
                self._fail_all(EngineError("the engine failed while it worked on this request"))
                return
            self._hand_over(outputs)
        self._fail_all(CapacityError("the server is shutting down", status=503, retry_after_s=5))

    def _has_news(self) -> bool:
        return bool(self._submitted or self._cancelled or self._prebuilds)

    def _take_in(self, submitted: deque[tuple[list[Sequence], OutputStream]], cancelled: deque[str]) -> None:
        for sequences, stream in submitted:
            try:
                for sequence in sequences:
                    self.engine.add(sequence)
            except Exception as error:
                self._refuse(sequences, stream, error)
                continue
            self._call(stream.loop, stream._accept)
        for request_id in cancelled:
            # A cancelled sequence that finished or was refused before is no longer known; that is fine.
            if self._forget(request_id):
                self.engine.cancel(request_id)

    def _refuse(self, sequences: list[Sequence], stream: OutputStream, error: Exception) -> None:
        for sequence in sequences:
            self._forget(sequence.request_id)
            self.engine.cancel(sequence.request_id)
        if not isinstance(error, AutoglmError):
            log_failure(error, "adding a sequence")
            error = EngineError("the engine could not take this request")
        self._call(stream.loop, stream._fail, error)

    def _hand_over(self, outputs: list[SequenceOutput]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[OutputStream, SequenceOutput]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            by_loop.setdefault(stream.loop, []).append((stream, output))
            if output.finish_reason is not None:
                self._forget(output.request_id)
        for loop, deliveries in by_loop.items():
            if not self._call(loop, _deliver, deliveries):
                for _, output in deliveries:
                    if self._forget(output.request_id):
                        self.engine.cancel(output.request_id)

    def _forget(self, request_id: str) -> bool:
        with self._wake:
            return self._streams.pop(request_id, None) is not None

    def _fail_all(self, error: Exception) -> None:
        with self._wake:
            streams = dict(self._streams)
            self._streams.clear()
            self._submitted.clear()
            self._cancelled.clear()
        for request_id, stream in streams.items():
            try:
                self.engine.cancel(request_id)
            except Exception as cancel_error:
                log_failure(cancel_error, "cancelling a sequence")
            self._call(stream.loop, stream._fail, error)

    @staticmethod
    def _call(loop: asyncio.AbstractEventLoop, function: object, *arguments: object) -> bool:
        """Run function on the reader's event loop; False when that loop is gone."""
        try:
            loop.call_soon_threadsafe(function, *arguments)  # type: ignore[arg-type]
        except RuntimeError:
            return False
        return True


def _deliver(deliveries: list[tuple[OutputStream, SequenceOutput]]) -> None:
    for stream, output in deliveries:
        stream._push(output)
