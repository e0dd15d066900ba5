"""Thoughts, answers and tool calls are told apart the same way however the text is cut into pieces."""

from __future__ import annotations

import json
import random
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm.chat.output_parser import Delta, OutputParser

Mode = Literal["inline", "split", "drop"]
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>")


def parse(pieces: list[str], mode: Mode, finish_reason: str = "stop", **options: Any) -> list[Delta]:
    parser = OutputParser(mode, **options)
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return deltas + parser.finish(finish_reason)


def summary(deltas: list[Delta]) -> tuple[str, str, list[tuple[int | None, str | None, Any]]]:
    """(content, reasoning, calls) of a whole answer."""
    content = "".join(delta.text for delta in deltas if delta.kind == "content")
    reasoning = "".join(delta.text for delta in deltas if delta.kind == "reasoning")
    calls = [
        (delta.tool_index, delta.tool_name, json.loads(delta.tool_arguments or ""))
        for delta in deltas
        if delta.kind == "tool_call"
    ]
    return content, reasoning, calls


NO_TAGS = "a < b <thin> </thinks> <answe"
ANSWERS: list[tuple[str, dict[Mode, tuple[str, str]]]] = [
    ("plain text", {"inline": ("plain text", ""), "split": ("plain text", ""), "drop": ("plain text", "")}),
    (
        "<think>why</think><answer>do(a)</answer>",
        {
            "inline": ("<think>why</think><answer>do(a)</answer>", ""),
            "split": ("do(a)", "why"),
            "drop": ("do(a)", ""),
        },
    ),
    (
        "<think>\nline 1\n\nline 2\n</think>\n\n<answer>\ndo(a)\n</answer>",
        {"split": ("do(a)", "line 1\n\nline 2"), "drop": ("do(a)", "")},
    ),
    (
        '<think>why</think>\n<answer>do(action="Back")</answer>',
        {"inline": ('<think>why</think>\n<answer>do(action="Back")', ""), "split": ('do(action="Back")', "why")},
    ),
    (
        '<answer>finish(message="</answer>")</answer>',
        {"inline": ('<answer>finish(message="</answer>")', "")},
    ),
    (
        '<answer>do(action="Back")</answer> done',
        {"inline": ('<answer>do(action="Back")</answer> done', "")},
    ),
    (
        '<answer>do(action="Type", text="a</answer>',
        {"inline": ('<answer>do(action="Type", text="a</answer>', "")},
    ),
    ("<think></think>x", {"split": ("x", ""), "drop": ("x", "")}),
    (NO_TAGS, {"split": (NO_TAGS, ""), "inline": (NO_TAGS, "")}),
    ("<think>1 < 2 </ think></think>ok", {"split": ("ok", "1 < 2 </ think>")}),
    ("<think>a</think>b<think>c</think>d", {"split": ("bd", "ac"), "drop": ("bd", "")}),
    ("x</think>y", {"split": ("xy", "")}),
    ("  spaced  out  ", {"split": ("  spaced  out  ", ""), "inline": ("  spaced  out  ", "")}),
]  # fmt: skip
CASES = [(text, mode, expected) for text, modes in ANSWERS for mode, expected in modes.items()]


@pytest.mark.parametrize("text, mode, expected", CASES)
def test_where_each_part_goes(text: str, mode: Mode, expected: tuple[str, str]) -> None:
    assert summary(parse([text], mode))[:2] == expected
    assert summary(parse(list(text), mode))[:2] == expected


