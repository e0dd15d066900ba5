"""A server that answers what a test says, for the commands that ask one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest


class FakeServer:
    """An OpenAI-shaped server as an httpx transport; keeps the requests, answers with what the test says."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.deltas: list[dict[str, str]] = [{"role": "assistant"}, {"content": "Hel"}, {"content": "lo"}]
        self.refusal: tuple[int, str] | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "fake-model"}]})
        self.requests.append(json.loads(request.content))
        if self.refusal is not None:
            return httpx.Response(self.refusal[0], json={"error": {"message": self.refusal[1]}})
        events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in self.deltas]
        events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        lines = [": keep-alive", *(f"data: {json.dumps(event)}" for event in events), "data: [DONE]"]
        return httpx.Response(200, text="\n\n".join(lines) + "\n\n", headers={"content-type": "text/event-stream"})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    server = FakeServer()
    plain_client = httpx.Client

    def client(**options: Any) -> httpx.Client:
        return plain_client(transport=httpx.MockTransport(server), **options)

    monkeypatch.setattr(httpx, "Client", client)
    yield server
