"""The pool of threads in a process that was forked: the data loader's workers are, and they inherit every runtime."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest

from autoglm import kernels
from autoglm.kernels import reference


def exit_status_of_child(work: Callable[[], bool], seconds: float = 20.0) -> int:
    """`work` in a forked child: 0 if it was true, 1 if false, 2 if it raised, the negative signal if one killed it."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"the child did not end within {seconds:.0f} s")


@pytest.mark.parametrize("asleep", [False, True])
def test_a_child_drops_its_parents_runtime(asleep: bool) -> None:
    held = [kernels.Runtime(4)]
    if asleep:
        time.sleep(0.05)

    def drop() -> bool:
        held.clear()
        return True

    assert exit_status_of_child(drop) == 0
    held.clear()  # the parent still joins its own


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_child_computes_with_it_and_with_one_of_its_own(num_threads: int) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((256, 64)).astype(np.float32)
    x = rng.standard_normal((5, 64)).astype(np.float32)

    def product(runtime: kernels.Runtime) -> np.ndarray:
        matrix = kernels.Matrix.pack(runtime, weights.view(np.uint8).reshape(-1), reference.F32, *weights.shape)
        return np.asarray(kernels.matmul(runtime, matrix, x))

    runtime = kernels.Runtime(num_threads)
    expected = product(runtime)
    inherited = exit_status_of_child(lambda: np.array_equal(product(runtime), expected))
    own = exit_status_of_child(lambda: np.array_equal(product(kernels.Runtime(num_threads)), expected))
    assert inherited == own == 0
    assert np.array_equal(product(runtime), expected)


def test_more_threads_than_cores() -> None:
    """Those that come too late for a job are not waited for, and take no part in it: every index is worked on once."""
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((32 * 24, 64)).astype(np.float32)
    runtime = kernels.Runtime(4 * (os.cpu_count() or 1) + 3)
    matrix = kernels.Matrix.pack(runtime, weights.view(np.uint8).reshape(-1), reference.F32, *weights.shape)
    inputs = rng.standard_normal((300, 1, 64)).astype(np.float32)
    alone = kernels.Runtime(1)
    for x in inputs:
        np.testing.assert_array_equal(kernels.matmul(runtime, matrix, x), kernels.matmul(alone, matrix, x))


def test_jobs_one_behind_the_other_with_late_threads() -> None:
    """A thread that comes when its job is over must not take part in the next one under that job's name."""
    rng = np.random.default_rng(2)
    weights = (rng.standard_normal((256, 256)) / 16).astype(np.float32)
    inputs = rng.standard_normal(256).astype(np.float32)
    step = [np.zeros(1, np.int32), np.zeros((3, 1), np.int32), np.zeros(1, np.int32), np.array([0, 1], np.int32)]
    step += [np.ones(1, np.int32), np.zeros((1, 1), np.int32), np.zeros(1, np.int32)]

    def results(num_threads: int, runs: int) -> list[bytes]:
        runtime = kernels.Runtime(num_threads)
        matrix = kernels.Matrix.pack(runtime, weights.view(np.uint8).reshape(-1), reference.F32, *weights.shape)
        program = kernels.Program(runtime, 1)
        rows, act = [program.buffer(256) for _ in range(2)], program.activation(256)
        for layer in range(100):
            program.quantize(rows[layer % 2], act)
            program.linear(act, [matrix], rows[(layer + 1) % 2])
        program.result(rows[0])
        found = []
        for _ in range(runs):
            program.view(rows[0])[:] = inputs
            program.run(*step)
            found.append(program.view(rows[0]).tobytes())
        return found

    assert set(results(4 * (os.cpu_count() or 1) + 3, 200)) == set(results(1, 1))
