"""What a program says of its operations: names, calls, bytes and multiply-adds, each counted here a second time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autoglm import kernels
from autoglm.kernels import reference
from tests.kernels.blocks import random_weights
from tests.kernels.conftest import make_runtime

WIDTH, HEADS, KV_HEADS, DIM, MAX_TOKENS = 96, 6, 2, 16, 600
COUNTS, CONTEXTS = [1, 0, 520], [40, 7, 530]  # two sequences at work, one with nothing to do, one past a row block


def pack(runtime: kernels.Runtime, type_id: int, rows: int, cols: int) -> kernels.Matrix:
    return kernels.Matrix.pack(runtime, random_weights(type_id, rows, cols), type_id, rows, cols)


class Layer:
    """One of each: a product of two matrices and types, attention, a gated product, a float product of logit rows."""

    def __init__(self, runtime: kernels.Runtime) -> None:
        self.cache = kernels.KvCache(1, 50, KV_HEADS, DIM, "i16", "q8_0")
        self.program = program = kernels.Program(runtime, MAX_TOKENS)
        x, qkv, heads = (program.buffer(n) for n in (WIDTH, (HEADS + 2 * KV_HEADS) * DIM, HEADS * DIM))
        act, hidden, last = program.activation(WIDTH), program.activation(64), program.activation(WIDTH)
        self.q = pack(runtime, reference.Q8_0, HEADS * DIM, WIDTH)
        self.kv = pack(runtime, reference.Q4_0, 2 * KV_HEADS * DIM, WIDTH)
        self.gate, self.up = (pack(runtime, reference.Q8_0, 64, WIDTH) for _ in range(2))
        self.head = pack(runtime, reference.F32, 50, WIDTH)
        frequencies = np.ones(DIM // 2, np.float32)
        program.set_attention(self.cache, HEADS, DIM, False, (DIM // 2, 0, 0), DIM, frequencies)
        program.quantize(x, act)
        program.linear(act, [self.q, self.kv], qkv, name="qkv")
        program.rope_cache(qkv, 0)
        program.attention(qkv, 0, heads)
        program.gated_mlp(act, self.gate, self.up, hidden)
        rows, logits = program.buffer(WIDTH), program.buffer(50)
        program.gather(x, rows)
        program.quantize(rows, last)
        program.linear(last, [self.head], logits)
        program.result(logits)

    def start(self) -> None:
        num_tokens = sum(COUNTS)
        context = np.array(CONTEXTS, np.int32)
        parts = [np.arange(c - n, c, dtype=np.int32) for n, c in zip(COUNTS, CONTEXTS, strict=True)]
        positions = np.concatenate(parts)
        tables = np.zeros((3, 40), np.int32)
        tables[0, :3], tables[1, 0], tables[2, :34] = [0, 1, 2], 3, np.arange(4, 38)
        sequences = np.repeat(np.arange(3), COUNTS)
        slots = tables[sequences, positions // 16] * 16 + positions % 16
        self.program.start(
            np.zeros(num_tokens, np.int32), np.tile(positions, (3, 1)), slots.astype(np.int32),
            np.concatenate([[0], np.cumsum(COUNTS)]).astype(np.int32), context, tables,
            np.array([0, num_tokens - 1], np.int32),
        )  # fmt: skip

    def by_name(self) -> dict[str, kernels.OpProfile]:
        return {operation.name: operation for operation in self.program.profile()}


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(make_runtime("scalar", 2))


def test_a_step_is_counted_once(layer: Layer) -> None:
    """The same whole and in slices, twice the work after two steps, nothing once it is off."""
    program = layer.program
    assert all(operation.calls == 0 and operation.seconds == 0 for operation in program.profile())
    program.set_profiling(True)
    layer.start()
    program.advance(math.inf)
    whole = [(o.name, o.calls, o.bytes, o.int8_macs, o.float_macs) for o in program.profile()]
    assert {calls for _, calls, *_ in whole} == {1}
    program.set_profiling(True)
    layer.start()
    while not program.advance(0.0):
        pass
    assert [(o.name, o.calls, o.bytes, o.int8_macs, o.float_macs) for o in program.profile()] == whole
    layer.start()
    program.advance(math.inf)
    assert [(o.calls, o.bytes) for o in program.profile()] == [(2, 2 * num_bytes) for _, _, num_bytes, *_ in whole]
    program.set_profiling(False)
    layer.start()
    program.advance(math.inf)
    assert {operation.calls for operation in program.profile()} == {2}


def test_bytes_and_multiply_adds_are_the_matrices(layer: Layer) -> None:
    """Weights are read once for each 258 rows; 8-bit and float products are told apart."""
    layer.program.set_profiling(True)
    layer.start()
    layer.program.advance(math.inf)
    found = layer.by_name()
    order = ["plan", "quantize", "qkv", "rope_cache", "attention", "gate_up", "gather", "quantize", "linear"]
    assert [operation.name for operation in layer.program.profile()] == order
    num_tokens = sum(COUNTS)
    reads = -(-num_tokens // 258)
    assert reads > 1
    q8, q4 = 34 * WIDTH // 32, 18 * WIDTH // 32  # bytes of a row, packed as in the file
    expected = {
        "qkv": (reads * (96 * q8 + 64 * q4), 160 * WIDTH * num_tokens, 0),
        "gate_up": (reads * 2 * 64 * q8, 2 * 64 * WIDTH * num_tokens, 0),
        "linear": (64 * 4 * WIDTH, 0, 50 * WIDTH * 2),  # 50 rows are packed as two panels of 32
    }
    for name, counted in expected.items():
        assert (found[name].bytes, found[name].int8_macs, found[name].float_macs) == counted
    assert (found["qkv"].rows, found["qkv"].cols, found["qkv"].types) == (160, WIDTH, [reference.Q8_0, reference.Q4_0])
    for name in ("plan", "quantize", "rope_cache", "gather"):
        assert found[name].bytes == found[name].int8_macs == found[name].int16_macs == found[name].float_macs == 0


def test_attention_counts_the_keys_each_row_sees(layer: Layer) -> None:
    layer.program.set_profiling(True)
    layer.start()
    layer.program.advance(math.inf)
    attention = layer.by_name()["attention"]
    seen = sum(context - count + 1 + i for count, context in zip(COUNTS, CONTEXTS, strict=True) for i in range(count))
    assert attention.int16_macs == attention.float_macs == seen * HEADS * DIM
    blocks = sum(-(-context // 16) for count, context in zip(COUNTS, CONTEXTS, strict=True) if count)
    assert attention.bytes == blocks * kernels.KvCache.block_bytes(KV_HEADS, DIM, "i16", "q8_0")


def test_threads_are_busy_within_the_time_there_is(layer: Layer) -> None:
    layer.program.set_profiling(True)
    layer.start()
    layer.program.advance(math.inf)
    for operation in layer.program.profile():
        assert 0 < operation.busy_s <= 2 * operation.seconds, operation.name


def test_a_filled_cache_gives_finite_answers(layer: Layer) -> None:
    layer.cache.fill()
    layer.start()
    layer.program.advance(math.inf)
    assert np.isfinite(layer.program.result_rows()[:2]).all()


def test_limits_of_every_instruction_set(runtime: kernels.Runtime) -> None:
    limits = kernels.measure_limits(runtime, 1 << 20, 0.0)
    for limit in (limits.read_bytes_per_s, limits.int8_macs_per_s, limits.int16_macs_per_s, limits.float_macs_per_s):
        assert 0 < limit < 1e16 and math.isfinite(limit)
    with pytest.raises(ValueError, match="read_bytes must be 1 to"):
        kernels.measure_limits(runtime, 0, 0.0)


def test_memory_is_read_again_and_again(runtime: kernels.Runtime) -> None:
    reader = kernels.MemoryReader(runtime, 1 << 20)
    assert all(1e7 < reader.bytes_per_s(0.0) < 2e12 for _ in range(3))
    with pytest.raises(ValueError, match="num_bytes"):
        kernels.MemoryReader(runtime, 0)
