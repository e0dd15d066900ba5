"""Owns weights and KV arrays; runs one Batch and returns the logits asked for."""

from __future__ import annotations

import math
import os
import time
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autoglm.config import EngineConfig, ModelConfig
from autoglm.engine.batch import Batch
from autoglm.errors import ConfigError
from autoglm.formats.gguf import GGUFFile
from autoglm.kernels import KvCache, OpProfile, Runtime, dequantize
from autoglm.model.loader import TOKEN_TABLE, Progress, WeightReader, read_model_config
from autoglm.model.text import build_text_program

_FIRST_PROMPT_TOKENS = 64  # memory for so many is there when the first one comes


class ModelRunner(Protocol):
    """What the engine needs of a machine. A GPU or a remote machine would be another class with these."""

    block_size: int
    num_blocks: int
    vocab_size: int
    max_num_batched_tokens: int
    max_context: int
    model_id: str  # what distinguishes this model's cached blocks from another's
    kv_bytes: int  # memory the KV pool takes when full

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits f32 [L, vocab_size] of the batch's logits_rows, valid until the next run."""
        ...

    def start(self, batch: Batch) -> None:
        """Begin a batch that asks for no logits; the next start or run forgets it."""
        ...

    def advance(self, slice_s: float) -> bool:
        """Go on with it for about slice_s seconds; whether it is done."""
        ...


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _make_runtime(num_threads: int) -> Runtime:
    try:
        return Runtime(num_threads)
    except ValueError as error:  # AUTOGLM_ISA names kernels that cannot run here, or too many threads
        raise ConfigError(str(error)) from None


class CpuModelRunner:
    """The native runner: one program, one thread pool, one paged KV cache.

    config         None fields are taken as: all cores; a pool of max_num_seqs times 2,048 tokens; the model's context
    in_background  weights are still being read when this returns: see `reader`; the first step waits for them
    Raises FormatError for a file it cannot run, ConfigError for settings that do not fit.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        config: EngineConfig,
        *,
        progress: Progress | None = None,
        in_floats: bool = False,
        in_background: bool = False,
    ) -> None:
        self.model_config: ModelConfig = read_model_config(gguf)
        model = self.model_config
        self.block_size = config.block_size
        self.vocab_size = model.vocab_size
        self.max_num_batched_tokens = config.token_budget
        self.num_blocks = config.num_kv_blocks or config.max_num_seqs * 2048 // config.block_size
        self.max_context = min(
            config.ctx_size or model.max_position_embeddings,
            model.max_position_embeddings,
            self.num_blocks * config.block_size,
        )
        self.model_id = f"{model.name}:{gguf.file_bytes}"
        self.runtime = _make_runtime(config.num_threads or available_cores())
        self._cache = KvCache(
            model.num_hidden_layers,
            self.num_blocks,
            model.num_key_value_heads,
            model.head_dim,
            config.cache_type_k,
            config.cache_type_v,
        )
        self.kv_bytes = self._cache.nbytes
        self.reader = WeightReader(gguf, self.runtime, progress, in_floats=in_floats)
        self._program = build_text_program(self.runtime, self.reader, model, self._cache, config.token_budget)
        self._logits = self._program.result_rows()[:, : self.vocab_size]
        if in_background:
            self._program.populate_in_background(_FIRST_PROMPT_TOKENS)
        else:
            self.reader.wait()
            while self.runtime.collapse():
                pass
        self._gguf = gguf  # the token table is read from the map

    def token_embeddings(self, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Rows of the token table: f32 [len(token_ids), hidden]."""
        info, width = self._gguf.tensors[TOKEN_TABLE], self.model_config.hidden_size
        rows = self._gguf.data(TOKEN_TABLE).reshape(self.vocab_size, -1)[token_ids]
        values = dequantize(rows.ravel(), int(info.type), len(token_ids) * width)
        return values.reshape(len(token_ids), width)

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """One step; see ModelRunner."""
        self.start(batch)
        self._program.advance(math.inf)
        return self._logits[: batch.logits_rows.size]

    def start(self, batch: Batch) -> None:
        """Begin a step; see ModelRunner."""
        self._program.start(
            batch.token_ids,
            batch.positions,
            batch.slot_mapping,
            batch.cu_seqlens_q,
            batch.context_lens,
            batch.block_tables,
            batch.logits_rows,
            batch.limits,
            batch.embeddings,
        )

    def advance(self, slice_s: float) -> bool:
        """Go on with it; see ModelRunner."""
        return self._program.advance(slice_s)

    def profile(self, batch: Batch) -> tuple[float, list[OpProfile]]:
        """Run one step with a clock at every operation: the seconds it took, and its operations in order."""
        self._program.set_profiling(True)
        started_s = time.perf_counter()
        self.run(batch)
        took_s = time.perf_counter() - started_s
        self._program.set_profiling(False)
        return took_s, self._program.profile()

    def fill_cache(self) -> None:
        """Overwrite all keys and values, so that steps over contexts nobody computed can be timed."""
        self._cache.fill()
