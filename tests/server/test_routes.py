"""Models, health, metrics, tokenize, keys, browser guard, and the error object of every kind of refusal."""

from __future__ import annotations

import json
import logging

import httpx
import pytest

from autoglm.errors import ConfigError
from autoglm.server.settings import ServerSettings
from tests.server.conftest import MODEL_ID, ServeFunction, chat_body, client_of

JSON_HEADERS = {"content-type": "application/json"}


def assert_error(response: httpx.Response, status: int, code: str | None = None) -> dict[str, object]:
    """The status, and OpenAI's error object with all four members."""
    assert response.status_code == status, response.text
    error: dict[str, object] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    if code is not None:
        assert error["code"] == code
    return error


async def test_models_are_listed_with_their_aliases(serve: ServeFunction) -> None:
    async with client_of(serve("ok", aliases=("gpt-4o", MODEL_ID, "org/model"))) as client:
        listed = (await client.get("/v1/models")).json()
        assert [model["id"] for model in listed["data"]] == [MODEL_ID, "gpt-4o", "org/model"]
        assert listed["data"][0]["object"] == "model" and listed["data"][0]["max_model_len"] == 4096
        assert (await client.get("/v1/models/org/model")).json()["id"] == "org/model"
        assert_error(await client.get("/v1/models/other"), 404, "model_not_found")
        reply = await client.post("/v1/chat/completions", json={**chat_body(), "model": "gpt-4o"})
        assert reply.json()["model"] == "gpt-4o"
        error = assert_error(
            await client.post("/v1/chat/completions", json={**chat_body(), "model": "canary"}), 404, "model_not_found"
        )
        assert error["param"] == "model" and "--alias" in str(error["message"]) and "canary" not in str(error)


async def test_health_follows_the_driver(serve: ServeFunction) -> None:
    served = serve(start=False)
    async with client_of(served) as client:
        for status in ("loading", "ready", "draining"):
            response = await client.get("/health")
            if status == "ready":
                assert response.json() == {"status": "ok"}
                served.driver.begin_drain()
                continue
            error = assert_error(response, 503)
            assert status in str(error["message"]) and int(response.headers["retry-after"]) > 0
            assert_error(await client.post("/v1/chat/completions", json=chat_body()), 503)
            served.driver.start()


async def test_metrics_count_what_happened(serve: ServeFunction) -> None:
    served = serve("open the settings page")
    async with client_of(served) as client:
        body = chat_body("what is on the screen? " * 10)
        for _ in range(2):
            await client.post("/v1/chat/completions", json=body)
        await client.post("/v1/chat/completions", json={})
        await client.get("/canary/path")
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in response.text.splitlines()
        if line and not line.startswith("#")
    }
    route = 'route="/v1/chat/completions"'
    assert values[f'autoglm_requests_total{{{route},status="200"}}'] == 2
    assert values[f'autoglm_requests_total{{{route},status="400"}}'] == 1
    assert values['autoglm_requests_total{route="other",status="404"}'] == 1
    assert values['autoglm_choices_total{finish_reason="stop"}'] == 2
    assert values["autoglm_time_to_first_token_seconds_count"] == 2
    assert values["autoglm_inter_token_latency_seconds_count"] > 2
    assert values["autoglm_generated_tokens_total"] == values["autoglm_decode_tokens_total"] > 0
    assert values["autoglm_prefix_cache_hit_tokens_total"] > 0
    assert values["autoglm_kv_blocks"] == 256 and values["autoglm_kv_blocks_used"] == 0
    assert values["autoglm_sequences_running"] == values["autoglm_sequences_waiting"] == 0
    assert values["autoglm_preemptions_total"] == 0
    assert "canary" not in response.text


