"""OpenAI reply objects: usage, timings, log probabilities, ids; plain dicts ready for JSON."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from msgspec import Struct, field

from autoglm.chat.tokenizer import Tokenizer
from autoglm.engine.sampling import TokenLogprob
from autoglm.engine.sequence import SequenceOutput
from autoglm.media.prompt_media import TurnFusion
from autoglm.server.media import MediaReport
from autoglm.server.metrics import Metrics


def new_id(prefix: str) -> str:
    """An id nobody can guess, as OpenAI's look."""
    return f"{prefix}-{secrets.token_hex(12)}"


class Tally(Struct):
    """Counts and times of one request, over all its choices.

    Times in ms. queue, prefill and decode are the slowest choice's, as the choices run side by side.
    """

    metrics: Metrics
    arrival_s: float = field(default_factory=time.monotonic)
    template_ms: float = 0.0
    tokenize_ms: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    forced_tokens: int = 0
    draft_tokens: int = 0
    draft_accepted_tokens: int = 0
    decode_media_ms: float = 0.0
    media: MediaReport = field(default_factory=MediaReport)
    engine_ms: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("queue_ms", "encode_ms", "prefill_ms", "decode_ms"), 0.0)
    )
    _last_token_s: dict[str, float] = field(default_factory=dict)

    def note_media(self, report: MediaReport, decode_ms: float) -> None:
        """Keep what the reply tells of pictures and sounds."""
        self.media, self.decode_media_ms = report, decode_ms

    def take(self, output: SequenceOutput) -> None:
        """Count one output of the engine; latencies are those the reader of the stream sees."""
        now = time.monotonic()
        num_tokens = len(output.token_ids)
        if num_tokens:
            last_s = self._last_token_s.get(output.request_id)
            if last_s is None:
                self.metrics.ttft_s.observe(now - self.arrival_s)
            else:
                for _ in range(num_tokens):
                    self.metrics.itl_s.observe((now - last_s) / num_tokens)
            self._last_token_s[output.request_id] = now
            self.metrics.generated_tokens.inc(num_tokens)
        if output.finish_reason is None:
            return
        self.cached_tokens = max(self.cached_tokens, output.num_cached_tokens)
        self.completion_tokens += output.num_output_tokens
        self.reasoning_tokens += output.num_reasoning_tokens
        self.forced_tokens += int(output.timings.get("forced_tokens", 0))
        self.draft_tokens += int(output.timings.get("draft_n", 0))
        self.draft_accepted_tokens += int(output.timings.get("draft_n_accepted", 0))
        for name in self.engine_ms:
            self.engine_ms[name] = max(self.engine_ms[name], output.timings.get(name, 0.0))
        self.metrics.finishes.inc(labels=(output.finish_reason,))

    def close(self) -> None:
        """Observe what is known at the end of the request."""
        self.metrics.prompt_tokens.inc(self.prompt_tokens)
        self.metrics.duration_s.observe(time.monotonic() - self.arrival_s)

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.cached_tokens,
                "image_tokens": self.media.image_tokens,
                "audio_tokens": self.media.audio_tokens,
            },
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }

    def timings(self) -> dict[str, Any]:
        """Where the milliseconds went, and the two speeds that follow from them."""
        prefill_ms, decode_ms = self.engine_ms["prefill_ms"], self.engine_ms["decode_ms"]
        num_prefilled = self.prompt_tokens - self.cached_tokens
        result = {
            "queue_ms": self.engine_ms["queue_ms"],
            "template_ms": self.template_ms,
            "tokenize_ms": self.tokenize_ms,
            "decode_media_ms": self.decode_media_ms,
            "encode_ms": self.engine_ms["encode_ms"],
            "prefill_ms": prefill_ms,
            "decode_ms": decode_ms,
            "total_ms": (time.monotonic() - self.arrival_s) * 1e3,
        }
        rounded = {name: round(value, 3) for name, value in result.items()}
        return {
            **rounded,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "predicted_tokens": self.completion_tokens,
            "forced_tokens": self.forced_tokens,
            "draft_n": self.draft_tokens,
            "draft_n_accepted": self.draft_accepted_tokens,
            "images": list(self.media.pictures),
            "prefill_tokens_per_s": round(num_prefilled / prefill_ms * 1e3, 2) if prefill_ms > 0 else 0.0,
            "decode_tokens_per_s": round(self.completion_tokens / decode_ms * 1e3, 2) if decode_ms > 0 else 0.0,
        }


def fusion_report(fusions: Sequence[TurnFusion], *, with_gates: bool) -> list[dict[str, Any]]:
    """`fusion` of a chat reply: an entry for each user turn that has media, in order."""
    return [
        {
            "weights": dict(fusion.weights),
            **({"gates": {name: _short(gate.tolist()) for name, gate in fusion.gates.items()}} if with_gates else {}),
        }
        for fusion in fusions
    ]


def _short(values: Sequence[float]) -> list[float]:
    # Sixteen digits of a 32-bit number are noise that makes the reply twice as long.
    return [round(value, 6) for value in values]


def _token_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    # JSON has no -inf; OpenAI writes -9999 for a token that was out of reach.
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, -9999.0),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`logprobs` of a chat choice: every token generated, those of a thought too."""
    return {
        "content": [
            {
                **_token_entry(tokenizer, item.token_id, item.logprob),
                "top_logprobs": [_token_entry(tokenizer, token_id, logprob) for token_id, logprob in item.top],
            }
            for item in logprobs
        ],
        "refusal": None,
    }


def completion_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """`logprobs` of a plain completion; offset is where its first token's text begins, in characters."""
    texts = [tokenizer.token_text(item.token_id) for item in logprobs]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(item.logprob, -9999.0) for item in logprobs],
        "top_logprobs": [
            {tokenizer.token_text(token_id): max(logprob, -9999.0) for token_id, logprob in item.top}
            for item in logprobs
        ],
        "text_offset": offsets,
    }
