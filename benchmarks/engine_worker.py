"""One engine in its own process, driven over stdin and stdout with one JSON object a line.

    python benchmarks/engine_worker.py llama.cpp|autoglm MODEL THREADS CONTEXT

CONTEXT is the number of tokens autoglm's KV pool holds, of all streams together; llama.cpp makes a context for every
way it is asked for and keeps it. Requests:

    {"op": "run", "token_ids": [S][T], "steps": [S][N], ...}   prefill S streams of T tokens, then N decode steps
    {"op": "greedy", "token_ids": [1][T], "num_tokens": N}     what the model says
    {"op": "memory"}                                           resident memory of this process, its peak, KV bytes

Both engines get the same token ids (decode is teacher-forced), at most 512 a step, and both are timed around the
forward passes alone: no sampling, no detokenizing, logits of each stream's last row only, as a server would ask. The
inputs are made before the clock starts; they took 0.1 ms a step for llama.cpp and 0.2 for autoglm (Zen 4).
llama.cpp's ways: flash attention or not ("flash"), one cache for all streams or one each ("unified"). "max_tokens" is
the room of a stream, so that short and long requests share a context.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

CHUNK = 512  # tokens of a step; llama.cpp's n_batch and n_ubatch


class Engine(Protocol):
    description: str
    num_vocab: int
    kv_token_bytes: int  # what one token takes in the KV cache

    def open(self, num_streams: int, num_tokens: int, flash: bool, unified: bool) -> None:
        """An empty cache for so many streams of so many tokens."""
        ...

    def prepare(self, token_ids: np.ndarray, start: int) -> Any:
        """The input of a step that appends i32 [S, T] to streams 0 .. S - 1 at position start; until the next open."""
        ...

    def forward(self, step: Any) -> np.ndarray:
        """Run it: f32 [S, vocab], each stream's last logits."""
        ...


class LlamaCpp:
    """llama.cpp through its C API: llama_decode and nothing else inside the clock."""

    def __init__(self, model: str, threads: int) -> None:
        from llama_cpp import llama_cpp as c

        self.c, self.threads = c, threads
        self._log = c.llama_log_callback(lambda level, text, user: None)
        c.llama_log_set(self._log, ctypes.c_void_p(0))
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(model.encode(), c.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        self.num_vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        heads, width = c.llama_model_n_head(self.model), c.llama_model_n_embd(self.model)
        kv_width = c.llama_model_n_head_kv(self.model) * width // heads
        self.kv_token_bytes = c.llama_model_n_layer(self.model) * kv_width * 2 * 2  # keys and values in f16
        self.description = c.llama_print_system_info().decode()
        self.batches: list[Any] = []
        self.contexts: dict[tuple[int, int, bool, bool], Any] = {}
        self.context: Any = None

    def open(self, num_streams: int, num_tokens: int, flash: bool, unified: bool) -> None:
        key = (num_streams, num_tokens, flash, unified)
        if key not in self.contexts:
            self.contexts[key] = self._new_context(*key)
        self.context = self.contexts[key]
        self.memory = self.c.llama_get_memory(self.context)
        self.c.llama_memory_clear(self.memory, True)
        while self.batches:
            self.c.llama_batch_free(self.batches.pop())

    def _new_context(self, num_streams: int, num_tokens: int, flash: bool, unified: bool) -> Any:
        params = self.c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = num_streams * num_tokens, CHUNK, CHUNK
        params.n_seq_max, params.kv_unified = num_streams, unified
        params.n_threads = params.n_threads_batch = self.threads
        on, off = self.c.LLAMA_FLASH_ATTN_TYPE_ENABLED, self.c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = on if flash else off
        context = self.c.llama_init_from_model(self.model, params)
        if not context:
            raise SystemExit(f"llama.cpp cannot make a context of {num_streams} x {num_tokens} tokens")
        return context

    def prepare(self, token_ids: np.ndarray, start: int) -> Any:
        streams, count = token_ids.shape
        total = streams * count
        batch = self.c.llama_batch_init(total, 0, 1)
        self.batches.append(batch)
        batch.n_tokens = total
        np.ctypeslib.as_array(batch.token, (total,))[:] = token_ids.reshape(-1)
        np.ctypeslib.as_array(batch.pos, (total,))[:] = np.tile(np.arange(start, start + count), streams)
        np.ctypeslib.as_array(batch.n_seq_id, (total,))[:] = 1
        wanted = np.ctypeslib.as_array(batch.logits, (total,))
        wanted[:] = 0
        wanted[count - 1 :: count] = 1
        for i in range(total):
            batch.seq_id[i][0] = i // count
        return batch, streams

    def forward(self, step: Any) -> np.ndarray:
        batch, streams = step
        if self.c.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")
        pointer = self.c.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape=(streams, self.num_vocab))


