"""Every spelling of the thinking dial, and the contradictions between them."""

from __future__ import annotations

from typing import Any

import pytest

from autoglm.errors import RequestError
from autoglm.server.thinking import ThinkingSetting, read_thinking

OFF = [
    {"enable_thinking": False},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"extra_body": {"enable_thinking": False}},
    {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
    {"reasoning_effort": "none"},
    {"reasoning": {"effort": "none"}},
    {"thinking": {"type": "disabled"}},
    {"thinking": {"type": "disabled", "budget_tokens": 100}},
    {"thinking": False},
    {"thinking_budget": 0},
    {"enable_thinking": False, "reasoning_effort": "none", "thinking": {"type": "disabled"}},
]
ON = [
    {"enable_thinking": True},
    {"chat_template_kwargs": {"enable_thinking": True}},
    {"extra_body": {"enable_thinking": True}},
    {"reasoning_effort": "high"},
    {"reasoning_effort": "minimal"},
    {"thinking": {"type": "enabled"}},
]


@pytest.mark.parametrize("fields", OFF)
def test_every_spelling_of_off(fields: dict[str, Any]) -> None:
    setting = read_thinking(fields)
    assert setting.enabled is False
    assert setting.budget is None


@pytest.mark.parametrize("fields", ON)
def test_every_spelling_of_on(fields: dict[str, Any]) -> None:
    assert read_thinking(fields).enabled is True


@pytest.mark.parametrize("fields", [{}, {"thinking": {"type": "auto"}}, {"enable_thinking": None}, {"extra_body": {}}])
def test_absent_leaves_it_to_the_model(fields: dict[str, Any]) -> None:
    assert read_thinking(fields) == ThinkingSetting(enabled=None, budget=None, mode="inline")


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking_budget": 64},
        {"thinking": {"type": "enabled", "budget_tokens": 64}},
        {"thinking": {"budget_tokens": 64}},
        {"chat_template_kwargs": {"thinking_budget": 64}},
        {"extra_body": {"thinking_budget": 64}, "thinking_budget": 64},
    ],
)
def test_every_spelling_of_a_budget(fields: dict[str, Any]) -> None:
    assert read_thinking(fields).budget == 64


def test_budget_of_minus_one_is_no_limit() -> None:
    assert read_thinking({"thinking_budget": -1}) == ThinkingSetting(enabled=None, budget=None, mode="inline")


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, "inline"),
        ({"return_reasoning": True}, "split"),
        ({"return_reasoning": False}, "drop"),
        ({"extra_body": {"return_reasoning": True}}, "split"),
        ({"include_reasoning": False}, "drop"),
    ],
)
def test_where_the_thought_goes(fields: dict[str, Any], mode: str) -> None:
    assert read_thinking(fields).mode == mode


@pytest.mark.parametrize(
    ("fields", "first", "second"),
    [
        ({"enable_thinking": True, "reasoning_effort": "none"}, "enable_thinking", "reasoning_effort"),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            "enable_thinking",
            "chat_template_kwargs.enable_thinking",
        ),
        ({"enable_thinking": False, "extra_body": {"thinking": {"type": "enabled"}}}, "enable_thinking", "extra_body."),
        ({"thinking_budget": 5, "thinking": {"budget_tokens": 6}}, "thinking_budget", "thinking.budget_tokens"),
        ({"enable_thinking": True, "thinking_budget": 0}, "enable_thinking", "thinking_budget"),
        ({"return_reasoning": True, "include_reasoning": False}, "return_reasoning", "include_reasoning"),
    ],
)
def test_contradicting_spellings_are_both_named(fields: dict[str, Any], first: str, second: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_thinking(fields)
    assert first in str(caught.value) and second in str(caught.value)
    assert caught.value.code == "conflicting_values"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"enable_thinking": "yes"}, "enable_thinking"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"thinking": "on"}, "thinking"),
        ({"thinking_budget": -2}, "thinking_budget"),
        ({"thinking_budget": True}, "thinking_budget"),
        ({"thinking": {"budget_tokens": 1.5}}, "thinking.budget_tokens"),
    ],
)
def test_wrong_values_name_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_thinking(fields)
    assert caught.value.param == param
