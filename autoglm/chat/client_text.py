"""Keeps text a client sends from becoming control tokens.

Every character of client text that could begin a control token is followed by a mark, a Unicode
noncharacter that occurs nowhere in the request. Templates print marked text like any other; when the
prompt is tokenized, control tokens are looked for while the marks are still there, and only then are
the marks taken out. However a template cuts and joins client text, a control token's spelling that
came from a client is never seen whole.

Tags that the template itself looks for in messages (such as </think>) are left unmarked, so that
`'</think>' in message.content` works as its author meant it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from autoglm.chat.tokenizer import END_OF_TURN_TEXTS, THINKING_TAGS
from autoglm.errors import RequestError

# U+FDD0..U+FDEF and the last two of every plane never stand for text, so a request rarely holds even one.
_NONCHARACTERS = [chr(0xFDD0 + i) for i in range(32)] + [
    chr((plane << 16) + last) for plane in range(17) for last in (0xFFFE, 0xFFFF)
]
_TAG = re.compile(r"</?[A-Za-z_]\w{0,31}>")
MAX_DEPTH = 64


class Marker:
    """Marks client text for one template and vocabulary; immutable."""

    def __init__(self, control_texts: Iterable[str], template_source: str, open_tags: Iterable[str]) -> None:
        """control_texts: spellings of control tokens; open_tags: tags left unmarked whatever the template says."""
        control = set(control_texts) | set(END_OF_TURN_TEXTS) - set(THINKING_TAGS)
        starts = sorted({"<", "["} | {text[0] for text in control if text})
        tags = (set(_TAG.findall(template_source)) | set(open_tags)) - control
        kept = "|".join(re.escape(tag) for tag in sorted(tags, key=len, reverse=True))
        start = "[" + "".join(re.escape(char) for char in starts) + "]"
        self._pattern = re.compile(f"({kept})|({start})" if kept else f"(?!)()|({start})")

    def free_mark(self, value: object) -> str:
        """A mark that occurs in no string of value; RequestError if a client used them all up."""
        used = {char for text in _strings(value, 0) if not text.isascii() for char in text}
        for mark in _NONCHARACTERS:
            if mark not in used:
                return mark
        raise RequestError("messages hold every Unicode noncharacter; remove some", param="messages")

    def mark(self, value: Any, mark: str) -> Any:
        """value with all its strings marked, keys of objects included; containers are copied."""
        if isinstance(value, str):
            return self._pattern.sub(lambda match: match.group() if match.group(1) else match.group() + mark, value)
        if isinstance(value, dict):
            return {self.mark(key, mark): self.mark(item, mark) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item, mark) for item in value]
        return value


def _strings(value: object, depth: int) -> Iterable[str]:
    if depth > MAX_DEPTH:
        raise RequestError(f"messages or tools are nested deeper than {MAX_DEPTH} levels", param="messages")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key, depth + 1)
            yield from _strings(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item, depth + 1)
