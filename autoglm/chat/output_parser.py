"""Streamed text -> content, reasoning and tool-call deltas; never half a tag, whatever the pieces.

Modes of a thought (<think> ... </think>):
  inline  content is what the model wrote, tags included, but for the </answer> after an action: Open-AutoGLM's client
          takes all from do(action= on for the action, cannot read it with a tag behind it, and ends the task. Its
          reference server stops at that tag and never sends it.
  split   thoughts become reasoning; think and answer tags are removed, with the white space around them
  drop    as split, and the thoughts are left out

A split answer is never empty because the text landed in the other field: when the model stops by itself
and no content came, open thought or closed, its content is the thought after the last <answer> in it, or the
whole thought if there is none. When it was cut off by max_tokens the thought stays a thought: finish_reason
"length" says so, and a thinking budget prevents it.

With tools, calls between <tool_call> and </tool_call> outside thoughts, and an answer that is one JSON object
beginning with "name" (Llama 3), become tool-call deltas, one per call. What looks like a call and is none stays
content.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from enum import Enum
from typing import Literal

from msgspec import Struct

from autoglm.chat.tool_calls import read_tool_calls

TOOL_TAGS = ("<tool_call>", "</tool_call>")
# What Open-AutoGLM's client looks for; zai-org/Open-AutoGLM phone_agent/model/client.py, restated.
_ACTION_STARTS = ("do(action=", "finish(message=")
_BARE_CALL = '{"name":'


class Delta(Struct, frozen=True):
    """A piece of an answer; text for content and reasoning, the tool_ fields for a whole tool call."""

    kind: Literal["content", "reasoning", "tool_call"]
    text: str = ""
    tool_index: int | None = None
    tool_name: str | None = None
    tool_arguments: str | None = None
    tool_id: str | None = None


class _State(Enum):
    CONTENT = "content"
    THOUGHT = "thought"
    CALL = "call"
    BARE_CALL = "bare call"


class OutputParser:
    """One answer's parser; push() its text as it comes, then finish() once."""

    def __init__(
        self,
        reasoning_mode: Literal["inline", "split", "drop"],
        open_tag: str = "<think>",
        close_tag: str = "</think>",
        starts_in_thought: bool = False,
        answer_tags: tuple[str, str] = ("<answer>", "</answer>"),
        tools: bool = False,
        thinking_off: bool = False,
    ) -> None:
        """starts_in_thought: the prompt ends in open_tag. thinking_off: nothing is a thought, tags go all the same."""
        self._mode = reasoning_mode
        self._open, self._close, self._answer_tags = open_tag, close_tag, answer_tags
        self._tools = tools
        self._thinking_off = thinking_off
        self._state = _State.THOUGHT if starts_in_thought and not thinking_off else _State.CONTENT
        self._held = ""  # may become a tag, or lies inside a call
        self._white = ""  # white space that goes if a tag follows
        self._skips_white = self._state is _State.THOUGHT and reasoning_mode != "inline"
        self._may_be_bare = tools and self._state is _State.CONTENT
        self._has_content = False
        self._last_tag = _LastTag(answer_tags[1]) if reasoning_mode == "inline" else None
        self._thought: list[str] = []
        self._num_calls = 0
        self._out: list[Delta] = []

    def push(self, text: str) -> list[Delta]:
        """The deltas that are certain after this text; neighbours of one kind are joined."""
        if self._mode == "inline" and not self._tools:
            self._out.append(Delta("content", text))
            return self._take()
        self._held += text
        while self._step():
            pass
        return self._take()

    def finish(self, finish_reason: str = "stop") -> list[Delta]:
        """Everything held back; finish_reason is the engine's "stop" or "length"."""
        held, self._held = self._held, ""
        if self._state is _State.CALL:
            self._close_call(held, complete=False)
        elif self._state is _State.BARE_CALL:
            self._close_bare(held)
        else:
            self._emit(held)
        if self._state is not _State.THOUGHT or self._mode == "inline":
            self._out.append(Delta("content", self._white))
        self._white = ""
        if finish_reason == "stop" and not self._has_content and self._mode != "inline":
            self._out.append(Delta("content", self._thought_as_content()))
        deltas = self._take()
        if self._last_tag is not None and (rest := self._last_tag.finish()):
            deltas.append(Delta("content", rest))
        return deltas

    def _step(self) -> bool:
        """Deal with the next tag or the text before it; False when more text is needed."""
        if self._may_be_bare and self._looks_bare():
            return False
        if self._state is _State.BARE_CALL:
            return False
        tags = self._tags()
        found = [(at, -len(tag), tag) for tag in tags if (at := self._held.find(tag)) >= 0]
        if found:
            at, _, tag = min(found)
            before, self._held = self._held[:at], self._held[at + len(tag) :]
            self._meet(tag, before)
            return True
        if self._state is not _State.CALL:
            keep = _partial_tag(self._held, tags)
            certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            self._emit(certain)
        return False

    def _tags(self) -> tuple[str, ...]:
        """The tags that mean something where the answer stands."""
        if self._state is _State.CALL:
            return (TOOL_TAGS[1],)
        if self._state is _State.THOUGHT:
            return (self._close,)
        tags = (self._open,) if self._mode == "inline" else (self._open, self._close, *self._answer_tags)
        return (*tags, TOOL_TAGS[0]) if self._tools else tags

    def _meet(self, tag: str, before: str) -> None:
        if self._state is _State.CALL:
            self._close_call(before, complete=True)
            return
        self._emit(before)
        if tag == TOOL_TAGS[0]:
            self._white = ""
            self._state = _State.CALL
            return
        if self._mode == "inline":
            self._emit(tag)
        else:
            self._white = ""
            self._skips_white = True
        if tag == self._open and not self._thinking_off:
            self._state = _State.THOUGHT
        elif tag == self._close:
            self._state = _State.CONTENT
            self._may_be_bare = self._tools

    def _emit(self, text: str) -> None:
        """Put text out as the state says, holding white space that a tag may follow."""
        if self._skips_white:
            text = text.lstrip()
        if not text:
            return
        self._skips_white = False
        text = self._white + text
        solid = text.rstrip()
        self._white = text[len(solid) :]
        if not solid:
            return
        if self._state is _State.THOUGHT and self._mode != "inline":
            self._thought.append(solid)
            if self._mode == "split":
                self._out.append(Delta("reasoning", solid))
            return
        self._has_content = True
        self._may_be_bare = False
        self._out.append(Delta("content", solid))

    def _looks_bare(self) -> bool:
        """Whether the answer so far begins like a call that stands alone; decides once that is certain."""
        start = re.sub(r"\s", "", self._held[:256])
        if start.startswith(_BARE_CALL):
            self._state, self._may_be_bare = _State.BARE_CALL, False
            return True
        if start and not _BARE_CALL.startswith(start):
            self._may_be_bare = False
        return bool(start) and self._may_be_bare

    def _close_call(self, text: str, *, complete: bool) -> None:
        self._state = _State.CONTENT
        if self._put_calls(text):
            self._skips_white = True
        else:
            self._emit(TOOL_TAGS[0] + text + (TOOL_TAGS[1] if complete else ""))

    def _close_bare(self, text: str) -> None:
        self._state = _State.CONTENT
        if self._put_calls(text):
            self._white = ""
        else:
            self._emit(text)

    def _put_calls(self, text: str) -> bool:
        calls = read_tool_calls(text)
        for call in calls:
            call_id = f"call_{secrets.token_hex(12)}"
            self._out.append(
                Delta(
                    "tool_call",
                    tool_index=self._num_calls,
                    tool_name=call.name,
                    tool_arguments=call.arguments,
                    tool_id=call_id,
                )
            )
            self._num_calls += 1
            self._has_content = True
        return bool(calls)

    def _thought_as_content(self) -> str:
        thought = "".join(self._thought)
        opened, closed = self._answer_tags
        return thought.rpartition(opened)[2].replace(closed, "").strip()

    def _take(self) -> list[Delta]:
        joined: list[Delta] = []
        for delta in self._out if self._last_tag is None else self._last_tag.push(self._out):
            if delta.kind == "tool_call":
                joined.append(delta)
            elif delta.text and joined and joined[-1].kind == delta.kind:
                joined[-1] = Delta(delta.kind, joined[-1].text + delta.text)
            elif delta.text:
                joined.append(delta)
        self._out = []
        return joined


class _LastTag:
    """Holds the closing tag back that may be the last of an answer, and leaves it out after an action."""

    def __init__(self, tag: str) -> None:
        self._tag = tag
        self._written: list[str] = []
        self._held = ""

    def push(self, deltas: list[Delta]) -> Iterator[Delta]:
        """The deltas without an end that may be the tag or become it."""
        for delta in deltas:
            if delta.kind == "content":
                text = self._held + delta.text
                keep = len(self._tag) if text.endswith(self._tag) else _partial_tag(text, (self._tag,))
                text, self._held = text[: len(text) - keep], text[len(text) - keep :]
            else:
                text, self._held = self._held, ""
            self._written.append(text)
            yield Delta("content", text)
            if delta.kind != "content":
                yield delta

    def finish(self) -> str:
        """What was held back, unless it closes an action."""
        written = "".join(self._written)
        closes_action = written.rstrip().endswith(")") and any(start in written for start in _ACTION_STARTS)
        return "" if closes_action and self._held == self._tag else self._held


def _partial_tag(text: str, tags: tuple[str, ...]) -> int:
    """Length of the longest end of text that could be the beginning of a tag."""
    for length in range(min(len(text), max(map(len, tags)) - 1), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0
