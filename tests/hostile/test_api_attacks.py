"""One attack on the HTTP side a test, named for it; after each the server must serve on with nothing held."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from autoglm.config import EngineConfig
from autoglm.server.settings import ServerSettings
from tests.server.conftest import (
    ServedModel,
    ServeFunction,
    chat_body,
    client_of,
    events_of,
    glm4_parts,
    on_socket,
    serve,
)

__all__ = ["glm4_parts", "serve"]  # fixtures


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def assert_serves_on(served: ServedModel, url: str) -> None:
    reply = httpx.post(f"{url}/v1/chat/completions", json=chat_body(max_tokens=20), timeout=20)
    assert reply.json()["choices"][0]["message"]["content"] == "ok"
    served.assert_idle()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X-A: " + b"b" * 200_000 + b"\r\n\r\n",
        b"GET /\xff\xfe%00%0d%0aX:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_broken_http(serve: ServeFunction, data: bytes) -> None:
    served = serve("ok", start=False)
    with on_socket(served.app) as url:
        with connect(url) as sock:
            try:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                answer = sock.recv(4096)
            except OSError:  # it hung up before all was said
                answer = b""
            assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:200]
        assert_serves_on(served, url)


def test_an_endless_chunked_body(serve: ServeFunction) -> None:
    served = serve("ok", start=False, settings=ServerSettings(max_body_bytes=100_000))
    with on_socket(served.app) as url:
        with connect(url) as sock:
            sock.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            )
            num_sent = 0
            try:
                while num_sent < 50_000_000:
                    sock.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
                    num_sent += 10_000
            except OSError:
                pass
            assert num_sent < 50_000_000
        assert_serves_on(served, url)


def test_many_idle_connections(serve: ServeFunction) -> None:
    served = serve("ok", start=False)
    with on_socket(served.app) as url:
        idle = [connect(url) for _ in range(200)]
        for sock in idle[::2]:
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert_serves_on(served, url)
        for sock in idle:
            sock.close()
        assert_serves_on(served, url)


def test_clients_that_never_read_their_streams(serve: ServeFunction) -> None:
    served = serve("", start=False, engine_config=EngineConfig(max_num_seqs=4))
    body = json.dumps(chat_body(stream=True, ignore_eos=True, max_tokens=400, logprobs=True, top_logprobs=20)).encode()
    with on_socket(served.app) as url:
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        deaf = [connect(url) for _ in range(8)]
        for sock in deaf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(head.encode() + body)
        # The engine is not held up by readers: all of them are worked off although nobody reads.
        served.assert_idle(timeout_s=60)
        for sock in deaf:
            sock.close()
        served.runner.set_reply("ok")
        assert_serves_on(served, url)


SCHEMA_BOMBS: list[dict[str, Any]] = [
    {"type": "string", "pattern": "(a|aa)*" * 50 + "b{1,9999}"},
    {"type": "string", "pattern": "((a{0,100}){0,100}){0,100}"},
    {"type": "string", "pattern": "[\\w\\W]{0,5000}x[\\w\\W]{0,5000}y"},
    {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
    {"type": "string", "minLength": 10**12},
    {"type": "integer", "multipleOf": 10**30 + 7, "minimum": -(10**60)},
    {
        "anyOf": [
            {"type": "object", "properties": {f"k{i}_{j}": {"type": "string"} for j in range(20)}} for i in range(40)
        ]
    },
    {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
    {"enum": ["x" * 50 + str(i) for i in range(900)]},
    {"type": "object", "patternProperties": {"^(.*a){12}$": {"type": "string"}}},
]


@pytest.mark.parametrize("bomb", SCHEMA_BOMBS, ids=range(len(SCHEMA_BOMBS)))
async def test_a_schema_made_to_be_slow(serve: ServeFunction, bomb: dict[str, Any]) -> None:
    served = serve("")
    body = chat_body(
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": bomb}},
        max_tokens=20,
        enable_thinking=False,
    )
    async with client_of(served) as client:
        attack = asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
        await asyncio.sleep(0)
        assert (await client.get("/health")).status_code == 200
        response = await attack
    assert response.status_code in (200, 400), response.text
    served.assert_idle()


async def test_text_that_looks_like_a_template_stays_text(serve: ServeFunction) -> None:
    served = serve("ok")
    attack = "{{ messages.__class__.__mro__ }}{% for x in range(10**9) %}{% endfor %}{{ 7*7 }}"
    async with client_of(served) as client:
        for where in (
            {"messages": [{"role": "user", "content": attack}]},
            {"messages": [{"role": "user", "content": "a", "name": attack}]},
            {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"custom": attack}},
        ):
            response = await client.post("/v1/chat/completions", json={**where, "temperature": 0, "max_tokens": 9})
            assert response.status_code == 200
        tokens = (await client.post("/tokenize", json={"messages": [{"role": "user", "content": attack}]})).json()
    assert attack in served.tokenizer.decode(tokens["tokens"])


async def test_template_variables_that_are_the_servers(serve: ServeFunction) -> None:
    async with client_of(serve("ok")) as client:
        for name in ("messages", "tools", "add_generation_prompt", "bos_token"):
            response = await client.post("/v1/chat/completions", json=chat_body(chat_template_kwargs={name: "x"}))
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "chat_template_kwargs"


async def test_the_most_that_is_allowed_of_everything(serve: ServeFunction) -> None:
    served = serve("", num_blocks=1024, max_context=16_000)
    body = chat_body(
        [{"type": "text", "text": "a"}] * 200,
        n=16,
        stop=["x" * 1024] * 16,
        logit_bias={str(i): -100 for i in range(300)},
        stop_token_ids=[1] * 64,
        max_tokens=4,
        logprobs=True,
        top_logprobs=20,
        tools=[
            {"type": "function", "function": {"name": f"t{i}", "parameters": {"type": "object"}}} for i in range(128)
        ],
        stream=True,
    )
    async with client_of(served) as client:
        events = events_of((await client.post("/v1/chat/completions", json=body)).text)
        body["messages"] = [{"role": "user", "content": ""}] * 4097
        assert (await client.post("/v1/chat/completions", json=body)).json()["error"]["param"] == "messages"
    assert events[-1] == "[DONE]"
    served.assert_idle()


async def test_keys_are_compared_without_quoting_them(serve: ServeFunction) -> None:
    served = serve("ok", api_key="right")
    async with client_of(served, authorization="Bearer " + "canary" * 1000) as client:
        response = await client.post("/v1/chat/completions", json=chat_body())
    assert response.status_code == 401 and "canary" not in response.text and "right" not in response.text
