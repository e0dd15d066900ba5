"""Grammars walked at random: whatever they allow is JSON the schema takes, and a bad schema is the client's 400."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from autoglm.chat.constraint import GrammarConstraint
from autoglm.chat.grammar import GrammarFactory
from autoglm.chat.output_parser import OutputParser
from autoglm.errors import RequestError

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 999}, "kind": {"enum": ["tap", "type"]}},
    "required": ["x", "kind"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "tap.it", "parameters": POINT}},
    {
        "type": "function",
        "function": {
            "name": "say",
            "parameters": {
                "type": "object",
                "properties": {"q": {"$ref": "#/$defs/Q"}},
                "$defs": {"Q": {"enum": ["}", "%json {", '\n"x']}},
                "required": ["q"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "back"}},
]


@dataclass
class Vocabulary:
    """Bytes, a few words, and two end tokens, one of which has visible text as GLM's </answer> has."""

    words: list[bytes] = field(default_factory=lambda: [b'{"', b'":', b'"x', b"tap", b" \n", "你".encode()])
    vocab_size: int = 300
    eos_token_ids: frozenset[int] = frozenset({298, 299})

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        if token_id < 256 + len(self.words):
            return self.words[token_id - 256]
        return b"</answer>" if token_id == 298 else b""

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        return list(text.encode())


def factory(vocabulary: Vocabulary | None = None) -> GrammarFactory:
    return GrammarFactory(vocabulary or Vocabulary())  # type: ignore[arg-type]


def walk(constraint: GrammarConstraint, seed: int, limit: int = 2000) -> str | None:
    """A random text the grammar allows; None if it did not end within limit tokens."""
    vocabulary, rng, text = Vocabulary(), np.random.default_rng(seed), b""
    for _ in range(limit):
        if constraint.is_stopped():
            return text.decode()
        bits = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits)
        assert allowed.size and allowed.max() < vocabulary.vocab_size
        token_id = int(rng.choice(allowed))
        if token_id in vocabulary.eos_token_ids:
            assert constraint.is_accepting()
            return text.decode()
        constraint.accept(token_id)
        text += vocabulary.token_bytes(token_id)
    return None


def test_random_walks_end_in_json_of_the_schema() -> None:
    grammars = factory()
    for seed in range(20):
        text = walk(grammars.json_schema(POINT), seed)
        assert text is not None
        value = json.loads(text)
        assert 0 <= value["x"] <= 999 and value["kind"] in ("tap", "type") and set(value) == {"x", "kind"}


def test_json_object_is_an_object_and_nothing_else() -> None:
    ended = [text for seed in range(10) if (text := walk(factory().json_object(), seed)) is not None]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)


def test_an_end_token_comes_only_when_the_text_is_complete() -> None:
    constraint = factory().json_schema({"type": "integer"})
    for digit in "42":
        constraint.accept(ord(digit))
    mask = constraint.allowed()
    assert all(mask[i // 32] >> (i % 32) & 1 for i in Vocabulary().eos_token_ids)
    constraint.accept(299)
    assert constraint.is_stopped()


@pytest.mark.parametrize("parallel", [True, False])
def test_tool_calls_are_read_back_by_the_output_parser(parallel: bool) -> None:
    grammars, names, most = factory(), set(), 0
    for seed in range(30):
        text = walk(grammars.tools(TOOLS, "required", parallel=parallel), seed)
        assert text is not None
        parser = OutputParser("inline", tools=True)
        deltas = [*parser.push(text), *parser.finish()]
        calls = [delta for delta in deltas if delta.kind == "tool_call"]
        assert calls and not "".join(delta.text for delta in deltas).strip()
        most = max(most, len(calls))
        for call in calls:
            arguments = json.loads(call.tool_arguments or "")
            names.add(call.tool_name)
            if call.tool_name == "say":
                assert arguments["q"] in ("}", "%json {", '\n"x')
            elif call.tool_name == "tap.it":
                assert 0 <= arguments["x"] <= 999
            else:
                assert arguments == {}
    assert names == {"tap.it", "say", "back"}
    assert most > 1 if parallel else most == 1


def test_a_named_tool_is_called_once() -> None:
    text = walk(factory().tools(TOOLS, "back"), 1)
    assert text is not None and text.count("<tool_call>") == 1 and '"back"' in text
    with pytest.raises(RequestError):
        factory().tools(TOOLS, "swipe")


def test_a_call_or_an_answer() -> None:
    texts = {walk(factory().tools(TOOLS, "required", answer_schema={"enum": ["no"]}), seed) for seed in range(20)}
    assert '"no"' in texts and any(text and "<tool_call>" in text for text in texts)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "strin"}, "Invalid type"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"type": "string", "pattern": "^(?=a)b"}, "look-ahead"),
        ({"$ref": "#"}, "cannot be used"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"$ref": "http://127.0.0.1/x"}, "does not fetch"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "Unsatisfiable"),
        ({"enum": [str(i) * 10 for i in range(20_000)]}, "larger"),
        ({"type": "number", "maximum": float("inf")}, "number"),
        (False, "cannot be used"),
    ],
)
def test_a_schema_that_cannot_be_used_is_the_clients_fault(schema: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        factory().json_schema(schema, param="here")
    assert caught.value.param == "here" and len(str(caught.value)) < 450


def test_deep_schemas_neither_crash_nor_pass() -> None:
    deep: dict[str, Any] = {"type": "string"}
    for depth in range(1, 5001):
        deep = {"type": "array", "items": deep}
        if depth == 60:
            assert factory().json_schema(deep).allowed().any()
        if depth in (190, 5000):  # the first is about what the body's parser lets through
            with pytest.raises(RequestError):
                factory().json_schema(deep)


def test_the_culprit_among_the_tools_is_named() -> None:
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"type": "strin"}}}
    with pytest.raises(RequestError) as caught:
        factory().tools([*TOOLS, bad], "required")
    assert caught.value.param == "tools[3].function.parameters"


def test_sequences_of_one_grammar_do_not_disturb_each_other() -> None:
    grammars = factory()
    alone = [walk(grammars.json_schema(POINT), seed) for seed in range(3)]
    first, second = grammars.json_schema(POINT), grammars.json_schema(POINT)
    first.accept(ord("{"))
    assert not np.array_equal(first.allowed(), second.allowed())
    assert alone == [walk(grammars.json_schema(POINT), seed) for seed in range(3)]


def test_many_schemas_do_not_pile_up() -> None:
    grammars = factory()
    for i in range(200):
        grammars.json_schema({"const": i})
    assert len(grammars._compiled) <= 64
