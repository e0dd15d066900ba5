"""Prometheus metrics in a registry of their own: requests, tokens, latencies, queue, KV blocks, cache.

Counted here, so that prometheus_client, which writes their text, is read at the first scrape: it takes a start 20 ms.
"""

from __future__ import annotations

import bisect
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client.core import Metric

# Seconds. CPU prefill of a long prompt takes minutes, a token of a small model milliseconds.
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# EngineStats field -> (metric name, help); gauges may fall, counters only rise.
ENGINE_GAUGES = {
    "num_running": ("sequences_running", "Sequences in the batch"),
    "num_waiting": ("sequences_waiting", "Sequences in the queue"),
    "kv_blocks_total": ("kv_blocks", "KV blocks in all"),
    "kv_blocks_used": ("kv_blocks_used", "KV blocks that live sequences hold"),
    "kv_blocks_cached": ("kv_blocks_cached", "KV blocks kept for reuse only"),
}
ENGINE_COUNTERS = {
    "num_prefill_tokens_total": ("prefill_tokens", "Tokens computed in chunks: prompts, anew too, and forced runs"),
    "num_generation_tokens_total": ("decode_tokens", "Tokens generated"),
    "num_forced_tokens_total": ("forced_tokens", "Tokens generated without being sampled: no other could follow"),
    "num_drafted_tokens_total": ("draft_tokens", "Tokens run as drafts, before they were chosen"),
    "num_accepted_tokens_total": ("draft_accepted_tokens", "Draft tokens that were then chosen"),
    "num_encoded_total": ("media_encoded", "Pictures encoded, or turns with media where the model mixes them"),
    "prefix_cache_query_tokens": ("prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache"),
    "prefix_cache_hit_tokens": ("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache"),
    "num_prebuilt_tokens_total": ("prebuilt_tokens", "Tokens of likely next turns computed while idle"),
    "num_prebuilt_hit_tokens_total": ("prebuilt_hit_tokens", "Tokens computed while idle that a request came for"),
    "num_preemptions_total": ("preemptions", "Sequences put out of the KV pool to be computed again"),
}


class Counter:
    """A count that only rises, one for each combination of labels met."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name, self.text, self.labels = name, text, labels
        self.counts: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}
        self.created_s: dict[tuple[str, ...], float] = {} if labels else {(): time.time()}
        self._lock = threading.Lock()

    def inc(self, amount: float = 1, *, labels: tuple[str, ...] = ()) -> None:
        """Count `amount` more under the values of the labels."""
        with self._lock:
            self.created_s.setdefault(labels, time.time())
            self.counts[labels] = self.counts.get(labels, 0.0) + amount


class Histogram:
    """How many values lay at or below each bound, and their sum."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self.name, self.text, self.bounds = name, text, bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one: beyond every bound
        self.sum = 0.0
        self.created_s = time.time()
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Count one value."""
        with self._lock:
            self.counts[bisect.bisect_left(self.bounds, value)] += 1
            self.sum += value


class Metrics:
    """The server's own counts; `read_stats` gives the engine's at each scrape."""

    def __init__(self, prefix: str, read_stats: Callable[[], Any] | None) -> None:
        self._prefix = prefix
        self._read_stats = read_stats
        self.requests = Counter("requests", "Requests by route and HTTP status", ("route", "status"))
        self.finishes = Counter("choices", "Answers by reason of their end", ("finish_reason",))
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens of requests")
        self.generated_tokens = Counter("generated_tokens", "Tokens of answers")
        self.ttft_s = Histogram("time_to_first_token_seconds", "Request to first token", TTFT_BUCKETS)
        self.itl_s = Histogram("inter_token_latency_seconds", "Token to next token", ITL_BUCKETS)
        self.duration_s = Histogram("request_duration_seconds", "Request to last token", DURATION_BUCKETS)

    def collect(self) -> Iterator[Metric]:
        """Every family of metrics, as prometheus_client asks a collector for them."""
        from prometheus_client import core

        if self._read_stats is not None:
            stats = self._read_stats()
            for field, (name, text) in ENGINE_GAUGES.items():
                yield core.GaugeMetricFamily(f"{self._prefix}_{name}", text, value=float(getattr(stats, field)))
            for field, (name, text) in ENGINE_COUNTERS.items():
                yield core.CounterMetricFamily(f"{self._prefix}_{name}", text, value=float(getattr(stats, field)))
        for counter in (self.requests, self.finishes, self.prompt_tokens, self.generated_tokens):
            family = core.CounterMetricFamily(f"{self._prefix}_{counter.name}", counter.text, labels=counter.labels)
            for labels, count in list(counter.counts.items()):
                family.add_metric(labels, count, created=counter.created_s[labels])
            yield family
        for histogram in (self.ttft_s, self.itl_s, self.duration_s):
            name = f"{self._prefix}_{histogram.name}"
            below = itertools.accumulate(list(histogram.counts))
            bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
            buckets = list(zip(bounds, below, strict=True))
            whole = core.HistogramMetricFamily(name, histogram.text, buckets=buckets, sum_value=histogram.sum)
            whole.add_sample(f"{name}_created", {}, histogram.created_s)
            yield whole

    def render(self) -> tuple[bytes, str]:
        """The text exposition format and its content type."""
        from prometheus_client import exposition

        return exposition.generate_latest(self), exposition.CONTENT_TYPE_LATEST
