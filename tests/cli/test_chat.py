"""autoglm chat: answers, history and commands, with a model loaded here and with a running server."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from autoglm import cli
from tests.cli.conftest import FakeServer
from tests.tiny_models import TinyModel

DOCS = Path(__file__).resolve().parents[2] / "docs"


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


def test_media_go_with_the_next_message(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [f"/image '{DOCS / 'screen.png'}'", f"/audio {DOCS / 'command.flac'}", "", "and now?"]
    say(monkeypatch, *lines, f"/image {DOCS / 'screen.png'}", "/reset", "plain")
    assert cli.main(["chat", "--url", "http://x/v1"]) == 0
    first, second, third = [request["messages"] for request in fake.requests]
    assert [part["type"] for part in first[0]["content"]] == ["image_url", "input_audio"]
    assert first[0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert second[0] == first[0] and second[2]["content"] == "and now?", "the history keeps its picture"
    assert [message["content"] for message in third] == ["plain"], "a reset forgets what was attached"
    assert "next message" in capfd.readouterr().out


def test_what_cannot_be_attached_is_one_line(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, "/image none.png", f"/image {DOCS / 'api.md'}", f"/audio {DOCS / 'screen.png'}", "hello")
    assert cli.main(["chat", "--url", "http://x/v1"]) == 0
    errors = capfd.readouterr().err.splitlines()
    assert [request["messages"][0]["content"] for request in fake.requests] == ["hello"]
    assert len(errors) == 3 and all(line.startswith("ERROR: ") for line in errors)
    assert "'none.png' not found" in errors[0] and "send PNG, JPEG, WebP or GIF" in errors[1]
    assert "cannot be played to a model" in errors[2] and "send wav, mp3, flac or ogg" in errors[2]


def test_the_default_model_sees(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """No flags about the model: Nano, with its eyes."""
    say(monkeypatch, f"/image {DOCS / 'screen.png'}", "tap Wallet")
    assert cli.main(["chat", "--temperature", "0", "-n", "64", "-t", "1", "-c", "1024"]) == 0
    out, err = capfd.readouterr()
    assert 'Tap Wallet\ndo(action="Tap", element=[3' in out and err == ""
