"""Reads the tool calls models write: one call's text -> name and JSON arguments.

Three spellings: an object {"name", "arguments" or "parameters"} (Hermes, Qwen, Llama 3, and what our own
grammar writes), a list of such objects, and GLM-4.5's name followed by <arg_key>/<arg_value> pairs.
"""

from __future__ import annotations

import json
import re
from typing import Any

from msgspec import Struct

_GLM_NAME = re.compile(r"\s*([\w.-]{1,128})\s*")
_GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


class ToolCall(Struct, frozen=True):
    """One call; arguments is JSON text, as OpenAI's API carries it."""

    name: str
    arguments: str


def read_tool_calls(text: str) -> list[ToolCall]:
    """The calls in the text between two tool call tags; empty if it is none of the known spellings."""
    if text.lstrip()[:1] in ("{", "["):
        return _from_json(text)
    match = _GLM_NAME.match(text)
    if match is None:
        return []
    name, position = match.group(1), match.end()
    arguments: dict[str, Any] = {}
    # One pair at a time: one expression for all of them could backtrack without end.
    while (pair := _GLM_ARGUMENT.match(text, position)) is not None:
        arguments[pair.group(1).strip()] = _value(pair.group(2))
        position = pair.end()
    return [ToolCall(name, json.dumps(arguments, ensure_ascii=False))] if position == len(text) else []


def _from_json(text: str) -> list[ToolCall]:
    try:
        parsed = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return []
    entries = parsed if isinstance(parsed, list) else [parsed]
    calls = [_from_object(entry) for entry in entries]
    return [call for call in calls if call] if all(calls) else []


def _from_object(entry: Any) -> ToolCall | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
        return None
    arguments = entry.get("arguments", entry.get("parameters"))
    if isinstance(arguments, str):  # some models write the arguments as JSON inside a string
        return ToolCall(entry["name"], arguments) if _is_object(arguments) else None
    if arguments is not None and not isinstance(arguments, dict):
        return None
    return ToolCall(entry["name"], json.dumps(arguments or {}, ensure_ascii=False))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _value(text: str) -> Any:
    """GLM writes strings bare and everything else as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
