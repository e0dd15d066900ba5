"""Bytes of decoded media that all requests together may hold: counted before decoding, until the arrays are gone.

A picture file of a hundred kB may decode to a hundred MB within every limit of its own request, and waits in that form
until an encoder has time for it. So what does not fit beside the others is refused before it is decoded.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from autoglm.errors import CapacityError

# 65 screens of 1080 x 2400, or the largest requests that MediaLimits allows, twice.
DEFAULT_BYTES = 512 << 20


class DecodedMemory:
    """A budget of max_bytes; it should hold the largest single request."""

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()
        # Arrays die in any thread, also in one that holds the lock: what they held is only noted here.
        self._freed: deque[int] = deque()

    @property
    def num_bytes(self) -> int:
        """Bytes that are held or reserved."""
        with self._lock:
            while self._freed:
                self._num_bytes -= self._freed.popleft()
            return self._num_bytes

    @contextmanager
    def reserve(self, num_bytes: int) -> Iterator[Callable[[NDArray[Any]], None]]:
        """Room for arrays of num_bytes at most; gives a function that counts one of them for as long as it lives.

        Raises CapacityError, 429 with the numbers, where they do not fit beside what is held.
        """
        held_bytes = self.num_bytes
        with self._lock:
            if self._num_bytes + num_bytes > self.max_bytes:
                raise CapacityError(
                    f"the media of this request take {num_bytes >> 20} MB decoded, and those of others already hold "
                    f"{held_bytes >> 20} of {self.max_bytes >> 20} MB; try again in a moment"
                )
            self._num_bytes += num_bytes
        left = num_bytes

        def keep(array: NDArray[Any]) -> None:
            nonlocal left
            left -= array.nbytes
            weakref.finalize(array, self._freed.append, array.nbytes).atexit = False

        try:
            yield keep
        finally:
            self._freed.append(left)
