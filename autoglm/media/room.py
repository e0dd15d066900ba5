"""The memory that decoded pictures and sounds of all requests share: a count that follows the objects themselves."""

from __future__ import annotations

import threading
import weakref
from collections import deque

from autoglm.errors import CapacityError, RequestError


class MediaRoom:
    """A budget in bytes. What is taken is given back by `free`, or when a medium that `follow` was told of is gone."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._taken_bytes = 0
        self._lock = threading.Lock()
        # Finalizers run wherever garbage is collected, perhaps on a thread that holds the lock: they only leave a note.
        self._freed: deque[int] = deque()

    @property
    def used_bytes(self) -> int:
        """Bytes taken and not given back."""
        with self._lock:
            return self._settle()

    def _settle(self) -> int:
        while self._freed:
            self._taken_bytes -= self._freed.popleft()
        return self._taken_bytes

    def take(self, num_bytes: int, param: str) -> None:
        """Count so many bytes as used.

        Raises RequestError where they are more than there are, CapacityError (429) where others hold too many now.
        """
        if num_bytes > self.max_bytes:
            raise RequestError(
                f"{param}: decoding the pictures and sounds of this request takes {_mb(num_bytes)}, and this server "
                f"has {_mb(self.max_bytes)} for all of them; send smaller ones, or fewer",
                param=param,
                code="media_too_large",
            )
        with self._lock:
            used_bytes = self._settle()
            if used_bytes + num_bytes > self.max_bytes:
                raise CapacityError(
                    f"the pictures and sounds of other requests hold {_mb(used_bytes)} of {_mb(self.max_bytes)}, "
                    f"and this request needs {_mb(num_bytes)}; try again in a moment",
                    retry_after_s=2,
                )
            self._taken_bytes += num_bytes

    def free(self, num_bytes: int) -> None:
        """Count so many bytes as free again."""
        self._freed.append(num_bytes)

    def follow(self, medium: object, num_bytes: int) -> None:
        """Free bytes that were taken as soon as nobody holds `medium` any more."""
        weakref.finalize(medium, self.free, num_bytes).atexit = False


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