async def test_tokenize_and_detokenize_in_both_forms(serve: ServeFunction) -> None:
    served = serve()
    async with client_of(served) as client:
        for field in ("content", "prompt"):
            reply = (await client.post("/tokenize", json={field: "the phone 你是谁"})).json()
            assert reply["tokens"] == served.tokenizer.encode("the phone 你是谁")
            assert reply["count"] == len(reply["tokens"])
        for field in ("content", "prompt"):
            back = (await client.post("/detokenize", json={"tokens": reply["tokens"]})).json()
            assert back[field] == "the phone 你是谁"
        pieces = (await client.post("/tokenize", json={"content": "the phone", "with_pieces": True})).json()["tokens"]
        assert "".join(piece["piece"] for piece in pieces) == "the phone"
        strings = (await client.post("/tokenize", json={"prompt": "the phone", "return_token_strs": True})).json()
        assert "".join(strings["token_strs"]) == "the phone"
        special = {"content": "<|user|>", "parse_special": False}
        assert (
            served.tokenizer.token_id("<|user|>") not in (await client.post("/tokenize", json=special)).json()["tokens"]
        )
        assert_error(await client.post("/detokenize", json={"tokens": [served.tokenizer.vocab_size]}), 400)
        assert_error(await client.post("/tokenize", json={}), 400)


# --- keys ----------------------------------------------------------------------------------------------


async def test_any_key_and_none_is_taken_without_a_key(serve: ServeFunction) -> None:
    for headers in ({}, {"authorization": "Bearer EMPTY"}, {"authorization": "nonsense"}):
        async with client_of(serve("ok"), **headers) as client:
            assert (await client.post("/v1/chat/completions", json=chat_body())).status_code == 200


async def test_a_set_key_is_asked_for_everywhere_but_health(serve: ServeFunction) -> None:
    served = serve("ok", api_key="sk-secret-é")
    async with client_of(served) as client:
        for path in ("/v1/models", "/metrics", "/nope"):
            error = assert_error(await client.get(path), 401, "invalid_api_key")
            assert "secret" not in str(error)
        assert (await client.get("/health")).status_code == 200
        for value in ("Bearer wrong", "Bearer ", "sk-secret-é".encode(), b"Bearer \xff\xfe", "Basic sk-secret"):
            assert_error(await client.get("/v1/models", headers={"authorization": value}), 401)
        for name, value in (("authorization", "Bearer sk-secret-é"), ("x-api-key", "sk-secret-é")):
            response = await client.get("/v1/models", headers={name: value.encode()})
            assert response.status_code == 200


# --- browsers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", "http://test.evil.example"])
async def test_pages_of_other_sites_are_refused(serve: ServeFunction, origin: str) -> None:
    async with client_of(serve("ok"), origin=origin) as client:
        for response in (
            await client.post("/v1/chat/completions", json=chat_body()),
            await client.options("/v1/chat/completions", headers={"access-control-request-method": "POST"}),
        ):
            assert_error(response, 403, "origin_not_allowed")
            assert "access-control-allow-origin" not in response.headers


async def test_an_allowed_page_gets_cors_and_preflight(serve: ServeFunction) -> None:
    settings = ServerSettings(allowed_origins=("http://localhost:3000",))
    async with client_of(serve("ok", settings=settings, api_key="k"), origin="http://localhost:3000") as client:
        preflight = await client.options("/v1/chat/completions", headers={"access-control-request-method": "POST"})
        assert preflight.status_code == 204
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        response = await client.post("/v1/chat/completions", json=chat_body(), headers={"authorization": "Bearer k"})
        assert response.status_code == 200
        for each in (preflight, response):
            assert each.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert_error(await client.get("/v1/models", headers={"origin": "http://localhost:3001"}), 403)


async def test_the_servers_own_pages_may_call_it(serve: ServeFunction) -> None:
    served = serve("ok")
    for own, status in (("127.0.0.1:8000", 200), ("localhost:8000", 200), ("rebound.evil.example:8000", 403)):
        transport = httpx.ASGITransport(app=served.app)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{own}") as client:
            response = await client.post("/v1/chat/completions", json=chat_body(), headers={"origin": f"http://{own}"})
            assert response.status_code == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost:8000", 200),
        ("[::1]:8000", 200),
        ("app.localhost", 200),
        ("friend.example:8000", 200),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
        ("[::1", 403),
    ],
)
async def test_a_rebound_name_does_not_reach_a_loopback_server(serve: ServeFunction, host: str, status: int) -> None:
    served = serve("ok", settings=ServerSettings(allowed_hosts=("friend.example",)))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=served.app), base_url="http://127.0.0.1:8000"
    ) as client:
        response = await client.get("/v1/models", headers={"host": host})
    assert response.status_code == status


