"""Streamed chat requests with the time of every chunk; as a program, a reader that disturbs no other process.

    python benchmarks/stream_client.py PORT < body.json      prints perf_counter seconds for every chunk with content

perf_counter is the system's monotonic clock, the same one in every process.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Iterator
from typing import Any


def stream(port: int, body: dict[str, Any]) -> Iterator[tuple[float, dict[str, Any]]]:
    """Send a streamed chat request; (perf_counter, chunk) as they come in."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1800)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
    )
    reply = connection.getresponse()
    if reply.status != 200:
        raise SystemExit(f"the server answered {reply.status}: {reply.read()[:300]!r}")
    try:
        for line in reply:
            if line.startswith(b"data: {"):
                yield time.perf_counter(), json.loads(line[6:])
    finally:
        connection.close()


def content_of(chunk: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


if __name__ == "__main__":
    for at_s, chunk in stream(int(sys.argv[1]), json.load(sys.stdin)):
        if content_of(chunk):
            print(at_s, flush=True)
