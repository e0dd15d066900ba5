"""The native runner as the parity tests drive it: token ids in, logits of every position out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from autoglm.config import EngineConfig
from autoglm.engine.batch import Batch
from autoglm.engine.model_runner import CpuModelRunner
from autoglm.formats.gguf import GGUFFile

BLOCK = 16


class NativeModel:
    """One loaded GGUF with a KV pool of `num_blocks`."""

    def __init__(
        self,
        path: Path,
        *,
        max_tokens: int = 512,
        num_blocks: int = 160,
        cache_type: str = "f16",
        num_threads: int = 2,
    ) -> None:
        self.gguf = GGUFFile.open(path)
        config = EngineConfig(
            max_num_batched_tokens=max_tokens,
            num_kv_blocks=num_blocks,
            cache_type_k=cache_type,
            cache_type_v=cache_type,
            num_threads=num_threads,
        )
        self.runner = CpuModelRunner(self.gguf, config, progress=None)
        self.max_tokens = max_tokens

    def step(
        self, pieces: list[tuple[list[int], int, np.ndarray]], positions: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """One batch of (token ids, tokens already cached, block table) a sequence -> its logits f32 [T, vocab]."""
        where = [np.arange(start, start + len(ids)) for ids, start, _ in pieces]
        slots = [table[w // BLOCK] * BLOCK + w % BLOCK for w, (_, _, table) in zip(where, pieces, strict=True)]
        counts = [len(ids) for ids, _, _ in pieces]
        widest = max(len(table) for _, _, table in pieces)
        tables = np.zeros((len(pieces), widest), np.int32)
        for row, (_, _, table) in zip(tables, pieces, strict=True):
            row[: len(table)] = table
        flat = np.concatenate(where).astype(np.int32)
        batch = Batch(
            token_ids=np.concatenate([ids for ids, _, _ in pieces]).astype(np.int32),
            positions=np.ascontiguousarray(np.tile(flat, (3, 1)) if positions is None else positions, np.int32),
            slot_mapping=np.concatenate(slots).astype(np.int32),
            cu_seqlens_q=np.cumsum([0, *counts]).astype(np.int32),
            context_lens=np.array([start + len(ids) for ids, start, _ in pieces], np.int32),
            block_tables=tables,
            logits_rows=np.arange(sum(counts), dtype=np.int32),
        )
        return np.split(self.runner.run(batch).copy(), np.cumsum(counts)[:-1])

    def logits(
        self,
        token_ids: list[int],
        *,
        chunk: int | None = None,
        positions: np.ndarray | None = None,
        first_block: int = 0,
    ) -> np.ndarray:
        """f32 [T, vocab] of one sequence, prefilled in chunks of at most `chunk` tokens."""
        chunk = chunk or self.max_tokens
        table = first_block + np.arange(-(-len(token_ids) // BLOCK))
        rows = []
        for begin in range(0, len(token_ids), chunk):
            end = min(begin + chunk, len(token_ids))
            where = None if positions is None else positions[:, begin:end]
            rows += self.step([(token_ids[begin:end], begin, table)], where)
        return np.concatenate(rows)

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Prefill, then decode one token at a time from the KV cache."""
        table = np.arange(-(-(len(prompt) + num_tokens) // BLOCK))
        logits = self.step([(prompt, 0, table)])[0][-1]
        out: list[int] = []
        for i in range(num_tokens):
            out.append(int(logits.argmax()))
            logits = self.step([([out[-1]], len(prompt) + i, table)])[0][-1]
        return out
