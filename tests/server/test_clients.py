"""Real clients over a real socket: the openai SDK, sync and async, and LangChain."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from tests.server.conftest import MODEL_ID, ServedModel, ServeFunction, on_socket

THOUGHTFUL = "<think>我在想</think><answer>打开微信</answer>"
MESSAGES = [{"role": "user", "content": "你是谁?"}]
SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["x"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "tap", "parameters": SCHEMA}}]


@pytest.fixture
def live(serve: ServeFunction) -> Iterator[tuple[ServedModel, str]]:
    served = serve(THOUGHTFUL, start=False)
    with on_socket(served.app) as url:
        yield served, f"{url}/v1"


@pytest.fixture
def client(live: tuple[ServedModel, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live[1], api_key="EMPTY", max_retries=0) as client:
        yield client


def test_openai_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL_ID, messages=MESSAGES, temperature=0, extra_body={"return_reasoning": True}
    )
    assert reply.choices[0].message.content == "打开微信"
    assert reply.choices[0].message.reasoning_content == "我在想"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0
    assert reply.usage.prompt_tokens_details.cached_tokens == 0
    assert client.models.list().data[0].id == MODEL_ID
    assert client.models.retrieve(MODEL_ID).id == MODEL_ID


def test_openai_stream_as_open_autoglm_sends_it(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL_ID,
        messages=MESSAGES,
        max_tokens=3000,
        temperature=0.0,
        top_p=0.85,
        frequency_penalty=0.2,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == THOUGHTFUL


def test_openai_stream_with_usage_and_logprobs(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL_ID,
            messages=MESSAGES,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=2,
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    tokens = [t for c in chunks for choice in c.choices if choice.logprobs for t in choice.logprobs.content]
    assert len(tokens) == chunks[-1].usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in tokens)


def test_openai_n_stop_and_seed(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL_ID,
        messages=MESSAGES,
        temperature=0,
        n=3,
        stop=["微"],
        seed=1,
        extra_body={"enable_thinking": False},
    )
    assert [choice.message.content for choice in reply.choices] == ["打开"] * 3


def test_openai_structured_output_and_tools(live: tuple[ServedModel, str], client: openai.OpenAI) -> None:
    live[0].runner.set_reply("")
    reply = client.chat.completions.create(
        model=MODEL_ID,
        messages=MESSAGES,
        extra_body={"enable_thinking": False},
        response_format={"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}},
    )
    assert 0 <= json.loads(reply.choices[0].message.content)["x"] <= 9
    reply = client.chat.completions.create(
        model=MODEL_ID, messages=MESSAGES, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )
    [call] = reply.choices[0].message.tool_calls
    assert reply.choices[0].finish_reason == "tool_calls" and call.function.name == "tap"
    assert 0 <= json.loads(call.function.arguments)["x"] <= 9
    with client.chat.completions.stream(
        model=MODEL_ID, messages=MESSAGES, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "tap"}}
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "tap"


def test_openai_parses_into_a_pydantic_model(live: tuple[ServedModel, str], client: openai.OpenAI) -> None:
    from pydantic import BaseModel

    class Point(BaseModel):
        x: int
        label: str | None

    live[0].runner.set_reply('{"x": 3, "label": null}')
    reply = client.chat.completions.parse(
        model=MODEL_ID, messages=MESSAGES, temperature=0, response_format=Point, extra_body={"enable_thinking": False}
    )
    assert reply.choices[0].message.parsed == Point(x=3, label=None)


def test_openai_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL_ID, prompt=["a", "b"], max_tokens=3, logprobs=1, extra_body={"ignore_eos": True}
    )
    assert len(reply.choices) == 2 and reply.usage.completion_tokens == 6
    streamed = list(client.completions.create(model=MODEL_ID, prompt="a", max_tokens=3, stream=True))
    assert streamed[-1].choices[0].finish_reason in ("length", "stop")


def test_openai_errors_are_its_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, temperature=3)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=MODEL_ID, messages=[{"role": "user", "content": "a b " * 5000}])
    assert long.value.code == "context_length_exceeded"


async def test_openai_async_many_at_once(live: tuple[ServedModel, str]) -> None:
    import asyncio

    async with openai.AsyncOpenAI(base_url=live[1], api_key="EMPTY", max_retries=0) as client:

        async def ask(i: int) -> str:
            stream = await client.chat.completions.create(
                model=MODEL_ID, messages=[{"role": "user", "content": f"{i}: 你是谁?"}], temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert await asyncio.gather(*(ask(i) for i in range(24))) == [THOUGHTFUL] * 24
    live[0].assert_idle()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_langchain_as_the_issue_writes_it(live: tuple[ServedModel, str]) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model=MODEL_ID,
        temperature=0.5,
        base_url=live[1],
        api_key="EMPTY",
        extra_body={"enable_thinking": True, "return_reasoning": True},
        streaming=True,
    )
    assert model.invoke("你是谁?").content == "打开微信"
    assert "".join(str(chunk.content) for chunk in model.stream("你是谁?")) == "打开微信"


def test_langchain_without_flags_gets_the_whole_text(live: tuple[ServedModel, str]) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=MODEL_ID, temperature=0, base_url=live[1], api_key="EMPTY")
    reply = model.invoke("你是谁?")
    assert reply.content == THOUGHTFUL and reply.usage_metadata["output_tokens"] > 0
