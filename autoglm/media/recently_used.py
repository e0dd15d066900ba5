"""What was made of pictures and sounds, by key within a budget of bytes, the least recently used first to go."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Kept = TypeVar("Kept", bound=_Sized)


class RecentlyUsed(Generic[Kept]):
    """A memory that any thread may ask. The newest stays whatever its size: somebody is about to use it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Kept | None:
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def put(self, key: bytes, made: Kept) -> None:
        """Keep what was not there."""
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = made
            self.num_bytes += made.nbytes
            while self.num_bytes > self.max_bytes and len(self._kept) > 1:
                _, old = self._kept.popitem(last=False)
                self.num_bytes -= old.nbytes

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0
