"""10,000 generated bodies: no 5xx, an error object for every refusal, and the server whole afterwards."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import httpx
import pytest

from autoglm.config import EngineConfig
from tests.hostile.api_bodies import generate
from tests.server.conftest import ServeFunction, chat_body, client_of, glm4_parts, serve

__all__ = ["glm4_parts", "serve"]  # fixtures

NUM_BODIES = 10_000
NUM_PARTS = 10
CONCURRENCY = 8


def check(path: str, data: bytes, response: httpx.Response) -> None:
    """One reply: a success that is JSON or a whole stream, or a refusal of the client's body that says why."""
    about = f"{path} {data[:2000]!r} -> {response.status_code} {response.text[:500]}"
    assert response.status_code in (200, 400, 404), about
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, about
        assert error["message"] and len(error["message"]) <= 1100, about
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n"), about
        assert '"error"' not in response.text, about
    else:
        json.loads(response.text)


@pytest.mark.parametrize("part", range(NUM_PARTS))
async def test_generated_bodies_give_no_5xx(serve: ServeFunction, part: int) -> None:
    served = serve(
        "<think>hm</think><answer>ok</answer>",
        max_context=96,
        num_blocks=96,
        engine_config=EngineConfig(max_waiting=1024),
    )
    bodies = iter(generate(20_000 + part, NUM_BODIES // NUM_PARTS))
    codes: Counter[int] = Counter()

    async def work(client: httpx.AsyncClient) -> None:
        for path, data in bodies:
            response = await client.post(path, content=data, headers={"content-type": "application/json"})
            check(path, data, response)
            codes[response.status_code] += 1

    async with client_of(served) as client:
        await asyncio.gather(*(work(client) for _ in range(CONCURRENCY)))
        assert sum(codes.values()) == NUM_BODIES // NUM_PARTS
        # A generator that only ever makes rubbish, or only good bodies, would test little.
        assert codes[200] > 100 and codes[400] > 100, codes
        served.assert_idle()
        reply = await client.post("/v1/chat/completions", json=chat_body(max_tokens=30))
        assert "ok" in reply.json()["choices"][0]["message"]["content"]
    served.assert_idle()
