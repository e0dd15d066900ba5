"""Prometheus metrics in a registry of their own: requests, tokens, latencies, queue, KV blocks, cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

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


class EngineCollector(Collector):
    """Reads the engine's counts at scrape time."""

    def __init__(self, prefix: str, read_stats: Callable[[], Any]) -> None:
        self._prefix = prefix
        self._read_stats = read_stats

    def collect(self) -> Iterator[Metric]:
        """One family per count the engine keeps."""
        stats = self._read_stats()
        for field, (name, text) in ENGINE_GAUGES.items():
            yield GaugeMetricFamily(f"{self._prefix}_{name}", text, value=float(getattr(stats, field)))
        for field, (name, text) in ENGINE_COUNTERS.items():
            yield CounterMetricFamily(f"{self._prefix}_{name}", text, value=float(getattr(stats, field)))


class Metrics:
    """The server's own counts; `read_stats` gives the engine's at each scrape."""

    def __init__(self, prefix: str, read_stats: Callable[[], Any] | None) -> None:
        self.registry = CollectorRegistry()
        if read_stats is not None:
            self.registry.register(EngineCollector(prefix, read_stats))
        self.requests = Counter(
            f"{prefix}_requests", "Requests by route and HTTP status", ["route", "status"], registry=self.registry
        )
        self.finishes = Counter(
            f"{prefix}_choices", "Answers by reason of their end", ["finish_reason"], registry=self.registry
        )
        self.prompt_tokens = Counter(f"{prefix}_prompt_tokens", "Prompt tokens of requests", registry=self.registry)
        self.generated_tokens = Counter(f"{prefix}_generated_tokens", "Tokens of answers", registry=self.registry)
        self.ttft_s = self._histogram(prefix, "time_to_first_token_seconds", "Request to first token", TTFT_BUCKETS)
        self.itl_s = self._histogram(prefix, "inter_token_latency_seconds", "Token to next token", ITL_BUCKETS)
        self.duration_s = self._histogram(prefix, "request_duration_seconds", "Request to last token", DURATION_BUCKETS)

    def _histogram(self, prefix: str, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{prefix}_{name}", text, registry=self.registry, buckets=buckets)

    def render(self) -> tuple[bytes, str]:
        """The text exposition format and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
