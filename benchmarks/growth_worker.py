"""One engine that measures at any depth of context and any number of streams, without computing its way there.

    python benchmarks/growth_worker.py llama.cpp|autoglm MODEL THREADS CONTEXT

Requests, beside those of engine_worker.py's protocol: {"op": "depth", "context": N} times a prefill of the 512 tokens
that end at N and decode steps behind them; {"op": "streams", "streams": S} decode steps of S streams of STREAM_TOKENS
tokens each; "repeats" says how often. Replies hold the seconds of each and the resident bytes.

What stands before the measured tokens is filled in: what keys and values are does not change how long attention over
them takes, where they lie does, so every token has its own place in memory and finite values. autoglm writes random
keys and values through the engine's own rope_cache operation. llama.cpp computes 512 tokens (STREAM_TOKENS for
streams) and restores their saved state as often as needed; cells of one sequence then share positions, which its
attention does not mind. It runs with flash attention, its default, and a cache for each stream.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from engine_worker import CHUNK, Autoglm, LlamaCpp, memory, prefill, run, serve

STREAM_TOKENS, STREAM_ROOM = 240, 256  # llama.cpp rounds a stream's room up to 256
MAX_STREAMS = 64
STEPS = 12


class GrowingAutoglm(Autoglm):
    """Our runner, and a program that writes keys and values into its cache without a model around them."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        from autoglm.kernels import Program
        from autoglm.model.text import inverse_frequencies

        super().__init__(model, threads, context)
        config, self.context = self.runner.model_config, context
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.writer = Program(self.runner.runtime, CHUNK)
        self.writer.set_attention(
            self.runner._cache,
            heads,
            config.rotary_dim,
            config.rope_interleaved,
            config.mrope_section or (config.rotary_dim // 2, 0, 0),
            width,
            inverse_frequencies(config, None),
        )
        qkv = self.writer.buffer((heads + 2 * kv_heads) * width)
        for layer in range(config.num_hidden_layers):
            self.writer.rope_cache(qkv, layer)
        self.writer.result(qkv)
        self.values, self.rng, self.filled = self.writer.view(qkv), np.random.default_rng(0), 0

    def fill(self, num_tokens: int) -> None:
        """Random keys and values for the pool's first num_tokens tokens."""
        for start in range(self.filled, num_tokens, CHUNK):
            count = min(CHUNK, self.runner.num_blocks * 16 - start)
            self.values[:] = self.rng.standard_normal(self.values.shape, np.float32)
            where = np.arange(start, start + count, dtype=np.int32)
            ends = np.array([0, count], np.int32)
            table, none = np.arange(self.runner.num_blocks, dtype=np.int32)[None, :], np.zeros(0, np.int32)
            last = np.array([start + count], np.int32)
            self.writer.run(where, np.tile(where, (3, 1)), where, ends, last, table, none)
            self.filled = start + count

    def at_depth(self, context: int) -> int:
        """A stream that is CHUNK tokens short of context: the position of its next token."""
        self.fill(context)
        self.open(1, self.context, True, False)
        return context - CHUNK

    def with_streams(self, num_streams: int) -> int:
        self.fill(num_streams * STREAM_ROOM)
        self.open(num_streams, STREAM_ROOM, True, False)
        return STREAM_TOKENS


class GrowingLlamaCpp(LlamaCpp):
    """llama.cpp whose cache is filled with copies of a computed beginning."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        super().__init__(model, threads)
        self.room = context
        self.states: dict[int, Any] = {}

    def state(self, num_tokens: int) -> Any:
        """The saved keys and values of a computed stream of so many tokens."""
        if num_tokens not in self.states:
            prefill(self, np.random.default_rng(0).integers(100, 40_000, (1, num_tokens), np.int32))
            size = self.c.llama_state_seq_get_size(self.context, 0)
            buffer = (self.c.ctypes.c_uint8 * size)()
            if self.c.llama_state_seq_get_data(self.context, buffer, size, 0) != size:
                raise SystemExit("llama.cpp cannot save the state of a sequence")
            self.c.llama_memory_clear(self.memory, True)
            self.states[num_tokens] = buffer
        return self.states[num_tokens]

    def restore(self, state: Any, stream: int) -> None:
        if not self.c.llama_state_seq_set_data(self.context, state, len(state), stream):
            raise SystemExit("llama.cpp cannot restore the state of a sequence")

    def at_depth(self, context: int) -> int:
        self.open(2, self.room // 2, True, True)  # one cache for both: the second stream is where copies are made
        if context == CHUNK:
            return 0
        state = self.state(CHUNK)
        for _ in range(context // CHUNK - 1):
            self.restore(state, 1)
            self.c.llama_memory_seq_cp(self.memory, 1, 0, -1, -1)
            self.c.llama_memory_seq_rm(self.memory, 1, -1, -1)
        return CHUNK

    def with_streams(self, num_streams: int) -> int:
        self.open(MAX_STREAMS, STREAM_ROOM, True, False)
        state = self.state(STREAM_TOKENS)
        for stream in range(num_streams):
            self.restore(state, stream)
        return STREAM_TOKENS


def timed_steps(engine: GrowingAutoglm | GrowingLlamaCpp, num_streams: int, start: int) -> list[float]:
    """Seconds of each of STEPS decode steps."""
    token_ids = np.full((num_streams, 1), 100, np.int32)
    seconds = [run(engine, token_ids + i, start + i, 1)[1] for i in range(STEPS)]
    return seconds[1:]  # the first one after something else finds cold caches and sleeping threads


def answer(engine: GrowingAutoglm | GrowingLlamaCpp, request: dict[str, Any]) -> dict[str, Any]:
    reply: dict[str, Any] = {"prefill_s": [], "decode_s": []}
    chunk = np.random.default_rng(1).integers(100, 40_000, (1, CHUNK), np.int32)
    for _ in range(request["repeats"]):
        if request["op"] == "depth":
            streams, start = 1, engine.at_depth(request["context"])
            reply["prefill_s"].append(run(engine, chunk, start, CHUNK)[1])
            start += CHUNK
        else:
            streams = request["streams"]
            start = engine.with_streams(streams)
        reply["decode_s"] += timed_steps(engine, streams, start)
    return {**reply, **memory(), "kv_token_bytes": engine.kv_token_bytes}


def main() -> None:
    kind, model, threads, context = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    serve(lambda: (GrowingLlamaCpp if kind == "llama.cpp" else GrowingAutoglm)(model, threads, context), answer)


if __name__ == "__main__":
    main()
