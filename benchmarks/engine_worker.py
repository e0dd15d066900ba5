"""One engine in its own process, driven over stdin and stdout with one JSON object a line.

    python benchmarks/engine_worker.py llama.cpp|autoglm MODEL THREADS CONTEXT [flash]

Requests: {"op": "prefill", "token_ids": [...]} and {"op": "decode", "token_ids": [...], "steps": [...]}. Both
engines get the same token ids (decode is teacher-forced) and both are timed around the forward pass alone:
no sampling, no detokenizing, logits of the last row only, exactly as a server would ask for them.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    num_vocab: int

    def clear(self) -> None: ...

    def forward(self, token_ids: list[int], start: int) -> np.ndarray:
        """Logits of the last token, f32 [vocab], after appending token_ids at position start."""
        ...


class LlamaCpp:
    """llama.cpp through its C API: llama_decode and nothing else inside the clock."""

    def __init__(self, model: str, threads: int, context: int, flash: bool) -> None:
        from llama_cpp import llama_cpp as c

        self.c = c
        self._log = c.llama_log_callback(lambda level, text, user: None)
        c.llama_log_set(self._log, ctypes.c_void_p(0))
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(model.encode(), c.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context, 512, 512, 1
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = c.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp cannot make a context")
        self.num_vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.description = c.llama_print_system_info().decode()

    def clear(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def forward(self, token_ids: list[int], start: int) -> np.ndarray:
        array = (self.c.llama_token * len(token_ids))(*token_ids)
        batch = self.c.llama_batch_get_one(array, len(token_ids))
        if self.c.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")
        pointer = self.c.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.num_vocab,))


class Autoglm:
    """Our model runner, the way the engine calls it: one Batch a step."""

    def __init__(self, model: str, threads: int, context: int, flash: bool) -> None:
        import autoglm
        from autoglm.config import EngineConfig
        from autoglm.engine.batch import Batch
        from autoglm.engine.model_runner import CpuModelRunner
        from autoglm.formats.gguf import GGUFFile

        self.Batch = Batch
        blocks = -(-context // 16) + 1
        config = EngineConfig(
            ctx_size=context, max_num_seqs=1, max_num_batched_tokens=512, num_kv_blocks=blocks, num_threads=threads
        )
        self.gguf = GGUFFile.open(model)
        self.runner = CpuModelRunner(self.gguf, config, progress=None)
        self.num_vocab = self.runner.vocab_size
        self.table = np.arange(blocks, dtype=np.int32)[None, :]

        self.description = f"autoglm {autoglm.__version__}, {self.runner.runtime.isa}"

    def clear(self) -> None:
        pass  # the next prefill overwrites the same blocks

    def forward(self, token_ids: list[int], start: int) -> np.ndarray:
        count = len(token_ids)
        where = np.arange(start, start + count, dtype=np.int32)
        batch = self.Batch(
            token_ids=np.array(token_ids, np.int32),
            positions=np.tile(where, (3, 1)),
            slot_mapping=where,
            cu_seqlens_q=np.array([0, count], np.int32),
            context_lens=np.array([start + count], np.int32),
            block_tables=self.table,
            logits_rows=np.array([count - 1], np.int32),
        )
        return self.runner.run(batch)[0]


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Run one request; seconds are of the forward passes alone, logits those of the last one."""
    token_ids = request["token_ids"]
    engine.clear()
    begin = time.perf_counter()
    logits = engine.forward(token_ids, 0)
    prefill_s = time.perf_counter() - begin
    reply: dict[str, Any] = {"prefill_s": prefill_s}
    if request["op"] == "decode":
        begin = time.perf_counter()
        for i, token in enumerate(request["steps"]):
            logits = engine.forward([token], len(token_ids) + i)
        reply["decode_s"] = time.perf_counter() - begin
    if request["op"] == "greedy":
        reply["greedy"] = []
        for i in range(request["num_tokens"]):
            token = int(logits.argmax())
            reply["greedy"].append(token)
            logits = engine.forward([token], len(token_ids) + i)
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


def main() -> None:
    kind, model, threads, context = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    engine = LlamaCpp if kind == "llama.cpp" else Autoglm
    serve(lambda: engine(model, threads, context, "flash" in sys.argv[5:]), answer)


if __name__ == "__main__":
    main()
