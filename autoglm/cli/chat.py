"""autoglm chat: a conversation in the terminal, with a model loaded here or with a running server.

Both ways go through the HTTP API: without --url the server part runs in this process, on a loopback port of the
system's choice behind a key that only this process knows. So the chat shows exactly what any client gets.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console

from autoglm.cli.console import ProgressBars, printable
from autoglm.cli.embedded import EmbeddedServer
from autoglm.cli.loading import ModelOptions, check_model_option, find_model, load_model
from autoglm.errors import AutoglmError, ConfigError

_HELP = """/reset  forget the conversation     /system TEXT  begin anew with a system message
/think on|off  let the model think first, or not     /exit  leave (also Ctrl-D)
Ctrl-C stops an answer."""
_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ChatOptions:
    """What the flags of `autoglm chat` say; None leaves the choice to the server."""

    url: str | None = None
    api_key: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    thinking: bool | None = None


class ServerError(AutoglmError):
    """The server refused a request or could not be reached."""


def run_chat(model: ModelOptions, options: ChatOptions) -> None:
    """Chat until the person leaves."""
    if options.url is not None:
        if model.model is not None:
            raise ConfigError("--model loads a model here and --url talks to a server elsewhere; give one of them")
        _chat_with(options.url, options.api_key, options)
        return
    check_model_option(model)
    with ProgressBars() as bars:
        loaded = load_model(find_model(model, bars.report), model, bars.report)
    key = secrets.token_urlsafe(32)
    with EmbeddedServer(loaded, api_key=key) as server:
        _chat_with(server.url, key, options)


def _chat_with(url: str, api_key: str | None, options: ChatOptions) -> None:
    timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {api_key or 'EMPTY'}"}
    try:
        # Proxies from the environment are for the world outside; a model server is named by hand.
        client = httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=timeout, trust_env=False)
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"--url {url!r} is not a URL ({error}); expected e.g. http://127.0.0.1:8000/v1") from None
    with client:
        name = _served_model(client, url)
        _Conversation(client, name, options).run()


def _served_model(client: httpx.Client, url: str) -> str:
    try:
        reply = client.get("models")
        _raise_for_error(reply)
        return str(reply.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ServerError(
            f"no server answers at {url} ({type(error).__name__}); mend: start one with autoglm serve, "
            "and give its address with /v1, such as http://127.0.0.1:8000/v1"
        ) from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise ServerError(
            f"what answers at {url} is no OpenAI-compatible server; does the address end in /v1?"
        ) from None


@dataclass
class _Answer:
    """One streamed answer while it grows."""

    content: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    timings: dict[str, Any] = field(default_factory=dict)


class _Conversation:
    """The loop of question and answer; keeps the history the server does not."""

    def __init__(self, client: httpx.Client, model: str, options: ChatOptions) -> None:
        self._client = client
        self._model = model
        self._options = options
        self._thinking = options.thinking
        self._console = Console(highlight=False)
        self._messages: list[dict[str, str]] = []
        self._reset(options.system)

    def run(self) -> None:
        """Read a line, answer it, until the end of input or /exit."""
        if sys.stdin.isatty():
            self._console.print(f"[bold]{printable(self._model)}[/bold]  /help lists the commands", soft_wrap=True)
        while (line := self._read_line()) is not None:
            if line.startswith("/"):
                if not self._command(line):
                    return
            elif line:
                self._ask(line)

    def _read_line(self) -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()
            return None

    def _reset(self, system: str | None) -> None:
        self._messages = [] if not system else [{"role": "system", "content": system}]

    def _command(self, line: str) -> bool:
        """Carry out a /command; False means leave."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command in ("/exit", "/quit", "/bye"):
            return False
        if command == "/reset":
            self._reset(self._options.system)
            print("The conversation is forgotten.")
        elif command == "/system" and argument:
            self._reset(argument)
            print("The conversation begins anew with that system message.")
        elif command == "/think" and argument in ("on", "off"):
            self._thinking = argument == "on"
            print(f"Thinking is {argument}.")
        else:
            print(_HELP)
        return True

    def _ask(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        answer = _Answer()
        try:
            for delta in self._stream(answer):
                self._show(delta, answer)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except ServerError as error:
            # The conversation goes on; the question that failed is not part of it.
            self._messages.pop()
            print(f"ERROR: {error}", file=sys.stderr)
            return
        print()
        if answer.finish_reason == "length":
            print("[the answer was cut off at its longest length]")
        self._messages.append({"role": "assistant", "content": "".join(answer.content)})

    def _show(self, delta: dict[str, Any], answer: _Answer) -> None:
        thought = delta.get("reasoning_content")
        if isinstance(thought, str) and thought:
            self._console.print(_steady(thought), style="dim", end="", markup=False, soft_wrap=True)
        content = delta.get("content")
        if isinstance(content, str) and content:
            answer.content.append(content)
            self._console.print(_steady(content), end="", markup=False, soft_wrap=True)

    def _stream(self, answer: _Answer) -> Iterator[dict[str, Any]]:
        body: dict[str, Any] = {"model": self._model, "messages": self._messages, "stream": True}
        body["return_reasoning"] = True
        optional = {
            "temperature": self._options.temperature,
            "max_tokens": self._options.max_tokens,
            "enable_thinking": self._thinking,
        }
        body.update({key: value for key, value in optional.items() if value is not None})
        try:
            with self._client.stream("POST", "chat/completions", json=body) as reply:
                if reply.is_error:
                    reply.read()
                _raise_for_error(reply)
                for event in _events(reply):
                    for choice in event.get("choices", ()):
                        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                        yield choice.get("delta", {})
        except httpx.HTTPError as error:
            raise ServerError(f"the server stopped answering ({type(error).__name__})") from None


def _events(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON events of a stream; comments (keep-alive) are skipped. Raises ServerError for an error event."""
    for line in reply.iter_lines():
        if not line.startswith("data:"):
            continue
        payload = line[5:].strip()
        if payload == "[DONE]":
            return
        event = json.loads(payload)
        if "error" in event:
            raise ServerError(printable(str(event["error"].get("message", "the server failed"))))
        yield event


def _raise_for_error(reply: httpx.Response) -> None:
    if not reply.is_error:
        return
    try:
        message = str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP status {reply.status_code}"
    raise ServerError(printable(message, 400))


def _steady(text: str) -> str:
    """A piece of an answer without what could steer the terminal; line breaks and tabs stay."""
    return "".join(piece if piece in "\n\t" else printable(piece, 1 << 20) for piece in text)
