"""Prefixes that a coming request is likely to begin with, computed into the prefix cache while nobody is served.

It goes on in slices, one block of tokens at a time, and gives way at once: what a real request interrupts goes back
to the cache as far as it is whole, and is taken up again when the engine idles next. A prefix that nobody comes for
costs idle time and the least recently used cached blocks, never an answer.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Protocol

from autoglm.engine.batch import Batch, BatchBuilder
from autoglm.engine.block_manager import BlockManager
from autoglm.engine.scheduler import Scheduled
from autoglm.engine.sequence import Sequence

logger = logging.getLogger(__name__)

MAX_WAITING = 16


class SlicedRunner(Protocol):
    """The part of engine.model_runner.ModelRunner that runs a batch in slices."""

    def start(self, batch: Batch) -> None: ...

    def advance(self, slice_s: float) -> bool: ...


class PrebuildQueue:
    """The line of such prefixes, the oldest first; of more than MAX_WAITING the oldest are forgotten.

    num_tokens  computed since start
    """

    def __init__(self, runner: SlicedRunner, manager: BlockManager, builder: BatchBuilder, chunk_tokens: int) -> None:
        """chunk_tokens: what is run at once, and lost at most when a request arrives."""
        self.num_tokens = 0
        self._runner, self._manager, self._builder = runner, manager, builder
        self._chunk_tokens = chunk_tokens
        self._waiting: deque[Sequence] = deque()
        self._chunk: Scheduled | None = None  # begun, of the first in line

    def has_work(self) -> bool:
        return bool(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Put a prefix in line. Its last token is never run: it only says what the block before it is followed by."""
        if len(self._waiting) >= MAX_WAITING:
            self._drop()
        self._waiting.append(sequence)

    def give_way(self) -> None:
        """Somebody is to be served: hold no block, and forget the chunk that was begun."""
        if self._waiting and self._waiting[0].num_blocks:
            self._manager.free(self._waiting[0])
        self._chunk = None

    def advance(self, slice_s: float) -> None:
        """Work on the first in line for about slice_s seconds."""
        if not self._waiting:
            return
        try:
            if self._chunk is None:
                self._chunk = self._next_chunk(self._waiting[0])
                if self._chunk is None:
                    self._drop()
                    return
                self._runner.start(self._builder.build([self._chunk]))
            if not self._runner.advance(slice_s):
                return
        except Exception as error:
            # What the chunk half wrote lies in blocks that nobody was told of.
            logger.error("prebuilding a prefix failed with %s", type(error).__name__)
            self._drop()
            return
        done, self._chunk = self._chunk, None
        done.sequence.num_computed_tokens += done.num_scheduled_tokens
        self._manager.commit(done.sequence)
        self.num_tokens += done.num_scheduled_tokens

    def _next_chunk(self, sequence: Sequence) -> Scheduled | None:
        """The next tokens to run; None when all full blocks are there, or there is no room for them."""
        if not sequence.num_blocks:
            if not self._manager.can_allocate(sequence):
                return None
            self._manager.allocate(sequence)
        size = self._manager.block_size
        left = (sequence.num_tokens - 1) // size * size - sequence.num_computed_tokens
        return Scheduled(sequence, min(left, self._chunk_tokens)) if left > 0 else None

    def _drop(self) -> None:
        self.give_way()
        self._waiting.popleft()
