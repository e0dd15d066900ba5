"""What /metrics says is what prometheus_client's own counters would say, line for line."""

from __future__ import annotations

import re
from types import SimpleNamespace

import prometheus_client

from autoglm.server import metrics

STATS = SimpleNamespace(**dict.fromkeys((*metrics.ENGINE_GAUGES, *metrics.ENGINE_COUNTERS), 5))


def test_the_text_is_the_librarys() -> None:
    registry = prometheus_client.CollectorRegistry()
    requests = prometheus_client.Counter(
        "p_requests", "Requests by route and HTTP status", ["route", "status"], registry=registry
    )
    tokens = prometheus_client.Counter("p_prompt_tokens", "Prompt tokens of requests", registry=registry)
    ttft = prometheus_client.Histogram(
        "p_time_to_first_token_seconds", "Request to first token", registry=registry, buckets=metrics.TTFT_BUCKETS
    )
    ours = metrics.Metrics("p", lambda: STATS)
    for labels in (('/x"\n', "200"), ("/y", "400"), ("/y", "400")):
        requests.labels(*labels).inc()
        ours.requests.inc(labels=labels)
    for amount in (7, 0):
        tokens.inc(amount)
        ours.prompt_tokens.inc(amount)
    for value in (0.0, 0.01, 0.3, 300, 301, 1e9):
        ttft.observe(value)
        ours.ttft_s.observe(value)
    text, content_type = ours.render()
    assert content_type == prometheus_client.exposition.CONTENT_TYPE_LATEST
    families = lines(text)
    for family in lines(prometheus_client.generate_latest(registry)):
        assert family in families


def lines(text: bytes) -> list[str]:
    """Each family with its help, type and samples; the times of creation made equal."""
    steady = re.sub(r"(_created\S*) \S+", r"\1 then", text.decode())
    return re.split(r"(?m)^(?=# HELP)", steady)[1:]