def test_settings_are_checked() -> None:
    for wrong in ({"max_body_bytes": 0}, {"keep_alive_s": -1}, {"allowed_origins": ("localhost:3000",)}):
        with pytest.raises(ConfigError):
            ServerSettings(**wrong)  # type: ignore[arg-type]


# --- refusals --------------------------------------------------------------------------------------------


async def test_every_refusal_has_the_error_object(serve: ServeFunction) -> None:
    served = serve("ok", settings=ServerSettings(max_body_bytes=10_000))
    path = "/v1/chat/completions"
    async with client_of(served) as client:
        assert_error(await client.get("/v1/nothing"), 404, "not_found")
        assert_error(await client.get(path), 405, "method_not_allowed")
        assert_error(await client.delete("/v1/models"), 405)
        assert_error(await client.post(path, content="a=b", headers={"content-type": "text/plain"}), 415)
        assert_error(await client.post(path, content=b"{}"), 415)
        for body in (b"", b"{", b"[]", b'{"a": "\xff"}', b'{"a": NaN}', b"[" * 5000 + b"]" * 5000, b"\xef\xbb\xbf{}"):
            assert_error(await client.post(path, content=body, headers=JSON_HEADERS), 400, "invalid_json")
        error = assert_error(await client.post(path, json=chat_body(messages=[{"role": "user"}])), 400)
        assert error["param"] == "messages[0].content"
        assert_error(await client.post(path, json=chat_body("x" * 10_000)), 413)


async def test_a_large_body_is_refused_before_it_is_read(serve: ServeFunction) -> None:
    served = serve("ok", settings=ServerSettings(max_body_bytes=10_000))
    num_sent = 0

    async def endless():  # type: ignore[no-untyped-def]
        nonlocal num_sent
        for _ in range(1000):
            num_sent += 1
            yield b"x" * 1000

    async with client_of(served) as client:
        response = await client.post("/v1/chat/completions", content=endless(), headers=JSON_HEADERS)
        assert_error(response, 413)
        assert num_sent <= 12
        declared = await client.post(
            "/v1/chat/completions", content=b"{}", headers={**JSON_HEADERS, "content-length": "99999999"}
        )
        assert_error(declared, 413)


async def test_a_body_that_stops_arriving_is_given_up(serve: ServeFunction) -> None:
    import asyncio

    served = serve("ok", settings=ServerSettings(body_timeout_s=0.05))

    async def slow():  # type: ignore[no-untyped-def]
        yield b"{"
        await asyncio.sleep(1)
        yield b"}"

    async with client_of(served) as client:
        assert_error(await client.post("/v1/chat/completions", content=slow(), headers=JSON_HEADERS), 408)


async def test_nothing_a_client_sends_gets_into_the_log(serve: ServeFunction, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpx").setLevel(logging.CRITICAL)
    served = serve("canary-answer")
    async with client_of(served, authorization="Bearer canary-key") as client:
        for body in (chat_body("canary-prompt"), chat_body("canary", temperature="canary"), {"messages": "canary"}):
            await client.post("/v1/chat/completions", json=body)
        served.runner.fail_next = RuntimeError("canary-failure")
        await client.post("/v1/chat/completions", json=chat_body("canary-prompt"))
        served.app.state.service.template = None  # a bug of ours, with the prompt in a local variable
        response = await client.post("/v1/chat/completions", json=chat_body("canary-prompt"))
        assert_error(response, 500)
        await client.post("/v1/chat/completions", content=json.dumps("canary"), headers=JSON_HEADERS)
        await client.get("/canary-path")
    own = [record.getMessage() for record in caplog.records if record.name.startswith("autoglm")]
    assert any("AttributeError" in message for message in own)
    assert not [message for message in own if "canary" in message]
