"""Scheduled sequences -> arrays: token ids, positions, slot_mapping, cu_seqlens. No state but the buffers reused."""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from autoglm.engine.scheduler import Scheduled

IntArray = NDArray[np.int32]


class Batch(Struct):
    """The inputs of one step: T tokens of S sequences, ragged, and L rows of logits wanted.

    token_ids     i32 [T]
    positions     i32 [3, T]  along time, height, width; equal for text
    slot_mapping  i32 [T]     where each token's keys and values go: block_id * block_size + offset
    cu_seqlens_q  i32 [S + 1] tokens of sequence s are cu_seqlens_q[s] to cu_seqlens_q[s + 1]
    context_lens  i32 [S]     tokens of each sequence in the KV cache after this step
    block_tables  i32 [S, max_blocks]  padded with 0
    logits_rows   i32 [L]     indices into T, rising: a sequence's last token and the drafts behind it
    embeddings    f32 [M, width] or None: a token id of -1 - i stands for row i of it
    limits        i32 [T] or None: keys each token may see, none: those up to itself
    All contiguous views of buffers that the next step overwrites.
    """

    token_ids: IntArray
    positions: IntArray
    slot_mapping: IntArray
    cu_seqlens_q: IntArray
    context_lens: IntArray
    block_tables: IntArray
    logits_rows: IntArray
    embeddings: NDArray[np.float32] | None = None
    limits: IntArray | None = None


class BatchBuilder:
    """Fills preallocated arrays, so that a decode step allocates nothing but views."""

    def __init__(self, *, max_num_batched_tokens: int, max_num_seqs: int, block_size: int) -> None:
        self.block_size = block_size
        self._token_ids = np.zeros(max_num_batched_tokens, np.int32)
        self._positions = np.zeros(3 * max_num_batched_tokens, np.int32)
        self._slots = np.zeros(max_num_batched_tokens, np.int32)
        self._cu_seqlens = np.zeros(max_num_seqs + 1, np.int32)
        self._context_lens = np.zeros(max_num_seqs, np.int32)
        self._tables = np.zeros(max_num_seqs * 64, np.int32)
        self._logits_rows = np.zeros(max_num_batched_tokens, np.int32)
        self._offsets = np.arange(max_num_batched_tokens, dtype=np.int32)

    def build(self, scheduled: list[Scheduled]) -> Batch:
        """The arrays of one step; sequences in the order given."""
        num_seqs = len(scheduled)
        max_blocks = max(item.sequence.num_blocks for item in scheduled)
        tables = self._block_tables(num_seqs, max_blocks)
        token, row = 0, 0
        for s, item in enumerate(scheduled):
            sequence, count = item.sequence, item.num_run_tokens
            start = sequence.num_computed_tokens
            tables[s, : sequence.num_blocks] = sequence.block_table
            if count == 1:
                self._token_ids[token] = sequence.token_ids[start]
                self._positions[token] = start
                block = sequence.block_table[start // self.block_size]
                self._slots[token] = block * self.block_size + start % self.block_size
            else:
                self._fill_chunk(item, token, start)
            token += count
            self._cu_seqlens[s + 1] = token
            self._context_lens[s] = start + count
            if item.wants_logits:
                wanted = 1 + item.num_drafted
                self._logits_rows[row : row + wanted] = self._offsets[token - wanted : token]
                row += wanted
        self._positions[token : 2 * token] = self._positions[:token]
        self._positions[2 * token : 3 * token] = self._positions[:token]
        positions = self._positions[: 3 * token].reshape(3, token)
        embeddings, limits = self._place_media(scheduled, positions)
        return Batch(
            token_ids=self._token_ids[:token],
            positions=positions,
            slot_mapping=self._slots[:token],
            cu_seqlens_q=self._cu_seqlens[: num_seqs + 1],
            context_lens=self._context_lens[:num_seqs],
            block_tables=tables,
            logits_rows=self._logits_rows[:row],
            embeddings=embeddings,
            limits=limits,
        )

    def _fill_chunk(self, item: Scheduled, token: int, start: int) -> None:
        sequence, drafts = item.sequence, token + item.num_scheduled_tokens
        end = token + item.num_run_tokens
        self._token_ids[token:drafts] = sequence.token_ids[start : start + item.num_scheduled_tokens]
        self._token_ids[drafts:end] = item.expected[: item.num_drafted]
        positions = self._offsets[: item.num_run_tokens] + np.int32(start)
        self._positions[token:end] = positions
        blocks = sequence.block_table[positions // self.block_size]
        self._slots[token:end] = blocks * np.int32(self.block_size) + positions % self.block_size

    def _place_media(
        self, scheduled: list[Scheduled], positions: IntArray
    ) -> tuple[NDArray[np.float32] | None, IntArray | None]:
        """Put the media of the step's sequences into ids and positions; the embeddings and limits they need."""
        rows: list[NDArray[np.float32]] = []
        limits: IntArray | None = None
        num_rows = token = 0
        for item in scheduled:
            media, count = item.sequence.media, item.num_run_tokens
            start = item.sequence.num_computed_tokens
            if media is not None:
                in_prompt = max(0, min(start + count, media.positions.shape[1]) - start)
                positions[:, token : token + in_prompt] = media.positions[:, start : start + in_prompt]
                positions[:, token + in_prompt : token + count] += np.int32(media.answer_offset)
                for first, embeddings in media.rows(start, start + count):
                    at = token + first - start
                    self._token_ids[at : at + len(embeddings)] = -1 - np.arange(num_rows, num_rows + len(embeddings))
                    rows.append(embeddings)
                    num_rows += len(embeddings)
                for span in media.spans:
                    first, last = max(start, span.start), min(start + count, span.end)
                    if span.sees_itself and first < last:
                        limits = self._causal_limits(scheduled) if limits is None else limits
                        limits[token + first - start : token + last - start] = span.end
            token += count
        return (np.concatenate(rows) if rows else None), limits

    def _causal_limits(self, scheduled: list[Scheduled]) -> IntArray:
        """Each token sees those of its sequence up to itself."""
        parts = [
            self._offsets[: item.num_run_tokens] + np.int32(item.sequence.num_computed_tokens + 1) for item in scheduled
        ]
        return np.concatenate(parts)

    def _block_tables(self, num_seqs: int, max_blocks: int) -> IntArray:
        size = num_seqs * max_blocks
        if size > self._tables.size:
            self._tables = np.zeros(2 * size, np.int32)
        tables = self._tables[:size]
        tables[:] = 0
        return tables.reshape(num_seqs, max_blocks)
