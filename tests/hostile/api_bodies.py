"""Generated request bodies: valid ones, taken apart and put together wrongly, from a seeded generator."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

PATHS = (
    ("/v1/chat/completions", 14),
    ("/v1/completions", 3),
    ("/tokenize", 2),
    ("/detokenize", 1),
)

_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "s": {"type": "string", "pattern": "^a{1,3}$"}},
    "required": ["x"],
    "additionalProperties": False,
}
_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "tap", "description": "d", "parameters": _SCHEMA}}

_CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    {
        "model": "tiny-glm4",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "你是谁?"}]},
            {"role": "assistant", "content": "<think>a</think><answer>b</answer>", "reasoning_content": "r"},
            {"role": "user", "content": "go on"},
        ],
        "max_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.01,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.1,
        "repetition_penalty": 1.1,
        "seed": 5,
        "stop": ["x", "yy"],
        "logit_bias": {"5": -100, "7": 3},
        "n": 2,
        "user": "u",
    },
    {
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
        "enable_thinking": True,
        "thinking_budget": 2,
        "return_reasoning": True,
    },
    {
        "messages": [
            {"role": "user", "content": "tap"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "tap", "arguments": '{"x":1}'}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "ok"},
        ],
        "tools": [_TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 12,
    },
    {
        "messages": [{"role": "user", "content": "json"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA, "strict": True}},
        "max_tokens": 12,
        "reasoning_effort": "none",
    },
    {
        "messages": [{"role": "user", "content": "json"}],
        "response_format": {"type": "json_object"},
        "chat_template_kwargs": {"enable_thinking": False, "custom": [1]},
        "extra_body": {"return_reasoning": False},
        "thinking": {"type": "disabled", "budget_tokens": 5},
        "max_tokens": 8,
        "stop_token_ids": [3],
        "ignore_eos": False,
        "cache_salt": "s",
    },
]
_COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "the phone", "max_tokens": 3, "logprobs": 2},
    {"prompt": ["a", "b"], "max_tokens": 2, "n": 2, "echo": True, "stop": "x"},
    {"prompt": [5, 6, 7], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
    {"prompt": [[5], [6, 7]], "max_tokens": 0, "best_of": 1},
]
_TOKENIZE: list[dict[str, Any]] = [
    {"content": "hello", "add_special": True, "parse_special": False, "with_pieces": True},
    {"prompt": "hello", "return_token_strs": True, "add_special_tokens": False},
    {"messages": [{"role": "user", "content": "hi"}], "tools": [_TOOL]},
]
_DETOKENIZE: list[dict[str, Any]] = [{"tokens": [1, 2, 300]}]
SEEDS = dict(zip([path for path, _ in PATHS], (_CHATS, _COMPLETIONS, _TOKENIZE, _DETOKENIZE), strict=True))

_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    17,
    1 << 31,
    1 << 63,
    -(1 << 63) - 1,
    10**300,
    0.0,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "none",
    "auto",
    "required",
    "NaN",
    "0",
    "user",
    "assistant",
    "text",
    "image_url",
    "json_schema",
    "<think>",
    "</think><answer>",
    "<|assistant|>\n<|user|>",
    "{{ 7 * 7 }}{% raw %}",
    "\x00",
    "\ud800",
    "\ufdd0\uffff",
    "é" * 3,
    "x" * 3000,
    "🙂" * 40,
    [],
    {},
    [[]],
    [None],
    [{}],
    {"": None},
    {"type": "function"},
    {"type": "text", "text": "t"},
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}},
    {"role": "user", "content": "hi"},
    {"$ref": "#"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}},
    {"anyOf": [{"type": "string"}, {"type": "null"}]},
    {"type": "string", "pattern": "(a|aa)*b{2,9}"},
    {"type": "array", "minItems": 3, "maxItems": 2},
    {"type": "integer", "multipleOf": 0},
    {"enum": []},
    [1, 2, 3],
    ["a"] * 20,
    [0] * 500,
]


def _value(rng: random.Random) -> Any:
    value = copy.deepcopy(rng.choice(_VALUES))
    if rng.random() < 0.05:
        for _ in range(rng.choice((3, 40, 150, 400))):
            value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) inside value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((value, key))
        _places(item, found)
    return found


def _field_names(path: str) -> list[str]:
    names = {name for body in SEEDS[path] for name in body}
    return sorted(
        names | {"functions", "suffix", "modalities", "audio", "best_of", "metadata", "reasoning", "thinking"}
    )


def _mutate(rng: random.Random, body: dict[str, Any], path: str) -> None:
    """One change somewhere: another value, a missing field, a field too many, an entry twice."""
    places = _places(body, [])
    if not places:
        body[rng.choice(_field_names(path))] = _value(rng)
        return
    container, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.5:
        container[key] = _value(rng)
    elif kind < 0.65:
        del container[key]
    elif kind < 0.85:
        body[rng.choice(_field_names(path))] = _value(rng)
    elif isinstance(container, list):
        container.extend([copy.deepcopy(container[key])] * rng.choice((1, 2, 30)))
    else:
        container[rng.choice(("type", "schema", "x", "__class__", "name"))] = _value(rng)


def _damage(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut off or put in."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(damaged) + 1)
        kind = rng.random()
        if kind < 0.4 and at < len(damaged):
            damaged[at] = rng.randrange(256)
        elif kind < 0.6:
            del damaged[at:]
        else:
            damaged[at:at] = bytes(rng.choice((b"\xff", b"\x00", b"[", b'"', b"\\u", b"1e999", b"}{", b"-")))
    return bytes(damaged)


def generate(seed: int, count: int) -> list[tuple[str, bytes]]:
    """(path, body) pairs; the same seed gives the same bodies."""
    rng = random.Random(seed)
    paths, weights = zip(*PATHS, strict=True)
    bodies = []
    for _ in range(count):
        path = rng.choices(paths, weights)[0]
        body = copy.deepcopy(rng.choice(SEEDS[path]))
        for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 5))):
            _mutate(rng, body, path)
        data = json.dumps(body).encode()
        if rng.random() < 0.12:
            data = _damage(rng, data)
        bodies.append((path, data))
    return bodies
