"""autoglm chat: answers, history and commands, with a model loaded here and with a running server."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from autoglm import cli
from autoglm.cli import chat
from tests.tiny_models import TinyModel


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

    monkeypatch.setattr(chat.httpx, "Client", client)
    yield server


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))


def test_history_grows_and_resets(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, "first", "", "second", "/reset", "third", "/exit", "never")
    assert cli.main(["chat", "--url", "http://x/v1", "--system", "be brief", "-n", "9", "--no-thinking"]) == 0
    histories = [[message["content"] for message in request["messages"]] for request in fake.requests]
    assert histories == [
        ["be brief", "first"],
        ["be brief", "first", "Hello", "second"],
        ["be brief", "third"],
    ]
    assert fake.requests[0]["max_tokens"] == 9 and fake.requests[0]["enable_thinking"] is False
    assert "temperature" not in fake.requests[0], "what the person did not choose is the server's choice"
    assert "Hello" in capfd.readouterr().out


def test_thought_is_shown_and_not_sent_back(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.deltas = [{"reasoning_content": "let me see"}, {"content": "42"}]
    say(monkeypatch, "/think on", "why?", "again")
    assert cli.main(["chat", "--url", "http://x/v1"]) == 0
    assert fake.requests[0]["enable_thinking"] is True
    assert [m["content"] for m in fake.requests[1]["messages"]] == ["why?", "42", "again"]
    assert "let me see" in capfd.readouterr().out


def test_a_refused_question_leaves_the_conversation_usable(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.refusal = (400, "too\x1b[31m long")
    say(monkeypatch, "x" * 100, "short")
    assert cli.main(["chat", "--url", "http://x/v1"]) == 0
    assert len(fake.requests[1]["messages"]) == 1
    err = capfd.readouterr().err
    assert "ERROR: too\ufffd[31m long" in err and "\x1b" not in err


def test_an_answer_cannot_steer_the_terminal(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.deltas = [{"content": "a\x1b]0;title\x07[bold]b\n\tc"}]
    say(monkeypatch, "hi")
    cli.main(["chat", "--url", "http://x/v1"])
    out = capfd.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "[bold]b\n" in out


def test_no_server_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    say(monkeypatch, "hi")
    assert cli.main(["chat", "--url", "http://127.0.0.1:9/v1"]) == 1
    err = capfd.readouterr().err
    assert "no server answers" in err and err.count("\n") == 1
    assert cli.main(["chat", "--url", "not a url"]) in (1, 2)
    assert capfd.readouterr().err.startswith("ERROR: ")


def test_model_loaded_here_answers(
    tiny_llama: TinyModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The whole way: engine in this process, its server part on a free loopback port, two turns."""
    say(monkeypatch, "open the settings", "and back", "/help", "/exit")
    code = cli.main(["chat", "-m", str(tiny_llama.path), "-n", "12", "--temperature", "0", "-t", "1"])
    out, err = capfd.readouterr()
    assert code == 0 and "ERROR" not in err
    assert "/reset" in out
