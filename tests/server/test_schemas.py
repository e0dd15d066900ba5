"""Which bodies are taken, and which field a refusal names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm.errors import RequestError
from autoglm.server.body import field_path, parse_json, validate
from autoglm.server.prompts import tool_dicts
from autoglm.server.schemas import Body, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": "1"}, "max_tokens: expected an integer, got a string"),
        ({"max_tokens": 5.0}, "max_tokens: expected an integer, got a decimal number"),
        ({"max_tokens": True}, "max_tokens: expected an integer, got a boolean"),
        ({"temperature": [1]}, "temperature: expected a number, got a list"),
        ({"stream": 1}, "stream: expected a boolean, got an integer"),
        ({"model": {"a": 1}}, "model: expected a string, got an object"),
        ({"n": 17}, "n: expected an integer <= 16"),
        ({"messages": [None]}, "messages[0]: expected an object, got null"),
        ({"messages": []}, "messages: expected a list of length >= 1"),
        ({"messages": [MESSAGE] * 4097}, "messages: expected a list of length <= 4096"),
        (
            {"messages": [{"role": "robot"}]},
            "messages[0].role: must be system, developer, user, assistant, tool or function",
        ),
        ({"stop": ["a", 5]}, "stop[1]: expected a string, got an integer"),
        ({"stop": ["a"] * 17}, "stop: expected a list of length <= 16"),
        ({"logit_bias": {"5": None}}, "logit_bias: every bias must be a number from -100 to 100"),
        ({"seed": 1 << 64}, "seed: expected an integer < 18446744073709551616"),
        ({"tools": [{"type": "code", "function": {"name": "a"}}]}, "tools[0].type: must be function"),
        (
            {"tools": [{"type": "function", "function": {"name": "tap\n"}}]},
            "tools[0].function.name: must match [a-zA-Z0-9_.-]{1,64}",
        ),
        ({"tool_choice": 5}, "tool_choice: must be none, auto, required or an object that names a function"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function: is required"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": 1}}]}]},
            "messages[0].tool_calls[0].function.arguments: expected a string or an object, got an integer",
        ),
        ({"return_fusion": 1}, "return_fusion: expected a boolean or a string, got an integer"),
        ({"return_fusion": "yes"}, "return_fusion: must be true, false or gates"),
        ({"functions": 1}, "functions: is not served here: use tools"),
    ],
)
def test_refusals_are_in_our_words(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"n": 0, "temperature": "x"}, "temperature", "invalid_value"),
        ({"top_logprobs": 50, "messages": [{}]}, "messages[0].role", "missing_required_parameter"),
        ({"tool_choice": 5, "stop": 5}, "stop", "invalid_value"),
        ({"messages": [{"name": 5, "role": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"name": 5}]}, "messages[0].role", "missing_required_parameter"),
        ({"tools": [{"function": {}}], "tool_choice": "required"}, "tools[0].type", "missing_required_parameter"),
        ({"stream_options": {}, "response_format": "json"}, "response_format", "invalid_value"),
        ({"temperature": "x", "audio": {}}, "audio", "unsupported_parameter"),
    ],
)
def test_of_two_wrong_fields_the_first_declared_is_named(fields: dict[str, Any], param: str, code: str) -> None:
    for sent in (fields, dict(reversed(fields.items()))):
        with pytest.raises(RequestError) as caught:
            validate(ChatRequest, {"messages": [MESSAGE], **sent})
        assert (caught.value.param, caught.value.code) == (param, code)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["canary", "user", "function"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "function", "name", "role", "content", "tool_calls", "schema", "json_schema", "5"]
            ),
            inner,
        )
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("body", [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest])
@given(data=st.data())
def test_any_json_is_taken_or_refused_by_name(body: type[Body], data: st.DataObject) -> None:
    names = st.sampled_from(body.__struct_fields__)
    fields = data.draw(st.dictionaries(names, JSON_VALUES, max_size=3))
    try:
        assert isinstance(validate(body, {"messages": [MESSAGE], "prompt": "a", "tokens": [], **fields}), body)
    except RequestError as error:
        assert error.param is not None and str(error).startswith(f"{error.param}: ")
        assert not any(word in str(error) for word in ("canary", "`", "Expected", "mappingproxy", "$."))


def test_numbers_keep_their_kind() -> None:
    limit = 10**30
    request = chat(temperature=1, max_tokens=limit, seed=(1 << 64) - 1, logit_bias={"05": 1}, n=None, stop=None)
    assert (request.temperature, type(request.temperature)) == (1.0, float)
    assert (request.max_tokens, request.seed, request.logit_bias) == (limit, (1 << 64) - 1, {5: 1.0})
    assert (request.n, request.stop) == (None, [])


def test_tools_for_the_template_leave_out_what_was_left_out() -> None:
    """But not a null within the schema, which means null there."""
    schema = {"default": None, "maximum": 10**25}
    tool = {"type": "function", "function": {"name": "tap", "parameters": schema}}
    assert tool_dicts(chat(tools=[{**tool, "strict": None}, TOOL | {"function": {"name": "b"}}]).tools) == [
        tool,
        {"type": "function", "function": {"name": "b"}},
    ]


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


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_is_bounded(opening: str, closing: str) -> None:
    for depth, is_taken in ((199, True), (200, False)):  # below the body's own level
        body = f'{{"a": {opening * depth}1{closing * depth}}}'.encode()
        if is_taken:
            assert parse_json(body) == json.loads(body)
        else:
            with pytest.raises(RequestError, match="nested more than 200 levels") as caught:
                parse_json(body)
            assert caught.value.code == "invalid_json"


def test_what_json_says_is_what_is_read() -> None:
    body = b'{"a": 1, "a": 123456789012345678901234567890, "b": 1e2, "c": "\\ud83d\\ude00\\u0000", "d": 0.1}'
    assert parse_json(body) == {"a": 123456789012345678901234567890, "b": 100.0, "c": "\U0001f600\0", "d": 0.1}
    with pytest.raises(RequestError) as caught:
        validate(ChatRequest, parse_json(b'{"messages": [{"role": "user"}], "temperature": 1e999}'))
    assert caught.value.param == "temperature"


def test_field_path() -> None:
    assert field_path(("messages", 0, "content", 1, "text")) == "messages[0].content[1].text"
    assert len(field_path(("x" * 500,))) == 200
