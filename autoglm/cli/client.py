"""A running server from outside: connect to it, learn its model's name, turn its refusals into one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from autoglm.cli.console import printable
from autoglm.errors import AutoglmError, ConfigError

_CONNECT_TIMEOUT_S = 10.0


class ServerError(AutoglmError):
    """The server refused a request or could not be reached."""


@dataclass(frozen=True)
class Server:
    """An open connection to an OpenAI-compatible server, and the first model it names."""

    client: httpx.Client
    model: str


@contextmanager
def connect(url: str, api_key: str | None) -> Iterator[Server]:
    """Connect for the length of a `with` block; url ends in /v1. Raises ConfigError for no URL, ServerError."""
    timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {api_key or 'EMPTY'}"}
    try:
        # Proxies from the environment are for the world outside; a model server is named by hand.
        client = httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=timeout, trust_env=False)
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"{url!r} is not a URL ({error}); expected e.g. http://127.0.0.1:8000/v1") from None
    with client:
        yield Server(client, _served_model(client, url))


def _served_model(client: httpx.Client, url: str) -> str:
    try:
        reply = client.get("models")
        raise_for_error(reply)
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


def raise_for_error(reply: httpx.Response) -> None:
    """Raises ServerError with the server's own sentence unless it did what it was asked."""
    if not reply.is_error:
        return
    try:
        message = str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP status {reply.status_code}"
    raise ServerError(printable(message, 400))
