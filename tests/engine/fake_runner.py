"""A deterministic runner and tokenizer without a model: logits are a hash of the KV content that was really read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoglm.engine.batch import Batch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class FakeRunner:
    """Each token writes a number made of itself, its position and everything before it in the KV cache.

    Reading a wrong slot, a stale one, or one that another sequence wrote changes all later logits. A freshly made
    cache holds noise. Sequences are run last to first, so that none may lean on what an earlier one writes in the
    same step.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 16,
        vocab_size: int = 64,
        max_num_batched_tokens: int = 512,
        max_context: int = 4096,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_context = max_context
        self.kv = np.random.default_rng(1).integers(1, 1 << 63, num_blocks * block_size).astype(np.uint64)
        self.batch_sizes: list[int] = []
        self.seqs_per_batch: list[int] = []
        self.fail_next: Exception | None = None
        self.nan_for_token: int | None = None  # a sequence whose last token is this gets NaN logits
        self.slices_per_batch = 1  # of a batch that is started and advanced
        self.expects_text = True  # positions count tokens; media move them

    def run(self, batch: Batch) -> NDArray[np.float32]:
        self._check(batch)
        self.batch_sizes.append(batch.token_ids.size)
        self.seqs_per_batch.append(batch.context_lens.size)
        state = np.zeros(batch.token_ids.size, np.uint64)
        for s in reversed(range(batch.context_lens.size)):
            first, end = int(batch.cu_seqlens_q[s]), int(batch.cu_seqlens_q[s + 1])
            for t in range(first, end):
                position = int(batch.context_lens[s]) - (end - t)
                slots = self._slots(batch, s, position)
                order = np.arange(1, position + 1, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
                with np.errstate(over="ignore"):
                    before = np.sum(_mix(self.kv[slots] + order), dtype=np.uint64)
                    own = self._own(batch, t, t + 1 if batch.limits is None else t + int(batch.limits[t]) - position)
                    state[t] = _mix(np.array([before + own]))[0]
                self.kv[batch.slot_mapping[t]] = state[t]
                if self.fail_next is not None:
                    error, self.fail_next = self.fail_next, None
                    raise error
        return self._logits(batch, state)

    def start(self, batch: Batch) -> None:
        self._started = batch
        self._slices_left = self.slices_per_batch

    def advance(self, slice_s: float) -> bool:
        self._slices_left -= 1
        if self._slices_left == 0:
            self.run(self._started)
        return self._slices_left == 0

    def _own(self, batch: Batch, t: int, end: int) -> np.uint64:
        """What token t is, where it stands, and the tokens up to `end` that it sees ahead of itself."""
        own = np.uint64(0)
        for seen in range(t, end):
            token_id = int(batch.token_ids[seen])
            if token_id < 0:
                assert batch.embeddings is not None
                row = batch.embeddings[-1 - token_id].view(np.uint32).astype(np.uint64)
                what = np.sum(_mix(row + np.arange(row.size, dtype=np.uint64)), dtype=np.uint64)
            else:
                what = np.uint64(token_id) + np.uint64(1)
            where = batch.positions[:, seen].astype(np.uint64)
            moved = (where[1] - where[0]) * np.uint64(7) + (where[2] - where[0]) * np.uint64(13)  # 0 for text
            own = own * np.uint64(31) + what * _GOLDEN + where[0] + moved
        return own

    def _slots(self, batch: Batch, s: int, num_tokens: int) -> NDArray[np.int64]:
        index = np.arange(num_tokens)
        blocks = batch.block_tables[s, index // self.block_size].astype(np.int64)
        return blocks * self.block_size + index % self.block_size

    def _logits(self, batch: Batch, state: NDArray[np.uint64]) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):
            ids = np.arange(self.vocab_size, dtype=np.uint64) * _GOLDEN
            bits = _mix(state[batch.logits_rows][:, None] + ids[None, :])
        logits = ((bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)) * np.float32(12)
        if self.nan_for_token is not None:
            logits[batch.token_ids[batch.logits_rows] == self.nan_for_token] = np.nan
        return logits

    def _check(self, batch: Batch) -> None:
        """What the native runner may rely on."""
        num_tokens, num_seqs = batch.token_ids.size, batch.context_lens.size
        assert 0 < num_tokens <= self.max_num_batched_tokens
        assert batch.positions.shape == (3, num_tokens) and batch.slot_mapping.shape == (num_tokens,)
        assert batch.cu_seqlens_q.shape == (num_seqs + 1,) and batch.cu_seqlens_q[0] == 0
        assert batch.cu_seqlens_q[-1] == num_tokens and (np.diff(batch.cu_seqlens_q) > 0).all()
        assert np.unique(batch.slot_mapping).size == num_tokens, "a slot is written twice in one step"
        for name in Batch.__struct_fields__:
            array = getattr(batch, name)
            if array is None or name == "embeddings":
                continue
            assert array.dtype == np.int32 and array.flags.c_contiguous, name
        for s in range(num_seqs):
            first, end = int(batch.cu_seqlens_q[s]), int(batch.cu_seqlens_q[s + 1])
            context = int(batch.context_lens[s])
            expected = np.arange(context - (end - first), context)
            assert not self.expects_text or (batch.positions[:, first:end] == expected).all()
            assert context <= self.max_context
            slots = self._slots(batch, s, context)
            assert (slots[expected] == batch.slot_mapping[first:end]).all()
            assert np.unique(slots).size == context, "one block twice in a table"
            rows = batch.logits_rows[(batch.logits_rows >= first) & (batch.logits_rows < end)]
            assert (rows == np.arange(end - rows.size, end)).all(), "logits of other tokens than the last ones"
        assert (np.diff(batch.logits_rows) > 0).all()


class FakeTokenizer:
    """Token i stands for pieces[i]: bytes, cut anywhere, also inside a UTF-8 character; id 0 ends the answer."""

    def __init__(self, pieces: Sequence[bytes], eos: frozenset[int] = frozenset({0})) -> None:
        self.pieces = list(pieces)
        self.vocab_size = len(self.pieces)
        self.eos_token_ids = eos
        self.eos_visible_token_ids: frozenset[int] = frozenset()

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in token_ids).decode("utf-8", "replace")

    def stream(self) -> FakeStream:
        return FakeStream(self)


class FakeStream:
    """Whole UTF-8 characters only."""

    def __init__(self, tokenizer: FakeTokenizer) -> None:
        import codecs

        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.pieces[token_id])

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


def default_pieces(vocab_size: int = 64) -> list[bytes]:
    """eos, single letters, and the three bytes of a Chinese character apart."""
    pieces = [b""] + [bytes([c]) for c in "你".encode()] + [bytes([97 + i % 26]) for i in range(26)]
    pieces += [b"ab", b"abc", b" ", b"\n", b"<think>", b"</think>"]
    return (pieces + [f"<{i}>".encode() for i in range(vocab_size)])[:vocab_size]
