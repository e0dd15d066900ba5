"""The memory that decoded pictures and sounds of all requests share: a count that follows the objects themselves."""

from __future__ import annotations

import threading
import weakref

from autoglm.errors import CapacityError, RequestError


class MediaRoom:
    """A budget in bytes. What is taken is given back by `free`, or when a medium that `follow` was told of is gone."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._lock = threading.Lock()

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
            if self.used_bytes + num_bytes > self.max_bytes:
                raise CapacityError(
                    f"the pictures and sounds of other requests hold {_mb(self.used_bytes)} of {_mb(self.max_bytes)}, "
                    f"and this request needs {_mb(num_bytes)}; try again in a moment",
                    retry_after_s=2,
                )
            self.used_bytes += num_bytes

    def free(self, num_bytes: int) -> None:
        """Count so many bytes as free again."""
        with self._lock:
            self.used_bytes -= num_bytes

    def follow(self, medium: object, num_bytes: int) -> None:
        """Free bytes that were taken as soon as nobody holds `medium` any more."""
        weakref.finalize(medium, self.free, num_bytes).atexit = False


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
