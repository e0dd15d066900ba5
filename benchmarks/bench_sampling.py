"""What choosing a token costs beside the model: sampling settings over a large vocabulary, 1 and 16 sequences.

    python benchmarks/bench_sampling.py [--vocab 151552] [--seconds 0.5]

Microseconds per token of one thread, as the engine samples: one sequence after the other, each on its own row of
logits. The rows are normal with a few ids far above, as a language model's are, and "flat": nothing above, the worst
case of every filter. Best of the rounds that fit in the time, since others may use the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence as SequenceABC
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from autoglm.engine.sampling import Sampler, SamplingParams  # noqa: E402
from autoglm.engine.sequence import Sequence  # noqa: E402

BATCHES = (1, 16)
PROMPT_TOKENS = 2000  # a repetition penalty covers all of them
ANSWER_TOKENS = 200


class AllowedIds:
    """A constraint that allows the same ids after every token."""

    def __init__(self, ids: NDArray[np.int64], vocab: int) -> None:
        bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
        bits[ids] = 1
        self._words = np.packbits(bits, bitorder="little").view(np.uint32)

    def allowed(self) -> NDArray[np.uint32]:
        return self._words

    def forced(self) -> SequenceABC[int]:
        return ()

    def closing(self, token_ids: SequenceABC[int], room: int) -> SequenceABC[int]:
        return ()

    def accept(self, token_id: int) -> None: ...

    def is_stopped(self) -> bool:
        return False


# What is measured: a name, the sampling parameters, the share of the vocabulary a grammar allows (None: no grammar).
CASES: list[tuple[str, dict[str, Any], float | None]] = [
    ("greedy", {"temperature": 0.0}, None),
    ("temperature 1", {}, None),
    ("temperature 0.8, top_p 0.95", {"temperature": 0.8, "top_p": 0.95}, None),
    ("temperature 0.8, top_k 40", {"temperature": 0.8, "top_k": 40}, None),
    ("temperature 0.8, top_k 40, top_p 0.95", {"temperature": 0.8, "top_k": 40, "top_p": 0.95}, None),
    ("temperature 0.8, min_p 0.05", {"temperature": 0.8, "min_p": 0.05}, None),
    ("greedy, presence and frequency", {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.5}, None),
    ("greedy, repetition 1.1", {"temperature": 0.0, "repetition_penalty": 1.1}, None),
    ("greedy, logprobs 5", {"temperature": 0.0, "logprobs": 5}, None),
    ("greedy, grammar of 50 ids", {"temperature": 0.0}, 50 / 151552),
    ("greedy, grammar of 60%", {"temperature": 0.0}, 0.6),
    ("temperature 0.8, grammar of 60%", {"temperature": 0.8, "top_p": 0.95}, 0.6),
]


def rows_of_logits(num_rows: int, vocab: int, flat: bool) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 0.5 if flat else 2.5, (num_rows, vocab)).astype(np.float32)
    if not flat:
        for row in rows:
            row[rng.integers(0, vocab, 20)] += rng.normal(12, 2, 20).astype(np.float32)
    return rows


def microseconds(params: dict[str, Any], share: float | None, rows: NDArray[np.float32], seconds: float) -> float:
    """Best time of sampling once for every row, divided by the rows."""
    vocab = rows.shape[1]
    rng = np.random.default_rng(1)
    sampler, sequences = Sampler(vocab), []
    for index in range(len(rows)):
        prompt = rng.integers(0, vocab, PROMPT_TOKENS).tolist()
        sequence = Sequence(f"s{index}", prompt, SamplingParams(seed=index, **params))
        sequence.set_max_tokens(1 << 20)
        for token_id in rng.integers(0, vocab, ANSWER_TOKENS).tolist():
            sequence.append(token_id)
        if share is not None:
            ids = rng.choice(vocab, int(share * vocab), replace=False)
            sequence.constraint = AllowedIds(ids, vocab)
        sequences.append(sequence)
    work, best, end = np.empty_like(rows), float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        np.copyto(work, rows)  # penalties change a row
        began = time.perf_counter()
        for row, sequence in zip(work, sequences, strict=True):
            sampler.sample(row, sequence)
        best = min(best, time.perf_counter() - began)
    return 1e6 * best / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151552)
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each number")
    arguments = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    columns = [(batch, flat) for flat in (False, True) for batch in BATCHES]
    print(f"{'µs a token':<42}" + "".join(f"{f'{b} seq' + (' flat' if flat else ''):>13}" for b, flat in columns))
    rows = {flat: rows_of_logits(max(BATCHES), arguments.vocab, flat) for flat in (False, True)}
    for name, params, share in CASES:
        line, results[name] = f"{name:<42}", {}
        for batch, flat in columns:
            taken = microseconds(params, share, rows[flat][:batch], arguments.seconds)
            results[name][f"{batch}{'_flat' if flat else ''}"] = round(taken, 1)
            line += f"{taken:>13.0f}"
        print(line, flush=True)
    print(json.dumps({"vocab": arguments.vocab, "us_per_token": results}))


if __name__ == "__main__":
    main()
