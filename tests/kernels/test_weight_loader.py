"""Matrices that native threads read from a file: the same bits as packed from memory, and clear errors without them."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from autoglm import kernels
from autoglm.kernels import reference
from tests.kernels.blocks import random_activations, random_weights
from tests.kernels.conftest import make_runtime

TYPES = sorted(reference.BLOCKS)
SHAPES = ((1, 256), (31, 512), (97, 1280), (700, 768))  # the last one in several reads
type_ids = pytest.mark.parametrize("type_id", TYPES, ids=reference.TYPE_NAMES.get)


@pytest.fixture(scope="module")
def runtime() -> kernels.Runtime:
    return make_runtime("", 2)


class TensorFile:
    """A file of random matrices, each at an offset that no page begins at."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT)

    def put(self, offset: int, data: np.ndarray) -> None:
        os.pwrite(self.descriptor, data.tobytes(), offset)


@pytest.fixture
def file(tmp_path: Path) -> TensorFile:
    return TensorFile(tmp_path / "weights")


def product(runtime: kernels.Runtime, matrix: kernels.Matrix) -> np.ndarray:
    return kernels.matmul(runtime, matrix, random_activations(3, matrix.cols))


@type_ids
def test_read_is_packed(runtime: kernels.Runtime, file: TensorFile, type_id: int) -> None:
    loader, offset = kernels.WeightLoader(runtime, file.descriptor), 33
    read, packed = [], []
    for rows, cols in SHAPES:
        data = random_weights(type_id, rows, cols, seed=rows)
        file.put(offset, data)
        read.append(loader.read(offset, type_id, rows, cols))
        packed.append(kernels.Matrix.pack(runtime, data, type_id, rows, cols))
        offset += data.size + 7
    for ours, truth in zip(read, packed, strict=True):
        np.testing.assert_array_equal(product(runtime, ours), product(runtime, truth))
    while not loader.wait(0.1):
        pass
    assert loader.done_bytes == offset - 33 - 7 * len(SHAPES)


@type_ids
def test_in_floats_holds_the_dequantized_values(runtime: kernels.Runtime, file: TensorFile, type_id: int) -> None:
    for rows, cols in SHAPES:
        data = random_weights(type_id, rows, cols)
        file.put(0, data)
        ours = kernels.WeightLoader(runtime, file.descriptor).read(0, type_id, rows, cols, in_floats=True)
        stored = type_id if type_id in reference.FLOAT_TYPES else reference.F32
        values = data
        if stored == reference.F32:
            values = kernels.dequantize(data, type_id, rows * cols).view(np.uint8)
        assert ours.type_id == stored
        truth = kernels.Matrix.pack(runtime, values, stored, rows, cols)
        np.testing.assert_array_equal(product(runtime, ours), product(runtime, truth))


def test_any_order_over_a_large_file(runtime: kernels.Runtime, file: TensorFile) -> None:
    """Farther apart than what is asked for ahead, forwards and backwards; the file is sparse."""
    loader = kernels.WeightLoader(runtime, file.descriptor)
    offsets = [200 << 20, 64 << 20, 0, 300 << 20, (200 << 20) + 4096 * 144]
    data = [random_weights(reference.Q4_K, 64, 1024, seed=i) for i in range(len(offsets))]
    for offset, values in zip(offsets, data, strict=True):
        file.put(offset, values)
    read = [loader.read(offset, reference.Q4_K, 64, 1024) for offset in offsets]
    for ours, values in zip(read, data, strict=True):
        truth = kernels.Matrix.pack(runtime, values, reference.Q4_K, 64, 1024)
        np.testing.assert_array_equal(product(runtime, ours), product(runtime, truth))


def test_a_file_cut_short(runtime: kernels.Runtime, file: TensorFile) -> None:
    """The matrix it ends in and all after it are errors; the one before is whole."""
    data = random_weights(reference.Q8_0, 64, 256)
    for offset in (0, data.size):
        file.put(offset, data)
    os.truncate(file.descriptor, 2 * data.size - 1)
    loader = kernels.WeightLoader(runtime, file.descriptor)
    whole, cut, after = (loader.read(offset, reference.Q8_0, 64, 256) for offset in (0, data.size, 0))
    truth = kernels.Matrix.pack(runtime, data, reference.Q8_0, 64, 256)
    np.testing.assert_array_equal(product(runtime, whole), product(runtime, truth))
    for matrix in (cut, after):
        with pytest.raises(EOFError, match="the file ends inside a matrix"):
            product(runtime, matrix)
    with pytest.raises(EOFError):
        loader.wait(10)


