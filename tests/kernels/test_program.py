"""Operations of a native program against the NumPy truth, one small program each."""

from __future__ import annotations

import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from autoglm import kernels
from autoglm.kernels import reference
from autoglm.model.encoder import start_whole
from tests.kernels.blocks import random_weights
from tests.kernels.conftest import make_runtime

MAX_TOKENS = 96


def run(program: kernels.Program, num_tokens: int, **step: np.ndarray) -> None:
    """One step whose arrays default to a single fresh sequence in blocks 0, 1, 2, ..."""
    positions = np.tile(np.arange(num_tokens, dtype=np.int32), (3, 1))
    arrays = {
        "token_ids": np.zeros(num_tokens, np.int32),
        "positions": positions,
        "slot_mapping": positions[0].copy(),
        "cu_seqlens_q": np.array([0, num_tokens], np.int32),
        "context_lens": np.array([num_tokens], np.int32),
        "block_tables": np.arange(-(-num_tokens // 16), dtype=np.int32)[None, :],
        "logits_rows": np.zeros(0, np.int32),
    }
    program.run(**{name: np.ascontiguousarray(value, np.int32) for name, value in (arrays | step).items()})


def identity(runtime: kernels.Runtime, width: int) -> kernels.Matrix:
    return kernels.Matrix.pack(runtime, np.eye(width, dtype="<f4").reshape(-1).view(np.uint8), 0, width, width)


@pytest.mark.parametrize("width", [64, 96, 576, 1040])
def test_norm(runtime: kernels.Runtime, width: int) -> None:
    """Plain, after adding a branch, and after adding a normed branch; float output through an identity matrix."""
    rng = np.random.default_rng(0)
    x, branch = rng.normal(0, 2, (2, 5, width)).astype(np.float32)
    weight, post = (1 + rng.normal(0, 0.2, (2, width))).astype(np.float32)
    for mode in ("plain", "branch", "post"):
        program = kernels.Program(runtime, MAX_TOKENS)
        rows, side, out, act = (program.buffer(width), program.buffer(width), program.buffer(width), None)
        act = program.activation(width)
        options = {} if mode == "plain" else {"branch": side}
        if mode == "post":
            options["post_weight"] = post
        program.norm(rows, act, weight, 1e-5, **options)
        program.linear(act, [identity(runtime, width)], out)
        program.result(out)
        program.view(rows)[:5], program.view(side)[:5] = x, branch
        run(program, 5)
        added = x.astype(np.float64)
        if mode == "branch":
            added = added + branch
        if mode == "post":
            added = added + reference.rms_norm(branch, post, 1e-5)
        np.testing.assert_allclose(program.view(rows)[:5], added, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(program.view(out)[:5], reference.rms_norm(added, weight, 1e-5), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("type_id", sorted(reference.BLOCKS), ids=reference.TYPE_NAMES.get)
def test_embedding_rows(runtime: kernels.Runtime, type_id: int) -> None:
    table = random_weights(type_id, 40, 256)
    program = kernels.Program(runtime, MAX_TOKENS)
    out = program.buffer(256)
    program.embed(table, type_id, 40, 256, out)
    program.result(out)
    tokens = np.array([39, 0, 7, 7], np.int32)
    run(program, 4, token_ids=tokens)
    truth = reference.dequantize(type_id, table, 40 * 256).reshape(40, 256)[tokens]
    np.testing.assert_array_equal(program.view(out)[:4], truth)


@pytest.mark.parametrize("types", [(reference.Q4_K, reference.Q5_0), (reference.Q4_1, reference.Q4_1), (0, 0)])
def test_gated_mlp(runtime: kernels.Runtime, types: tuple[int, int]) -> None:
    """silu(gate x) * up x, re-quantized chunk by chunk, then multiplied: gate and up of 288 rows (288 = 32 mod 256)."""
    outer, inner = types
    width, ffn = 256, 288
    gate, up = (random_weights(outer, ffn, width, seed) for seed in (1, 2))
    down = random_weights(inner, width, ffn, 3)
    x = np.random.default_rng(4).normal(0, 0.3, (70, width)).astype(np.float32)
    program = kernels.Program(runtime, MAX_TOKENS)
    rows, out = program.buffer(width), program.buffer(width)
    act, hidden = program.activation(width), program.activation(ffn)
    program.quantize(rows, act)
    pack = kernels.Matrix.pack
    program.gated_mlp(act, pack(runtime, gate, outer, ffn, width), pack(runtime, up, outer, ffn, width), hidden)
    program.linear(hidden, [pack(runtime, down, inner, width, ffn)], out)
    program.result(out)
    program.view(rows)[:70] = x
    run(program, 70)
    g, u = (reference.matmul(outer, w, ffn, x) for w in (gate, up))
    h = reference.silu_mul(g.astype(np.float32), u.astype(np.float32)).astype(np.float32)
    truth = reference.matmul(inner, down, width, h)
    # A hidden value on the edge between two int8 codes may fall either way: one code of one block.
    error = np.abs(program.view(out)[:70] - truth)
    scale = np.abs(truth).max()
    assert error.max() < (1e-5 if inner == 0 else 5e-3) * scale
    assert np.median(error) < 1e-6 * scale


def test_linear_parts_bias_and_accumulate(runtime: kernels.Runtime) -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(0, 1, (13, 96)).astype(np.float32)
    weights = [random_weights(reference.Q8_0, rows, 96, rows) for rows in (33, 5, 64)]
    matrices = [
        kernels.Matrix.pack(runtime, w, reference.Q8_0, rows, 96) for w, rows in zip(weights, (33, 5, 64), strict=True)
    ]
    bias = rng.normal(0, 1, 5).astype(np.float32)
    program = kernels.Program(runtime, MAX_TOKENS)
    rows, out, act = program.buffer(96), program.buffer(102), program.activation(96)
    program.quantize(rows, act)
    program.linear(act, matrices, out, biases=[None, bias, None])
    program.linear(act, matrices, out, accumulate=True)
    program.result(out)
    program.view(rows)[:13] = x
    run(program, 13)
    parts = [reference.matmul(reference.Q8_0, w, n, x) for w, n in zip(weights, (33, 5, 64), strict=True)]
    truth = 2 * np.concatenate(parts, axis=1)
    truth[:, 33:38] += bias
    np.testing.assert_allclose(program.view(out)[:13], truth, rtol=1e-5, atol=1e-5)


class PagedAttention:
    """A rope_cache + attention program and, beside it, the same caches in NumPy."""

    def __init__(
        self,
        runtime: kernels.Runtime,
        *,
        heads: int = 6,
        kv_heads: int = 2,
        dim: int = 32,
        rotary: int = 32,
        interleaved: bool = True,
        sections: tuple[int, int, int] | None = None,
        cache_type: str = "f16",
        num_blocks: int = 40,
        rounded: bool = True,
    ) -> None:
        self.heads, self.kv_heads, self.dim, self.cache_type = heads, kv_heads, dim, cache_type
        self.rounded = rounded
        self.rotary, self.interleaved, self.sections = rotary, interleaved, sections
        self.width = (heads + 2 * kv_heads) * dim
        self.keys = np.zeros((num_blocks, 16, kv_heads, dim), np.float32)
        self.values = np.zeros_like(self.keys)
        self.cache = kernels.KvCache(1, num_blocks, kv_heads, dim, cache_type, cache_type)
        self.runtime = runtime
        self.program = self.fresh_program()
        self.qkv, self.out = self.program.buffer(self.width), self.program.buffer(heads * dim)
        self.program.rope_cache(self.qkv, 0)
        self.program.attention(self.qkv, 0, self.out)
        self.program.result(self.out)

    def fresh_program(self) -> kernels.Program:
        """One over this cache, with nothing in it yet."""
        program = kernels.Program(self.runtime, MAX_TOKENS)
        frequencies = (10000.0 ** (-np.arange(0, self.rotary, 2) / self.rotary)).astype(np.float32)
        sections = self.sections or (self.rotary // 2, 0, 0)
        program.set_attention(self.cache, self.heads, self.rotary, self.interleaved, sections, self.dim, frequencies)
        return program

    def step(self, rows: np.ndarray, **arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Native and true attention output of one step, both [T, heads * dim]."""
        count = len(rows)
        self.program.view(self.qkv)[:count] = rows
        run(self.program, count, **arrays)
        angles = reference.rope_angles(arrays["positions"], self.rotary, 10000.0, self.sections)
        split = rows.reshape(count, -1, self.dim)
        q = reference.rope(split[:, : self.heads], angles, interleaved=self.interleaved)
        k = reference.rope(split[:, self.heads : self.heads + self.kv_heads], angles, interleaved=self.interleaved)
        block, offset = np.divmod(arrays["slot_mapping"], 16)
        k, v = k.astype(np.float32), split[:, self.heads + self.kv_heads :]
        if self.rounded:
            k, v = reference.round_kv(k, self.cache_type, "keys"), reference.round_kv(v, self.cache_type, "values")
        self.keys[block, offset], self.values[block, offset] = k, v
        truth = reference.attention(
            q.astype(np.float32), self.keys, self.values, arrays["cu_seqlens_q"], arrays["context_lens"],
            arrays["block_tables"], self.dim**-0.5,
        )  # fmt: skip
        return self.program.view(self.out)[:count].copy(), truth.reshape(count, -1)


def ragged_step(starts: list[int], counts: list[int], tables: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays for sequences that have `starts` tokens cached and bring `counts` more."""
    where = [np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]
    slots = [tables[i, w // 16] * 16 + w % 16 for i, w in enumerate(where)]
    return {
        "positions": np.tile(np.concatenate(where), (3, 1)).astype(np.int32),
        "slot_mapping": np.concatenate(slots).astype(np.int32),
        "cu_seqlens_q": np.cumsum([0, *counts]).astype(np.int32),
        "context_lens": (np.array(starts) + counts).astype(np.int32),
        "block_tables": tables.astype(np.int32),
    }


SHAPES = {
    "llama": {"heads": 6, "kv_heads": 2, "dim": 32, "rotary": 32, "interleaved": True},
    "smollm2": {"heads": 9, "kv_heads": 3, "dim": 64, "rotary": 64, "interleaved": True},
    "glm4": {"heads": 32, "kv_heads": 2, "dim": 128, "rotary": 64, "interleaved": True},
    "glm4_mrope": {"heads": 4, "kv_heads": 2, "dim": 16, "rotary": 8, "interleaved": False, "sections": (1, 1, 2)},
    "odd": {"heads": 5, "kv_heads": 1, "dim": 48, "rotary": 32, "interleaved": False},
}


MEDIAN_ERROR = {"f16": 2e-6, "i16": 3e-5, "q8_0": 1e-5}  # i16 rounds queries and weights too


@pytest.mark.parametrize("cache_type", MEDIAN_ERROR)
@pytest.mark.parametrize("shape", SHAPES)
def test_paged_attention(runtime: kernels.Runtime, shape: str, cache_type: str) -> None:
    """Prefill, chunked prefill and decode of three ragged sequences in scattered blocks.

    A key on the edge between two stored values may round either way, hence the bound of about one such step.
    """
    rng = np.random.default_rng(6)
    paged = PagedAttention(runtime, cache_type=cache_type, **SHAPES[shape])
    tables = rng.permutation(39)[:21].reshape(3, 7)
    starts = [0, 0, 0]
    for counts in ([37, 1, 17], [16, 40, 1], [1, 1, 1], [2, 30, 33]):
        arrays = ragged_step(starts, counts, tables)
        rows = rng.normal(0, 1, (sum(counts), paged.width)).astype(np.float32)
        ours, truth = paged.step(rows, **arrays)
        np.testing.assert_allclose(ours, truth, atol=2e-2 if cache_type == "q8_0" else 2e-3)
        assert np.median(np.abs(ours - truth)) < MEDIAN_ERROR[cache_type]
        starts = [s + n for s, n in zip(starts, counts, strict=True)]


@pytest.mark.parametrize("rows_of", ["even", "sharp", "one key counts", "one dim is large"])
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_numbers_lose_no_more_than_half_floats(runtime: kernels.Runtime, shape: str, rows_of: str) -> None:
    """Against attention to what was never rounded: root mean square error relative to the result's."""
    rng = np.random.default_rng(10)
    errors = {}
    draws = rng.normal(0, 1, (2, 90, (SHAPES[shape]["heads"] + 2 * SHAPES[shape]["kv_heads"]) * SHAPES[shape]["dim"]))
    for cache_type in ("f16", "i16"):
        paged = PagedAttention(runtime, cache_type=cache_type, rounded=False, **SHAPES[shape])
        rows = draws.astype(np.float32)
        values = (paged.heads + paged.kv_heads) * paged.dim
        if rows_of == "sharp":
            rows[..., :values] *= 3
        elif rows_of == "one key counts":  # and its value is small: a sink
            rows[:, 0, paged.heads * paged.dim : values] *= 8
            rows[:, 0, values:] *= 0.01
        elif rows_of == "one dim is large":
            rows[..., paged.heads * paged.dim + 3 :: paged.dim] *= 20
        for start, step in enumerate(rows):
            ours, truth = paged.step(step, **ragged_step([90 * start], [90], np.arange(12)[None]))
        errors[cache_type] = np.sqrt(np.mean((ours - truth) ** 2) / np.mean(truth**2))
    assert errors["i16"] < errors["f16"] < 1e-2, errors


def test_rope_uses_each_axis(runtime: kernels.Runtime) -> None:
    paged = PagedAttention(runtime, **SHAPES["glm4_mrope"])
    arrays = ragged_step([0], [20], np.arange(2)[None])
    arrays["positions"] = np.stack([np.arange(20), np.arange(20) // 5 * 9, np.arange(20) % 5 * 30]).astype(np.int32)
    rows = np.random.default_rng(7).normal(0, 1, (20, paged.width)).astype(np.float32)
    ours, truth = paged.step(rows, **arrays)
    np.testing.assert_allclose(ours, truth, atol=2e-3)
    for order in ([1, 0, 2], [0, 2, 1]):
        other = PagedAttention(runtime, **SHAPES["glm4_mrope"])
        swapped = arrays | {"positions": np.ascontiguousarray(arrays["positions"][order])}
        assert np.abs(other.step(rows, **swapped)[0] - ours).max() > 0.1


@pytest.mark.parametrize("cache_type", MEDIAN_ERROR)
def test_attention_is_batch_and_chunk_invariant(runtime: kernels.Runtime, cache_type: str) -> None:
    """The same bits in one chunk, in chunks of 16 and of 5, and with another sequence in the batch."""
    rng = np.random.default_rng(8)
    shape = SHAPES["glm4"]
    rows = rng.normal(0, 1, (50, (32 + 4) * 128)).astype(np.float32)
    other = rng.normal(0, 1, (9, (32 + 4) * 128)).astype(np.float32)
    tables = np.array([[3, 1, 4, 10], [7, 0, 0, 0]])

    def fresh() -> PagedAttention:
        return PagedAttention(runtime, cache_type=cache_type, **shape)

    whole, _ = fresh().step(rows, **ragged_step([0], [50], tables[:1]))
    for chunk in (16, 5, 1):
        paged, pieces = fresh(), []
        for begin in range(0, 50, chunk):
            count = min(chunk, 50 - begin)
            pieces.append(paged.step(rows[begin : begin + count], **ragged_step([begin], [count], tables[:1]))[0])
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    both, _ = fresh().step(np.concatenate([rows, other]), **ragged_step([0, 0], [50, 9], tables))
    np.testing.assert_array_equal(both[:50], whole)


@pytest.mark.parametrize("wanted", [[36], [0, 36, 37, 54], [3, 4, 5, 36, 38, 39, 40, 41], list(range(55)), []])
def test_attention_of_the_wanted_rows_alone(runtime: kernels.Runtime, wanted: list[int]) -> None:
    """Keys and values of all, queries of some: the same bits as of all; one of the sequences brings no token."""
    rng = np.random.default_rng(9)
    whole, some = (PagedAttention(runtime, **SHAPES["glm4"]) for _ in range(2))
    q_width = whole.heads * whole.dim
    program = some.fresh_program()
    keys_values, queries = program.buffer(whole.width - q_width), program.buffer(q_width)
    gathered, out = program.buffer(q_width), program.buffer(q_width)
    program.rope_cache(keys_values, 0)
    program.gather(queries, gathered)
    program.rope_queries(gathered)
    program.attention(gathered, 0, out)
    program.result(out)
    arrays = ragged_step([0, 0, 0, 0], [37, 0, 1, 17], np.arange(12).reshape(4, 3))
    rows = rng.normal(0, 1, (55, whole.width)).astype(np.float32)
    program.view(queries)[:55], program.view(keys_values)[:55] = rows[:, :q_width], rows[:, q_width:]
    run(program, 55, logits_rows=np.array(wanted, np.int32), **arrays)
    whole.program.view(whole.qkv)[:55] = rows
    run(whole.program, 55, **arrays)
    np.testing.assert_array_equal(program.view(out)[: len(wanted)], whole.program.view(whole.out)[wanted])


def test_keys_and_values_are_those_of_all_rows(runtime: kernels.Runtime) -> None:
    paged = PagedAttention(runtime)
    paged.program.gather(paged.out, paged.program.buffer(paged.heads * paged.dim))
    with pytest.raises(ValueError, match="rope_cache comes before gather"):
        paged.program.rope_cache(paged.qkv, 0)
    with pytest.raises(ValueError, match="query width: got 32, expected 192"):
        paged.program.attention(paged.program.buffer(32), 0, paged.out)


@pytest.mark.parametrize("cache_type", MEDIAN_ERROR)
def test_stale_cache_is_never_seen(runtime: kernels.Runtime, cache_type: str) -> None:
    """Slots past the context hold NaN from an earlier owner of the block; the answer must not."""
    paged = PagedAttention(runtime, cache_type=cache_type, **SHAPES["llama"])
    poison = np.full((32, paged.width), np.nan, np.float32)
    tables = np.array([[5, 6]])
    with np.errstate(invalid="ignore"):
        paged.step(poison, **ragged_step([0], [32], tables))
    rows = np.random.default_rng(9).normal(0, 1, (19, paged.width)).astype(np.float32)
    ours, truth = paged.step(rows, **ragged_step([0], [19], tables))
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, truth, atol=2e-2 if cache_type == "q8_0" else 2e-3)


@pytest.mark.parametrize("cache_type", MEDIAN_ERROR)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen(runtime: kernels.Runtime, cache_type: str, bad: float) -> None:
    """In a value of the first token: in every row, since all see it, and in no row of another sequence."""
    paged = PagedAttention(runtime, cache_type=cache_type, **SHAPES["llama"])
    rows = np.random.default_rng(9).normal(0, 1, (23, paged.width)).astype(np.float32)
    rows[0, -paged.dim - 3] = bad  # of the last KV head but one
    with np.errstate(invalid="ignore"):
        ours, _ = paged.step(rows, **ragged_step([0, 0], [19, 4], np.array([[5, 6], [7, 8]])))
    heads = ours.reshape(23, paged.heads, paged.dim)
    group = paged.heads // paged.kv_heads
    touched = slice(paged.heads - 2 * group, paged.heads - group)
    assert (~np.isfinite(heads[:19, touched])).any(axis=2).all()
    assert np.isfinite(heads[19:]).all()


class FullAttention:
    """A program of full attention alone, and what its rotated rows are."""

    def __init__(self, runtime: kernels.Runtime, rows: int, heads: int, dim: int) -> None:
        self.heads, self.dim, self.sections = heads, dim, (0, dim // 4, dim // 2 - dim // 4)
        self.program = kernels.Program(runtime, rows)
        self.qkv, self.out = self.program.buffer(3 * heads * dim), self.program.buffer(heads * dim)
        frequencies = (10000.0 ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)
        self.program.set_full_attention(heads, dim, False, self.sections, dim, frequencies)
        self.program.full_attention(self.qkv, self.out)
        self.program.result(self.out)

    def native(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """f32 [T, H, D] of fused rows f32 [T, 3 H D]."""
        self.program.view(self.qkv)[: len(rows)] = rows
        run(self.program, len(rows), positions=positions)
        return self.program.view(self.out)[: len(rows)].reshape(len(rows), self.heads, self.dim).copy()

    def rotated(self, rows: np.ndarray, positions: np.ndarray) -> list[np.ndarray]:
        q, k, v = np.split(rows.reshape(len(rows), 3 * self.heads, self.dim), 3, axis=1)
        angles = reference.rope_angles(positions, self.dim, 10000.0, self.sections)
        return [*(reference.rope(x, angles, interleaved=False).astype(np.float32) for x in (q, k)), v]


def grid_positions(count: int) -> np.ndarray:
    return np.stack([np.zeros(count), np.arange(count) // 7, np.arange(count) % 7]).astype(np.int32)


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = np.einsum("thd,chd->htc", q.astype(np.float64), k) / q.shape[2] ** 0.5
    return np.einsum("htc,chd->thd", reference.softmax(scores), v)


@pytest.mark.parametrize(("heads", "dim"), [(3, 128), (2, 80), (1, 16), (2, 48), (1, 256)])
def test_full_attention(runtime: kernels.Runtime, heads: int, dim: int) -> None:
    """As its NumPy truth on the same grids but for what falls on an edge; near exact softmax; for every row count."""
    rng = np.random.default_rng(11)
    for count in (1, 5, 63, 64, 65, 150):
        rows = rng.normal(0, 1.2, (count, 3 * heads * dim)).astype(np.float32)
        attention, positions = FullAttention(runtime, count, heads, dim), grid_positions(count)
        ours, rotated = attention.native(rows, positions), attention.rotated(rows, positions)
        error = np.abs(ours - reference.full_attention(*rotated))
        assert np.median(error) < 3e-5 and error.max() < 1e-2
        np.testing.assert_allclose(ours, exact_attention(*rotated), atol=0.06)


def test_full_attention_stands_channels_of_any_size(runtime: kernels.Runtime) -> None:
    """One channel of keys and queries thirty times the others: without rotation it would take all eight bits."""
    rng = np.random.default_rng(12)
    rows = rng.normal(0, 1, (200, 3 * 128)).astype(np.float32)
    rows[:, 128 + 5] += 30
    attention, positions = FullAttention(runtime, 200, 1, 128), np.zeros((3, 200), np.int32)
    ours, exact = attention.native(rows, positions), exact_attention(*attention.rotated(rows, positions))
    assert np.sqrt(np.square(ours - exact).mean()) < 0.03 * exact.std()


def test_full_attention_does_not_depend_on_slices_or_what_was_there(runtime: kernels.Runtime) -> None:
    rng = np.random.default_rng(13)
    rows, positions = rng.normal(0, 1, (130, 3 * 2 * 32)).astype(np.float32), grid_positions(130)
    attention = FullAttention(runtime, 200, 2, 32)
    attention.native(rng.normal(0, 9, (200, rows.shape[1])).astype(np.float32), grid_positions(200))
    whole = attention.native(rows, positions)
    np.testing.assert_array_equal(FullAttention(runtime, 130, 2, 32).native(rows, positions), whole)
    attention.program.view(attention.qkv)[:130] = rows
    start_whole(attention.program, 130, positions)
    while not attention.program.advance(0.0):
        pass
    np.testing.assert_array_equal(attention.program.view(attention.out)[:130].reshape(whole.shape), whole)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_full_attention_shows_what_is_not_finite(runtime: kernels.Runtime, part: int) -> None:
    rows = np.random.default_rng(14).normal(0, 1, (70, 3 * 32)).astype(np.float32)
    rows[66, part * 32 + 3] = np.inf if part == 2 else np.nan
    with np.errstate(invalid="ignore"):
        ours = FullAttention(runtime, 70, 1, 32).native(rows, np.zeros((3, 70), np.int32))
    assert np.isnan(ours).any()


def test_argmax(runtime: kernels.Runtime) -> None:
    rng = np.random.default_rng(10)
    for size in (1, 15, 16, 17, 1000):
        x = rng.normal(size=size).astype(np.float32)
        assert kernels.argmax(runtime, x) == x.argmax()
    ties = np.array([0.0, 3.0, 1.0, 3.0] * 9, np.float32)
    assert kernels.argmax(runtime, ties) == 1
    for bad in (np.nan, np.inf):
        for at in (0, 17, 33):
            x = np.zeros(34, np.float32)
            x[at] = bad
            assert kernels.argmax(runtime, x) == -1


def test_run_refuses_what_would_read_outside() -> None:
    paged = PagedAttention(make_runtime("scalar", 1), **SHAPES["llama"])
    good = ragged_step([0], [4], np.array([[0]]))
    wrong = {
        "slot_mapping": np.array([0, 1, 2, 40 * 16]),
        "block_tables": np.array([[40]]),
        "context_lens": np.array([17]),
        "cu_seqlens_q": np.array([0, 5]),
        "positions": np.full((3, 4), -1),
        "logits_rows": np.array([4]),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError):
            run(paged.program, 4, **(good | {name: value}))


@pytest.mark.parametrize("type_id", [reference.Q4_K, reference.Q4_1, reference.F32], ids=reference.TYPE_NAMES.get)
def test_steps_longer_than_a_row_block(runtime: kernels.Runtime, type_id: int) -> None:
    """Linear and gated layers walk long steps in pieces of 512 rows: the seam must not show."""
    width, ffn, tokens = 256, 288, 530
    weights = [random_weights(type_id, n, width, n) for n in (ffn, ffn, width)]
    gate, up, plain = (
        kernels.Matrix.pack(runtime, w, type_id, n, width) for w, n in zip(weights, (ffn, ffn, width), strict=True)
    )
    x = np.random.default_rng(15).normal(0, 0.3, (tokens, width)).astype(np.float32)

    def outputs(rows: np.ndarray) -> np.ndarray:
        program = kernels.Program(runtime, tokens)
        source, out, hidden_out = program.buffer(width), program.buffer(width), program.buffer(ffn)
        act, hidden = program.activation(width), program.activation(ffn)
        program.quantize(source, act)
        program.linear(act, [plain], out)
        program.gated_mlp(act, gate, up, hidden)
        program.linear(hidden, [identity(runtime, ffn)], hidden_out)
        program.result(out)
        program.view(source)[: len(rows)] = rows
        run(program, len(rows))
        return np.concatenate([program.view(out)[: len(rows)], program.view(hidden_out)[: len(rows)]], axis=1)

    whole = outputs(x)
    np.testing.assert_array_equal(outputs(x[505:520]), whole[505:520])
    truth = reference.matmul(type_id, weights[2], width, x)
    np.testing.assert_allclose(whole[:, :width], truth, atol=1e-5 * np.abs(truth).max())


def test_two_threads_share_one_pool() -> None:
    """The pool serves one caller at a time; callers from several Python threads wait for each other."""
    shared = make_runtime("", num_threads=2)
    data = random_weights(reference.Q4_K, 96, 512)
    matrix = kernels.Matrix.pack(shared, data, reference.Q4_K, 96, 512)
    x = np.random.default_rng(3).normal(size=(4, 512)).astype(np.float32)
    expected = kernels.matmul(shared, matrix, x)

    def many(_: int) -> bool:
        return all(np.array_equal(kernels.matmul(shared, matrix, x), expected) for _ in range(200))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(many, range(4)))


def test_memory_handed_out_beforehand(runtime: kernels.Runtime) -> None:
    """A first step finds its rows, and a small cache's blocks, there; what is computed is the same."""
    results = []
    for tokens in (0, 64):
        cache = kernels.KvCache(1, 8, 1, 64, "i16", "i16")
        program = kernels.Program(runtime, 2048)
        program.set_attention(cache, 1, 64, False, (32, 0, 0), 64, np.ones(32, np.float32))
        qkv, out, act, wide = program.buffer(192), program.buffer(64), program.activation(64), program.buffer(2048)
        program.rope_cache(qkv, 0)
        program.attention(qkv, 0, out)
        program.quantize(out, act)
        program.linear(act, [kernels.Matrix.pack(runtime, random_weights(reference.Q8_0, 2048, 64), 8, 2048, 64)], wide)
        program.result(wide)
        if tokens:
            program.populate_in_background(tokens)
        program.view(qkv)[:40] = np.random.default_rng(0).normal(size=(40, 192))
        run(program, 40, logits_rows=np.arange(40))
        results.append(program.view(wide)[:40].copy())
    np.testing.assert_array_equal(*results)


def populates() -> bool:
    version = re.findall(r"\d+", platform.release())[:2]
    return sys.platform == "linux" and tuple(map(int, version)) >= (5, 14)


@pytest.mark.skipif(not populates(), reason="this system hands memory out on first use only (Linux before 5.14)")
def test_memory_is_handed_out_in_the_background() -> None:
    """As many rows as asked for, and not the whole buffers."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    runtime = make_runtime("")
    program = kernels.Program(runtime, 128)
    buffers = [program.buffer(4096) for _ in range(32)]  # 2 MB each, in small pages
    program.result(buffers[0])
    before = resident_bytes()
    program.populate_in_background(64)
    asked = 31 * 64 * 4096 * 4
    deadline = time.monotonic() + 10
    while resident_bytes() - before < asked and time.monotonic() < deadline:
        time.sleep(0.01)
    assert asked <= resident_bytes() - before < 1.5 * asked
    with pytest.raises(ValueError, match="once"):
        program.populate_in_background(64)


def test_only_a_complete_program_is_populated(runtime: kernels.Runtime) -> None:
    program = kernels.Program(runtime, 4)
    rows = program.buffer(32)
    with pytest.raises(ValueError, match="no result"):
        program.populate_in_background(4)
    program.result(rows)
    with pytest.raises(ValueError, match="at least one token"):
        program.populate_in_background(0)
