"""What picture and sound encoders share: one sequence whose rows all see each other, run whole or in slices."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Hashable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoglm.kernels import KvCache, Program
from autoglm.media.prompt_media import Encoding

Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)
KEYS_IN_A_BLOCK = 16


def key_value_room(num_rows: int, num_heads: int, head_dim: int) -> KvCache:
    """Keys and values of one layer for all rows of an encoder, in floats; each layer overwrites the one before."""
    return KvCache(1, -(-num_rows // KEYS_IN_A_BLOCK), num_heads, head_dim, "f32", "f32")


class KeepLast(Generic[Key, Result]):
    """What was built for one key is there for the next one who asks for it, if nobody has it.

    A phone's screenshots are all of one size, so that each is encoded in memory that was touched before; fresh pages
    take up to a fifth of an encoding. What was kept for another key is freed before anything is built.
    """

    def __init__(self, build: Callable[[Key], Result]) -> None:
        self._build = build
        self._kept: deque[tuple[Key, Result]] = deque(maxlen=1)

    def take(self, key: Key) -> Result:
        with suppress(IndexError):  # nothing was kept, or another thread has it
            kept_key, kept = self._kept.pop()
            if kept_key == key:
                return kept
            del kept
        return self._build(key)

    def give_back(self, key: Key, built: Result) -> None:
        self._kept.append((key, built))


def start_whole(program: Program, num_rows: int, positions: NDArray[np.int32] | None = None) -> None:
    """Start `program` on one sequence of num_rows rows that all see each other.

    positions  int32 [3, num_rows] for rotary embedding; None: zeros, which turn nothing
    """
    rows = np.arange(num_rows, dtype=np.int32)
    blocks = np.arange(-(-num_rows // KEYS_IN_A_BLOCK), dtype=np.int32)[None]
    program.start(
        token_ids=np.zeros(num_rows, np.int32),
        positions=np.zeros((3, num_rows), np.int32) if positions is None else positions,
        slot_mapping=rows,
        cu_seqlens_q=np.array([0, num_rows], np.int32),
        context_lens=np.array([num_rows], np.int32),
        block_tables=blocks,
        logits_rows=rows,
        limits=np.full(num_rows, num_rows, np.int32),
    )


def run_slices(program: Program, slice_s: float = math.inf) -> Generator[None, float | None, None]:
    """Run a started program to its end, giving way after every slice_s seconds, or what was sent instead."""
    while not program.advance(slice_s):
        slice_s = (yield) or slice_s


def beside(work: Callable[[], Result], slice_s: float) -> Generator[None, float | None, Result]:
    """Do work that has no slices of its own on another thread, giving way after every slice_s seconds until it is done.

    It should spend its time where the interpreter's lock is free: in Pillow, NumPy and the kernels.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="autoglm-encoder")
    future = thread.submit(work)
    thread.shutdown(wait=False)  # nobody waits for the work of an encoding that is given up
    while not wait([future], None if math.isinf(slice_s) else slice_s).done:
        slice_s = (yield) or slice_s
    return future.result()


def finish(slices: Encoding) -> NDArray[np.float32]:
    """Run slices without a pause; their result."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            result: NDArray[np.float32] = end.value
            return result


def resampled(grid: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """Learned positions [R, C, width] for a grid of rows x columns: [rows, columns, width].

    Cubic (a = -0.75) without antialiasing, source (i + 0.5) * n_from / n_to - 0.5, each tap clamped to the edge:
    what torch's interpolate and grid_sample do (Keys 1981 for the kernel).
    """
    for axis, count in ((1, columns), (0, rows)):  # the larger product last, where nothing is moved
        if grid.shape[axis] != count:
            moved = np.tensordot(_cubic(grid.shape[axis], count), grid, axes=(1, axis))
            grid = np.ascontiguousarray(np.moveaxis(moved, 0, axis))
    return np.ascontiguousarray(grid, np.float32)


def _cubic(have: int, want: int) -> NDArray[np.float32]:
    """The matrix [want, have] of the resampling along one axis."""
    a = -0.75
    source = (np.arange(want) + 0.5) * have / want - 0.5
    base = np.floor(source).astype(int)
    matrix = np.zeros((want, have))
    for tap in range(-1, 3):
        distance = np.abs(source - (base + tap))
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
        np.add.at(matrix, (np.arange(want), np.clip(base + tap, 0, have - 1)), weight)
    return matrix.astype(np.float32)
