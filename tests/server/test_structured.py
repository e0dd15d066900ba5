"""response_format and tools: what a model that writes noise must still end in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.conftest import ServeFunction, chat_body, client_of, events_of, joined

SCHEMA = {
    "type": "object",
    "properties": {"action": {"enum": ["tap", "type"]}, "x": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["action", "x"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "action", "schema": SCHEMA, "strict": True}}
TOOLS = [
    {"type": "function", "function": {"name": "tap", "description": "tap", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "back"}},
]


def assert_is_action(text: str) -> None:
    value = json.loads(text)
    assert value["action"] in ("tap", "type") and 0 <= value["x"] <= 999 and set(value) == {"action", "x"}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("thinking", [{}, {"enable_thinking": False}, {"enable_thinking": True, "thinking_budget": 8}])
async def test_json_schema_holds_whatever_the_model_wants(
    serve: ServeFunction, seed: int, thinking: dict[str, Any]
) -> None:
    served = serve()  # noise
    body = chat_body(response_format=JSON_SCHEMA, seed=seed, max_tokens=300, **thinking)
    body["temperature"] = 1.0
    async with client_of(served) as client:
        whole = (await client.post("/v1/chat/completions", json=body)).json()
        events = events_of((await client.post("/v1/chat/completions", json={**body, "stream": True})).text)
    choice = whole["choices"][0]
    assert joined(events, "content") == choice["message"]["content"]
    if choice["finish_reason"] == "stop":
        assert_is_action(choice["message"]["content"])
    else:
        assert choice["finish_reason"] == "length"
    if thinking:
        assert choice["finish_reason"] == "stop"
    served.assert_idle()


async def test_json_object_is_an_object(serve: ServeFunction) -> None:
    served = serve('{"a": [1, 2], "b": "你好"}')
    async with client_of(served) as client:
        body = chat_body(response_format={"type": "json_object"}, enable_thinking=False)
        content = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]["content"]
    assert json.loads(content) == {"a": [1, 2], "b": "你好"}


async def test_json_comes_after_the_thought_and_the_thought_does_not_stand_in_it(serve: ServeFunction) -> None:
    served = serve('<think>the user taps</think>{"action":"tap","x":5}')
    async with client_of(served) as client:
        message = (await client.post("/v1/chat/completions", json=chat_body(response_format=JSON_SCHEMA))).json()[
            "choices"
        ][0]["message"]
    assert_is_action(message["content"])
    assert message["reasoning_content"] == "the user taps"


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "strin"}, "type"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"$ref": "http://127.0.0.1/x"}, "http"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ({"type": "object", "properties": {"a": {"enum": ["x" * 70000]}}}, "larger"),
    ],
)
async def test_a_schema_that_cannot_be_used_is_a_400_with_the_reason(
    serve: ServeFunction, schema: dict[str, Any], word: str
) -> None:
    served = serve()
    body = chat_body(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    async with client_of(served) as client:
        response = await client.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "response_format.json_schema.schema"
    assert word in error["message"] and len(error["message"]) < 500


async def test_stop_strings_do_not_go_with_json(serve: ServeFunction) -> None:
    async with client_of(serve()) as client:
        response = await client.post("/v1/chat/completions", json=chat_body(response_format=JSON_SCHEMA, stop=["}"]))
    assert response.status_code == 400 and response.json()["error"]["param"] == "stop"


async def call_tools(serve: ServeFunction, reply: str = "", **fields: Any) -> dict[str, Any]:
    """A request with TOOLS, whole and streamed; both must give the same calls."""
    served = serve(reply)
    body = chat_body(tools=TOOLS, max_tokens=400, enable_thinking=False, **fields)
    async with client_of(served) as client:
        whole = (await client.post("/v1/chat/completions", json=body)).json()
        events = events_of((await client.post("/v1/chat/completions", json={**body, "stream": True})).text)
    choice: dict[str, Any] = whole["choices"][0]
    calls: dict[int, dict[str, str]] = {}
    for event in events[:-1]:
        for delta in (c["delta"] for c in event["choices"]):
            for part in delta.get("tool_calls", ()):
                call = calls.setdefault(part["index"], {"name": "", "arguments": ""})
                call["name"] += part["function"].get("name", "")
                call["arguments"] += part["function"]["arguments"]
                if part["function"].get("name"):
                    assert part["id"] and part["type"] == "function"
    assert list(calls.values()) == [call["function"] for call in choice["message"].get("tool_calls", ())]
    assert events[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]
    served.assert_idle()
    return choice


@pytest.mark.parametrize("seed", range(4))
async def test_required_tools_are_called_by_a_model_that_writes_noise(serve: ServeFunction, seed: int) -> None:
    choice = await call_tools(serve, tool_choice="required", parallel_tool_calls=False, seed=seed)
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["type"] == "function" and call["id"]
    if call["function"]["name"] == "tap":
        assert_is_action(call["function"]["arguments"])
    else:
        assert json.loads(call["function"]["arguments"]) == {}


async def test_a_named_tool_is_the_one_called(serve: ServeFunction) -> None:
    choice = await call_tools(serve, tool_choice={"type": "function", "function": {"name": "tap"}})
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "tap"
    assert_is_action(call["function"]["arguments"])


async def test_auto_parses_the_models_own_calls(serve: ServeFunction) -> None:
    reply = (
        'first\n<tool_call>\n{"name": "tap", "arguments": {"action": "tap", "x": 7}}\n</tool_call>\n'
        '<tool_call>\n{"name": "back", "arguments": {}}\n</tool_call>'
    )
    choice = await call_tools(serve, reply)
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["tap", "back"]
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"action": "tap", "x": 7}
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"].strip() == "first"


async def test_auto_without_a_call_is_an_ordinary_answer(serve: ServeFunction) -> None:
    choice = await call_tools(serve, "open the settings page")
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == "open the settings page"
    assert "tool_calls" not in choice["message"]


async def test_tool_choice_none_leaves_the_text_alone(serve: ServeFunction) -> None:
    reply = '<tool_call>\n{"name": "back", "arguments": {}}\n</tool_call>'
    choice = await call_tools(serve, reply, tool_choice="none")
    assert choice["message"]["content"] == reply and choice["finish_reason"] == "stop"


async def test_tools_and_a_response_format_allow_either(serve: ServeFunction) -> None:
    called = await call_tools(
        serve, '<tool_call>\n{"name": "back", "arguments": {}}\n</tool_call>', response_format=JSON_SCHEMA
    )
    assert called["message"]["tool_calls"][0]["function"]["name"] == "back"
    answered = await call_tools(serve, '{"action":"tap","x":5}', response_format=JSON_SCHEMA)
    assert_is_action(answered["message"]["content"])


async def test_a_tool_with_a_broken_schema_is_named(serve: ServeFunction) -> None:
    tools = [TOOLS[0], {"type": "function", "function": {"name": "b", "parameters": {"type": "strin"}}}]
    async with client_of(serve()) as client:
        response = await client.post("/v1/chat/completions", json=chat_body(tools=tools, tool_choice="required"))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools[1].function.parameters"


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_tags_inside_json_are_text(piece: int) -> None:
    from autoglm.server.chat import _JsonStart

    answer = '{"a":"<think>x</think><answer>"}'
    for thought in ("", "<think>hm</think>", " \n<think>hm</think>"):
        start, parsed, raw = _JsonStart(starts_in_thought=False), "", ""
        text = thought + answer
        for i in range(0, len(text), piece):
            before, after = start.split(text[i : i + piece])
            parsed, raw = parsed + before, raw + after
        assert (parsed, raw) == (thought, answer)
    start, parsed, raw = _JsonStart(starts_in_thought=True), "", ""
    for i in range(0, len("hm</think>" + answer), piece):
        before, after = start.split(("hm</think>" + answer)[i : i + piece])
        parsed, raw = parsed + before, raw + after
    assert (parsed, raw) == ("hm</think>", answer)