def test_a_program_waits_for_its_matrices_and_tells_what_they_miss(runtime: kernels.Runtime, file: TensorFile) -> None:
    matrix = kernels.WeightLoader(runtime, file.descriptor).read(0, reference.F32, 32, 32)
    program = kernels.Program(runtime, 1)
    x, act, out = program.buffer(32), program.activation(32), program.buffer(32)
    program.quantize(x, act)
    program.linear(act, [matrix], out)
    program.result(out)
    one, none = np.zeros(1, np.int32), np.zeros(0, np.int32)
    with pytest.raises(EOFError):
        program.start(one, np.zeros((3, 1), np.int32), one, one, none, np.zeros((0, 0), np.int32), one)


def test_what_is_given_up_never_comes(runtime: kernels.Runtime, file: TensorFile) -> None:
    file.put(0, random_weights(reference.F32, 32, 32))
    loader = kernels.WeightLoader(runtime, file.descriptor)
    loader.stop()
    with pytest.raises(OSError):
        product(runtime, loader.read(0, reference.F32, 32, 32))


def test_what_reads_may_go_before_what_is_read(runtime: kernels.Runtime, file: TensorFile) -> None:
    """Neither the loader nor the caller's descriptor need stay for the matrices to come."""
    data = random_weights(reference.Q4_K, 512, 1024)
    file.put(0, data)
    loader = kernels.WeightLoader(runtime, file.descriptor)
    read = [loader.read(0, reference.Q4_K, 512, 1024) for _ in range(8)]
    os.close(file.descriptor)
    del loader
    truth = product(runtime, kernels.Matrix.pack(runtime, data, reference.Q4_K, 512, 1024))
    for matrix in read:
        np.testing.assert_array_equal(product(runtime, matrix), truth)


def huge_page_bytes() -> int:
    """Of this process, in anonymous memory."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:"))


def knows_collapse() -> bool:
    version = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return sys.platform == "linux" and version >= (6, 1) and huge.exists() and "[never]" not in huge.read_text()


def test_small_pages_of_a_slow_system_become_huge(file: TensorFile) -> None:
    """Where every page counts as slow, weights come in small ones; moved or not, they are the same bits."""
    runtime = kernels.Runtime(2, slow_page_s=0)
    data = [random_weights(reference.Q8_0, 1024, 4096, seed=seed) for seed in range(6)]
    for number, values in enumerate(data):
        file.put(number * values.size, values)
    loader = kernels.WeightLoader(runtime, file.descriptor)
    read = [loader.read(number * data[0].size, reference.Q8_0, 1024, 4096) for number in range(len(data))]
    while not loader.wait(0.1):
        pass
    truth = [product(runtime, matrix) for matrix in read]
    before = huge_page_bytes() if sys.platform == "linux" else 0
    moved = sum(1 for _ in iter(runtime.collapse, False))
    for ours, values in zip(read, truth, strict=True):
        np.testing.assert_array_equal(product(runtime, ours), values)
    assert moved >= sum(matrix.nbytes >> 21 for matrix in read[1:])  # the first was asked for before any page was slow
    if knows_collapse():
        assert huge_page_bytes() - before >= (moved - 4) << 21
    assert not runtime.collapse()


def test_pages_stay_huge_where_they_come_quickly(file: TensorFile) -> None:
    runtime = kernels.Runtime(2, slow_page_s=1000)
    values = random_weights(reference.Q8_0, 1024, 4096)
    file.put(0, values)
    matrix = kernels.WeightLoader(runtime, file.descriptor).read(0, reference.Q8_0, 1024, 4096)
    truth = kernels.Matrix.pack(runtime, values, reference.Q8_0, 1024, 4096)
    np.testing.assert_array_equal(product(runtime, matrix), product(runtime, truth))
    assert not runtime.collapse()


def test_refuses_bad_arguments(runtime: kernels.Runtime, file: TensorFile) -> None:
    with pytest.raises(ValueError, match="not an open file"):
        kernels.WeightLoader(runtime, -1)
    loader = kernels.WeightLoader(runtime, file.descriptor)
    with pytest.raises(ValueError, match="row length"):
        loader.read(0, reference.Q4_K, 1, 255)
    with pytest.raises(ValueError, match="negative offset"):
        loader.read(-1, reference.Q4_K, 1, 256)
    with pytest.raises(ValueError, match="rows and columns"):
        loader.read(0, reference.Q4_K, 0, 256)
    with pytest.raises(ValueError, match="wait for"):
        loader.wait(float("inf"))