class Autoglm:
    """Our model runner, the way the engine calls it: one Batch a step."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        import autoglm
        from autoglm.config import EngineConfig
        from autoglm.engine.batch import Batch
        from autoglm.engine.model_runner import CpuModelRunner
        from autoglm.formats.gguf import GGUFFile

        self.Batch = Batch
        blocks = -(-context // 16)
        config = EngineConfig(ctx_size=context, max_num_batched_tokens=CHUNK, num_kv_blocks=blocks, num_threads=threads)
        self.gguf = GGUFFile.open(model)
        self.runner = CpuModelRunner(self.gguf, config, progress=None)
        self.num_vocab = self.runner.vocab_size
        self.kv_token_bytes = self.runner.kv_bytes // (16 * blocks)
        self.description = f"autoglm {autoglm.__version__}, {self.runner.runtime.isa}"

    def open(self, num_streams: int, num_tokens: int, flash: bool, unified: bool) -> None:
        each = -(-num_tokens // 16)
        if num_streams * each > self.runner.num_blocks:
            raise SystemExit(f"the KV pool cannot hold {num_streams} x {num_tokens} tokens; give a larger CONTEXT")
        # What was in the blocks before is overwritten before it is read.
        self.tables = np.arange(num_streams * each, dtype=np.int32).reshape(num_streams, each)

    def prepare(self, token_ids: np.ndarray, start: int) -> Any:
        streams, count = token_ids.shape
        where = np.arange(start, start + count)
        slots = self.tables[:streams, where // 16] * 16 + where % 16
        return self.Batch(
            token_ids=token_ids.astype(np.int32).reshape(-1),
            positions=np.tile(where.astype(np.int32), (3, streams)),
            slot_mapping=slots.astype(np.int32).reshape(-1),
            cu_seqlens_q=np.arange(0, streams * count + 1, count, dtype=np.int32),
            context_lens=np.full(streams, start + count, np.int32),
            block_tables=self.tables[:streams],
            logits_rows=np.arange(count - 1, streams * count, count, dtype=np.int32),
        )

    def forward(self, step: Any) -> np.ndarray:
        return self.runner.run(step)


def run(engine: Engine, token_ids: np.ndarray, start: int, step: int) -> tuple[np.ndarray, float]:
    """All of i32 [S, T], `step` tokens of each stream at a time: the last logits f32 [S, vocab], and the seconds."""
    steps = [engine.prepare(token_ids[:, i : i + step], start + i) for i in range(0, token_ids.shape[1], step)]
    begin = time.perf_counter()
    for prepared in steps:
        logits = engine.forward(prepared)
    return logits, time.perf_counter() - begin


def prefill(engine: Engine, token_ids: np.ndarray) -> tuple[np.ndarray, float]:
    """run from the beginning, in steps of CHUNK tokens."""
    return run(engine, token_ids, 0, CHUNK // len(token_ids))


def memory() -> dict[str, int | None]:
    """Resident bytes of this process now and at its peak; None where the system does not say (not Linux)."""
    status = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    return {
        name: int(lines[key].split()[0]) * 1024 if key in lines else None
        for name, key in (("resident_bytes", "VmRSS"), ("peak_bytes", "VmHWM"))
    }


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Run one request; seconds are of the forward passes alone, logits those of the last one."""
    if request["op"] == "memory":
        return {**memory(), "kv_token_bytes": engine.kv_token_bytes}
    token_ids = np.array(request["token_ids"], np.int32)
    steps = np.array(request.get("steps", []), np.int32).reshape(len(token_ids), -1)
    streams, length = token_ids.shape
    room = length + max(steps.shape[1], request.get("num_tokens", 0))
    way = request.get("flash", False), request.get("unified", False)
    engine.open(streams, request.get("max_tokens", room), *way)
    reply: dict[str, Any] = {}
    logits, reply["prefill_s"] = prefill(engine, token_ids)
    if steps.size:
        logits, reply["decode_s"] = run(engine, steps, length, 1)
    if request["op"] == "greedy":
        reply["greedy"] = []
        for i in range(request["num_tokens"]):
            reply["greedy"].append(int(logits[0].argmax()))
            logits, _ = run(engine, np.array([reply["greedy"][-1:]], np.int32), length + i, 1)
    if request.get("logits"):
        reply["logits"] = np.asarray(logits, np.float64).tolist()
    return reply


def serve(load: Callable[[], Any], answer: Callable[[Any, dict[str, Any]], dict[str, Any]]) -> None:
    """Load an engine, say what it is, then answer request after request until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not reach the reply stream
    engine = load()
    print(json.dumps({"ready": engine.description}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=replies, flush=True)


def load_engine(kind: str, model: str, threads: str, context: str) -> Engine:
    """The engine named in the arguments of this script."""
    return LlamaCpp(model, int(threads)) if kind == "llama.cpp" else Autoglm(model, int(threads), int(context))


def main() -> None:
    serve(lambda: load_engine(*sys.argv[1:5]), answer)


if __name__ == "__main__":
    main()
