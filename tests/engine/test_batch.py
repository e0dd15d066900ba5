"""Batch arrays against plain loops over the same sequences."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm.engine.batch import Batch, BatchBuilder
from autoglm.engine.scheduler import Scheduled
from tests.engine.harness import make_sequence

BLOCK = 16


def reference(scheduled: list[Scheduled]) -> dict[str, list[object]]:
    token_ids, positions, slots, cu, contexts, rows = [], [], [], [0], [], []
    for item in scheduled:
        sequence, start = item.sequence, item.sequence.num_computed_tokens
        for p in range(start, start + item.num_scheduled_tokens):
            token_ids.append(sequence.token_ids[p])
            positions.append(p)
            slots.append(int(sequence.block_table[p // BLOCK]) * BLOCK + p % BLOCK)
        cu.append(len(token_ids))
        contexts.append(start + item.num_scheduled_tokens)
        if start + item.num_scheduled_tokens == sequence.num_tokens:
            rows.append(len(token_ids) - 1)
    width = max(i.sequence.num_blocks for i in scheduled)
    tables = [[*i.sequence.block_table.tolist(), *[0] * (width - i.sequence.num_blocks)] for i in scheduled]
    return {
        "token_ids": token_ids,
        "positions": [positions] * 3,
        "slot_mapping": slots,
        "cu_seqlens_q": cu,
        "context_lens": contexts,
        "block_tables": tables,
        "logits_rows": rows,
    }  # type: ignore[return-value]


shapes = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 90), st.integers(0, 3)), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(steps=st.lists(shapes, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_arrays_equal_the_reference(steps: list[list[tuple[int, int, int]]], seed: int) -> None:
    """One builder over several steps: nothing of an earlier, larger step may remain."""
    builder = BatchBuilder(max_num_batched_tokens=1024, max_num_seqs=8, block_size=BLOCK)
    rng = np.random.default_rng(seed)
    for shape in steps:
        scheduled = []
        for computed, chunk, left in shape:
            sequence = make_sequence("r", rng.integers(0, 1000, computed + chunk + left).tolist())
            sequence.append_blocks(rng.permutation(500)[: -(-sequence.num_tokens // BLOCK)].tolist())
            sequence.num_computed_tokens = computed
            scheduled.append(Scheduled(sequence, chunk))
        batch = builder.build(scheduled)
        for name, expected in reference(scheduled).items():
            array = getattr(batch, name)
            assert array.dtype == np.int32 and array.flags.c_contiguous
            np.testing.assert_array_equal(array, np.array(expected, np.int32), err_msg=name)


def test_a_decode_step_allocates_no_arrays() -> None:
    """All arrays are views of the builder's own memory."""
    builder = BatchBuilder(max_num_batched_tokens=64, max_num_seqs=4, block_size=BLOCK)
    sequence = make_sequence("r", list(range(40)))
    sequence.append_blocks([3, 4, 5])
    sequence.num_computed_tokens = 39
    batch = builder.build([Scheduled(sequence, 1)])
    assert batch.embeddings is None and batch.limits is None
    for name in Batch.__struct_fields__:
        array = getattr(batch, name)
        assert array is None or array.base is not None
