"""The whole service on the native runner: tiny GLM-4 with M-RoPE, and SmolLM2's real weights where they can be had."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from starlette.applications import Starlette

from autoglm.chat.template import ChatTemplate
from autoglm.chat.tokenizer import Tokenizer
from autoglm.config import EngineConfig
from autoglm.engine.engine import Engine
from autoglm.engine.model_runner import CpuModelRunner
from autoglm.formats.gguf import GGUFFile
from autoglm.server.app import create_app
from autoglm.server.driver import EngineDriver
from tests.hostile.api_bodies import generate
from tests.hostile.test_api_fuzz import check
from tests.server.conftest import on_socket
from tests.tiny_models import TinyModel

SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 999}, "name": {"enum": ["tap", "back"]}},
    "required": ["x", "name"],
    "additionalProperties": False,
}


def native_app(path: Path, **config: int) -> tuple[Starlette, Engine]:
    """The app as `autoglm serve` makes it."""
    gguf = GGUFFile.open(path)
    engine_config = EngineConfig(num_threads=2, **config)
    tokenizer = Tokenizer.from_gguf(gguf)
    engine = Engine(CpuModelRunner(gguf, engine_config), tokenizer, engine_config)
    app = create_app(EngineDriver(engine), tokenizer, ChatTemplate.from_gguf(gguf, None), model_id="native")
    return app, engine


@pytest.fixture
def tiny(tiny_glm4_mrope: TinyModel) -> Iterator[tuple[str, Engine]]:
    app, engine = native_app(tiny_glm4_mrope.path, ctx_size=512, num_kv_blocks=256, max_num_seqs=8)
    with on_socket(app) as url:
        yield url, engine


def ask(content: str, **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 24, **fields}


async def test_answers_do_not_depend_on_who_else_asks(tiny: tuple[str, Engine]) -> None:
    url, engine = tiny
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def text(i: int, salt: str) -> str:
            body = ask(f"{i}: what is on the screen? " * (1 + i % 4), cache_salt=salt)
            reply = (await client.post("/v1/chat/completions", json=body)).json()
            return str(reply["choices"][0]["message"]["content"])

        alone = [await text(i, "a") for i in range(12)]
        together = list(await asyncio.gather(*(text(i, "b") for i in range(12))))
        cached = list(await asyncio.gather(*(text(i, "a") for i in range(12))))
    assert alone == together == cached and len(set(alone)) > 1
    assert engine.stats().prefix_cache_hit_tokens > 0
    assert engine.stats().kv_blocks_used == 0


async def test_thinking_off_and_budget_hold_on_a_model_that_writes_at_random(tiny: tuple[str, Engine]) -> None:
    async with httpx.AsyncClient(base_url=tiny[0], timeout=60) as client:
        for seed in range(10):
            for fields, most in (({"enable_thinking": False}, 0), ({"enable_thinking": True, "thinking_budget": 5}, 5)):
                body = ask("tap", seed=seed, temperature=1.3, max_tokens=40, return_reasoning=True, **fields)
                reply = (await client.post("/v1/chat/completions", json=body)).json()
                assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] <= most
                assert reply["choices"][0]["message"]["content"] or reply["usage"]["completion_tokens"] < 12


async def test_json_and_tools_from_random_weights(tiny: tuple[str, Engine]) -> None:
    tools = [{"type": "function", "function": {"name": "tap", "parameters": SCHEMA}}]
    async with openai.AsyncOpenAI(base_url=f"{tiny[0]}/v1", api_key="EMPTY", max_retries=0) as client:
        for seed in range(5):
            common = {"model": "native", "messages": [{"role": "user", "content": "tap"}], "seed": seed}
            reply = await client.chat.completions.create(
                **common,
                max_tokens=400,
                extra_body={"enable_thinking": False},
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
            )
            assert reply.choices[0].finish_reason == "stop"
            assert 0 <= json.loads(reply.choices[0].message.content)["x"] <= 999
            reply = await client.chat.completions.create(
                **common,
                max_tokens=400,
                tools=tools,
                tool_choice="required",
                parallel_tool_calls=False,
                extra_body={"thinking_budget": 8},
            )
            assert reply.choices[0].finish_reason == "tool_calls"
            [call] = reply.choices[0].message.tool_calls
            assert json.loads(call.function.arguments)["name"] in ("tap", "back")


async def test_generated_bodies_on_the_native_runner(tiny_glm4_mrope: TinyModel) -> None:
    """A part of what test_api_fuzz.py sends; there the runner is fake so that ten thousand are quick."""
    app, engine = native_app(tiny_glm4_mrope.path, ctx_size=96, num_kv_blocks=96, max_num_seqs=8)
    driver: EngineDriver = app.state.service.driver
    driver.start()
    try:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for path, data in generate(99, 400):
                response = await client.post(path, content=data, headers={"content-type": "application/json"})
                check(path, data, response)
        assert engine.stats().kv_blocks_used == 0 and driver.num_in_flight == 0
    finally:
        driver.stop()


@pytest.fixture(scope="module")
def smollm2_url(smollm2_path: Path) -> Iterator[str]:
    app, _ = native_app(smollm2_path, ctx_size=1024, num_kv_blocks=128, max_num_seqs=4)
    with on_socket(app) as url:
        yield url


def test_langchain_and_the_sdk_on_real_weights(smollm2_url: str) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model="native",
        temperature=0.5,
        base_url=f"{smollm2_url}/v1",
        api_key="EMPTY",
        extra_body={"enable_thinking": True, "return_reasoning": True},
        streaming=True,
        max_tokens=32,
    )
    assert str(model.invoke("你是谁?").content).strip()
    with openai.OpenAI(base_url=f"{smollm2_url}/v1", api_key="EMPTY", max_retries=0) as client:
        question = [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": "What is 2+2?"}]
        stream = client.chat.completions.create(
            model="native", messages=question, temperature=0, max_tokens=24, stream=True
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        whole = client.chat.completions.create(model="native", messages=question, temperature=0, max_tokens=24)
    assert whole.choices[0].message.content == streamed and streamed.strip()
    assert whole.usage.prompt_tokens_details.cached_tokens > 0


def test_json_from_real_weights_is_valid(smollm2_url: str) -> None:
    body = ask(
        "Give me a person as JSON with x and name.",
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}},
    )
    reply = httpx.post(f"{smollm2_url}/v1/chat/completions", json=body, timeout=60).json()
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert set(json.loads(reply["choices"][0]["message"]["content"])) == {"x", "name"}
