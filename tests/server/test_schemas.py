"""Which bodies are taken, and which field a refusal names."""

from __future__ import annotations

from typing import Any

import pytest

from autoglm.errors import RequestError
from autoglm.server.body import field_path, parse_json, validate
from autoglm.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

MESSAGE = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "tap", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> ChatRequest:
    return validate(ChatRequest, {"messages": [MESSAGE], **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1, "top_p": 0.5, "user": "x", "metadata": {"a": 1}, "something_new": [1]},
        {"stop": None},
        {"stop": ""},
        {"stop": ["a"] * 16},
        {"n": 16},
        {"logit_bias": {"5": -100, "6": 1.5}},
        {"logprobs": True, "top_logprobs": 20},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "tap"}}},
        {"tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": True}}},
        {"functions": None, "audio": None},
        {"modalities": ["text"]},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"seed": -(1 << 63)},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}, MESSAGE]},
    ],
)
def test_good_bodies_are_taken(fields: dict[str, Any]) -> None:
    chat(**fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [MESSAGE, {"role": "robot", "content": ""}]}, "messages[1].role"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [7]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "a", "name": 5}]}, "messages[0].name"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages[0].tool_calls[0].function.name",
        ),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a" * 1025]}, "stop[0]"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "code"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "swipe"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": "json"}, "response_format"),
        ({"functions": [{}]}, "functions"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"guided_json": {}}, "guided_json"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"repetition_penalty": 1.1, "repeat_penalty": 1.2}, "repeat_penalty"),
        ({"seed": 1 << 64}, "seed"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert str(caught.value).startswith(param)


def test_refusals_do_not_quote_the_value() -> None:
    with pytest.raises(RequestError) as caught:
        chat(messages=[{"role": "secret-canary", "content": "secret-canary"}])
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("text", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1], [2, 3]], 2), ("", 1)],
)
def test_all_forms_of_a_prompt(prompt: Any, num_prompts: int) -> None:
    assert len(validate(CompletionRequest, {"prompt": prompt}).prompt) == num_prompts


@pytest.mark.parametrize(
    "prompt", [None, 5, [], ["a", 1], [1, "a"], [[1], "a"], [-1], [1.5], [True], {"a": 1}, ["a"] * 65]
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        validate(CompletionRequest, {"prompt": prompt})
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_completion_fields(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        validate(CompletionRequest, {"prompt": "a", **fields})
    assert caught.value.param == param


def test_tokenize_takes_one_text() -> None:
    assert validate(TokenizeRequest, {"content": ""}).content == ""
    with pytest.raises(RequestError):
        validate(TokenizeRequest, {"content": "a", "prompt": "b"})
    with pytest.raises(RequestError):
        validate(DetokenizeRequest, {"tokens": [1, -1]})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"[" * 300 + b"]" * 300,
        b'{"a":' * 300 + b"1" + b"}" * 300,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1} x',
    ],
)
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_json(body)
    assert caught.value.status == 400


def test_field_path() -> None:
    assert field_path(("messages", 0, "content", 1, "text")) == "messages[0].content[1].text"
    assert len(field_path(("x" * 500,))) == 200