@pytest.mark.parametrize("text, mode, expected", CASES)
def test_any_cut_gives_the_same(text: str, mode: Mode, expected: tuple[str, str]) -> None:
    generator = random.Random(5)
    for _ in range(50):
        cuts = sorted(generator.choices(range(len(text) + 1), k=generator.randint(0, 8)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        for tools in (False, True):
            assert summary(parse(pieces, mode, tools=tools))[:2] == expected


PARTS = [*TAGS, "a", " ", "\n", "<", "</", "think>", '{"name": "f"}', "{", "}"]


@settings(max_examples=500, deadline=None)
@given(
    parts=st.lists(st.sampled_from(PARTS), max_size=20),
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(["inline", "split", "drop"]),
    tools=st.booleans(),
    starts_in_thought=st.booleans(),
    thinking_off=st.booleans(),
    finish_reason=st.sampled_from(["stop", "length"]),
)  # fmt: skip
def test_streamed_equals_whole_for_any_text(
    parts: list[str],
    seed: int,
    mode: Mode,
    tools: bool,
    starts_in_thought: bool,
    thinking_off: bool,
    finish_reason: str,
) -> None:
    text = "".join(parts)
    options = {"tools": tools, "starts_in_thought": starts_in_thought, "thinking_off": thinking_off}
    generator = random.Random(seed)
    cuts = sorted(generator.choices(range(len(text) + 1), k=6))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse([text], mode, finish_reason, **options)
    streamed = parse(pieces, mode, finish_reason, **options)
    assert summary(streamed) == summary(whole)
    if mode == "inline" and not any(delta.kind == "tool_call" for delta in whole):
        if not tools:
            assert summary(whole)[0] == text
    if mode != "split":
        assert not summary(whole)[1]


def test_pieces_are_given_out_as_soon_as_they_are_certain() -> None:
    parser = OutputParser("split")
    assert parser.push("<think>") == []
    assert parser.push("one") == [Delta("reasoning", "one")]
    assert parser.push(" two <") == [Delta("reasoning", " two")]
    assert parser.push("/thi") == []
    assert parser.push("nk>\n\nans") == [Delta("content", "ans")]
    assert parser.push("wer</answer>") == [Delta("content", "wer")]
    assert parser.finish() == []


def test_a_prompt_that_ends_in_an_open_thought() -> None:
    assert summary(parse(["\nhm</think>\nyes"], "split", starts_in_thought=True))[:2] == ("yes", "hm")
    assert summary(parse(["\nhm</think>\nyes"], "drop", starts_in_thought=True))[:2] == ("yes", "")
    assert summary(parse(["\nhm</think>\nyes"], "inline", starts_in_thought=True))[:2] == ("\nhm</think>\nyes", "")


def test_with_thinking_off_nothing_is_a_thought() -> None:
    assert summary(parse(["<think>x</think>do(a)</answer>"], "split", thinking_off=True))[:2] == ("xdo(a)", "")


# --- never an empty answer because the text landed in the other field -----------------------------------------------


@pytest.mark.parametrize("mode", ["split", "drop"])
@pytest.mark.parametrize(
    "text, content",
    [
        ("<think>do(a)", "do(a)"),
        ("<think>do(a)</think>", "do(a)"),
        ("<think>do(a)</think>\n\n", "do(a)"),
        ("<think>so: <answer>do(a)</answer>", "do(a)"),
        ("<think>write <answer>x</answer>, so <answer>do(b)", "do(b)"),
    ],
)
def test_an_answer_left_in_the_thought_is_given_as_content(mode: Mode, text: str, content: str) -> None:
    assert summary(parse([text], mode))[0] == content
    assert summary(parse(list(text), mode))[0] == content


@pytest.mark.parametrize("text", ["<think>half a thou", "<think>whole</think>"])
def test_a_thought_cut_off_by_max_tokens_stays_a_thought(text: str) -> None:
    content, reasoning, _ = summary(parse([text], "split", "length"))
    assert content == "" and reasoning == text.removeprefix("<think>").removesuffix("</think>")
    assert summary(parse([text], "drop", "length"))[:2] == ("", "")


def test_an_empty_answer_is_empty() -> None:
    for mode in ("inline", "split", "drop"):
        assert parse([], mode) == [] and parse([""], mode) == []


# --- tools -----------------------------------------------------------------------------------------------------------

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京", "days": 2}}\n</tool_call>'
EXPECTED = (0, "weather", {"city": "北京", "days": 2})


@pytest.mark.parametrize("mode", ["inline", "split", "drop"])
@pytest.mark.parametrize(
    "text",
    [
        CALL,
        '<tool_call>{"name": "weather", "parameters": {"city": "北京", "days": 2}}</tool_call>',
        '<tool_call>[{"name": "weather", "arguments": {"city": "北京", "days": 2}}]</tool_call>',
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"北京\\", \\"days\\": 2}"}</tool_call>',
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>北京</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        CALL.removesuffix("\n</tool_call>"),  # the closing tag may be the stop token
        '{"name": "weather", "parameters": {"city": "北京", "days": 2}}',
        ' \n{ "name" : "weather", "arguments": {"city": "北京", "days": 2}}',
    ],
)
def test_every_spelling_of_a_call(mode: Mode, text: str) -> None:
    for pieces in ([text], list(text)):
        content, reasoning, calls = summary(parse(pieces, mode, tools=True))
        assert calls == [EXPECTED] and content.strip() == "" and reasoning == ""


def test_calls_after_thought_and_text() -> None:
    text = f"<think>I look</think>\nOne moment.\n{CALL}\n{CALL}"
    for pieces in ([text], list(text)):
        content, reasoning, calls = summary(parse(pieces, "split", tools=True))
        assert (content, reasoning) == ("One moment.", "I look")
        assert calls == [EXPECTED, (1, *EXPECTED[1:])]
        assert summary(parse(pieces, "inline", tools=True))[0] == "<think>I look</think>\nOne moment."


def test_a_bare_call_after_a_thought() -> None:
    bare = '{"name": "weather", "arguments": {}}'
    for mode in ("inline", "split", "drop"):
        assert summary(parse([f"<think>x</think>\n{bare}"], mode, tools=True))[2] == [(0, "weather", {})]


def test_a_call_inside_a_thought_is_not_made() -> None:
    assert summary(parse([f"<think>maybe {CALL}</think>no"], "split", tools=True)) == ("no", f"maybe {CALL}", [])


def test_ids_are_unique_and_of_openais_form() -> None:
    deltas = parse([CALL + CALL], "split", tools=True)
    ids = [delta.tool_id or "" for delta in deltas]
    assert len(set(ids)) == 2 and all(call_id.startswith("call_") for call_id in ids)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{not json</tool_call>",
        "<tool_call>two words</tool_call>",
        '<tool_call>{"name": 5}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "not json"}</tool_call>',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        "<tool_call>",
        '{"name": "Ada", "age": ',
        '{"names": ["f"]}',
        '{"city": 1}',
        "{",
    ],
)
def test_what_is_no_call_stays_content(text: str) -> None:
    for mode in ("inline", "split"):
        for pieces in ([text], [text[i : i + 7] for i in range(0, len(text), 7)]):
            assert summary(parse(pieces, mode, tools=True)) == (text, "", [])


def test_glm_arguments_of_a_hostile_length_are_read_in_time() -> None:
    """One expression for all pairs would need exponential time to find that the last one is broken."""
    pairs = "<arg_key>k</arg_key><arg_value>v</arg_value>" * 5_000
    text = f"<tool_call>f{pairs}x</tool_call>"
    assert summary(parse([text], "split", tools=True)) == (text, "", [])


def test_without_tools_a_call_is_text() -> None:
    assert summary(parse([CALL], "split")) == (CALL, "", [])
