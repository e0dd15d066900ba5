"""One server's chat API as the commands ask it: a running server's, or that of a model loaded here.

Both ways are HTTP: without an address the server part runs in this process, on a loopback port of the system's choice
behind a key that only this process knows. So a command shows exactly what any client gets.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from autoglm.cli.console import AnswerPiece, ProgressBars, printable
from autoglm.cli.embedded import EmbeddedServer
from autoglm.cli.loading import ModelOptions, check_media, check_model_option, find_model, load_model
from autoglm.errors import AutoglmError, ConfigError

_CONNECT_TIMEOUT_S = 10.0


class ServerError(AutoglmError):
    """The server refused a request or could not be reached."""


@dataclass
class Answer:
    """One streamed answer while it grows."""

    thought: str = ""
    content: str = ""
    finish_reason: str | None = None
    timings: dict[str, Any] = field(default_factory=dict)


class ApiClient:
    """Chat completions of one server; `model` is the name it serves."""

    def __init__(self, http: httpx.Client, model: str) -> None:
        self._http = http
        self.model = model

    def stream(self, body: dict[str, Any], answer: Answer) -> Iterator[AnswerPiece]:
        """Ask; yield the answer's pieces as they come, and gather them in `answer`. Raises ServerError."""
        body = {"model": self.model, "return_reasoning": True, **body, "stream": True}
        try:
            with self._http.stream("POST", "chat/completions", json=body) as reply:
                if reply.is_error:
                    reply.read()
                _raise_for_error(reply)
                for event in _events(reply):
                    answer.timings = event.get("timings") or answer.timings
                    for choice in event.get("choices", ()):
                        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                        yield from _pieces(choice.get("delta", {}), answer)
        except httpx.HTTPError as error:
            raise ServerError(f"the server stopped answering ({type(error).__name__})") from None


@contextmanager
def connect(
    model: ModelOptions, url: str | None, api_key: str | None, *, media: Collection[str] = ()
) -> Iterator[ApiClient]:
    """The server at `url`, or without one the model that the flags name, loaded here.

    media   "picture" and "sound", where requests are going to hold them: a model that cannot read them is refused
            before it is loaded
    Raises ConfigError, ServerError, and what loading raises.
    """
    if url is not None:
        for flag, value in (("--model", model.model), ("--mmproj", model.mmproj)):
            if value is not None:
                raise ConfigError(f"{flag} loads a model here and --url asks a server elsewhere; give one of them")
        with _http_client(url, api_key) as http:
            yield ApiClient(http, _served_model(http, url))
        return
    check_model_option(model)
    with ProgressBars() as bars:
        path = find_model(model, bars.report)
        check_media(path, model, media)
        loaded = load_model(path, model, bars.report)
    key = secrets.token_urlsafe(32)
    with EmbeddedServer(loaded, api_key=key) as server, _http_client(server.url, key) as http:
        yield ApiClient(http, loaded.model_id)


def _http_client(url: str, api_key: str | None) -> httpx.Client:
    timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {api_key or 'EMPTY'}"}
    try:
        # Proxies from the environment are for the world outside; a model server is named by hand.
        return httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=timeout, trust_env=False)
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"--url {url!r} is not a URL ({error}); expected e.g. http://127.0.0.1:8000/v1") from None


def _served_model(http: httpx.Client, url: str) -> str:
    try:
        reply = http.get("models")
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


def _pieces(delta: dict[str, Any], answer: Answer) -> Iterator[AnswerPiece]:
    thought, content = delta.get("reasoning_content"), delta.get("content")
    if isinstance(thought, str) and thought:
        answer.thought += thought
        yield AnswerPiece(thought, is_thought=True)
    if isinstance(content, str) and content:
        answer.content += content
        yield AnswerPiece(content)


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
