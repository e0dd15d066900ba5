"""Chat templates for files that carry none, and how tools are told to a model whose template knows none.

GLM4 follows the published prompt form of GLM-4.1V: a newline after every role tag and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

GLM4 = """\
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
    {%- set role = 'observation' if message.role == 'tool' else message.role -%}
    {{- '<|' ~ role ~ '|>\\n' ~ message.content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def default_template(tokens: Iterable[str]) -> str:
    """The template for a vocabulary: GLM-4's where its tags exist, ChatML for all others."""
    vocabulary = set(tokens)
    return GLM4 if {"[gMASK]", "<sop>", "<|assistant|>"} <= vocabulary else CHATML


def tool_instructions(tools: list[dict[str, Any]]) -> str:
    """A system text that lists the tools and the form of a call; output_parser.py reads that form back."""
    listed = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    return (
        "You can call these tools, each given as one JSON object a line:\n"
        f"{listed}\n"
        "To call a tool, write exactly this and nothing after it:\n"
        '<tool_call>\n{"name": "the tool\'s name", "arguments": {"its": "arguments"}}\n</tool_call>'
    )


def spell_out_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The conversation with tool definitions, calls and results written as ordinary text."""
    spelled = [_spell_out(message) for message in messages]
    if tools:
        text = tool_instructions(tools)
        if spelled and spelled[0]["role"] == "system":
            spelled[0] = {**spelled[0], "content": f"{spelled[0]['content']}\n\n{text}"}
        else:
            spelled.insert(0, {"role": "system", "content": text})
    return spelled


def _spell_out(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, list):  # with media in it: the template prints its parts
        return message
    if message["role"] in ("tool", "function"):
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        body = {"name": function.get("name"), "arguments": function.get("arguments")}
        calls.append(f"<tool_call>\n{json.dumps(body, ensure_ascii=False)}\n</tool_call>")
    text = "\n".join([content, *calls] if content else calls)
    return {name: value for name, value in message.items() if name != "tool_calls"} | {"content": text}
