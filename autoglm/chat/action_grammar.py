"""The AutoGLM action language as a grammar over tokens, and how an action ends when max_tokens runs out.

The grammar is one action and nothing after its bracket; before it the line breaks and the <answer> tag that AutoGLM
models write after a thought. Coordinates are 0 to 999 without leading zeros. Texts hold no raw line break and only
the escapes \\" \\\\ \\n, so that Python's own parser reads them, and at most MAX_TEXT_CHARS characters, as a model
could go on for ever inside quotes.

Ending in time: before each token the engine asks whether the action could still be completed after it. If not, the
shortest end of what stands is written instead: a text is cut and closed; an action whose kind is not settled becomes
the first of FORMS that fits, a short wait if nothing is written yet. Coordinates are never made up: an action that
needs them is begun only where every digit of them has room (a token holds at least one byte), so the model writes
them all.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from autoglm.actions import FORMS, Part, Slot
from autoglm.chat.constraint import GrammarConstraint

if TYPE_CHECKING:
    import llguidance

MAX_TEXT_CHARS = 2000
ANSWER_TAG = "<answer>"
_LEAD = re.compile(rf"\n{{0,2}}({ANSWER_TAG}\n?)?")
# How far a slot's text goes, and the regex llguidance is given for all of it.
_SLOTS = {
    Slot.NUMBER: (re.compile("[0-9]*"), "/0|[1-9][0-9]{0,2}/"),
    Slot.SECONDS: (re.compile("[0-9]*"), "/[1-9][0-9]?/"),
    Slot.TEXT: (
        re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL),
        rf'/([^"\\\x00-\x1F\x7F]|\\["\\n]){{0,{MAX_TEXT_CHARS}}}/',
    ),
}
_LONGEST_NUMBER = "999"


def action_lark() -> str:
    """The grammar in llguidance's dialect of Lark."""

    def term(part: Part) -> str:
        return part.name if isinstance(part, Slot) else json.dumps(part)

    forms = " | ".join(" ".join(term(part) for part in form.parts()) for form in FORMS)
    terminals = [f"{slot.name}: {pattern}" for slot, (_, pattern) in _SLOTS.items()]
    return "\n".join(["start: LEAD action", f"LEAD: /{_LEAD.pattern}/", f"action: {forms}", *terminals])


class End(NamedTuple):
    """What would end an action; where it owes coordinates, text is only as long as the longest of them."""

    text: str
    owes_coordinates: bool


_PARTS = tuple(form.parts() for form in FORMS)
# No end and no forced run is longer than the longest action without its texts.
MAX_END_BYTES = len("\n\n\n" + ANSWER_TAG) + max(
    sum(len(part) if isinstance(part, str) else len(_LONGEST_NUMBER) for part in parts) for parts in _PARTS
)


def find_end(written: str) -> End:
    """The end for an action of which `written`, a beginning the grammar allows, stands already."""
    match = _LEAD.match(written)
    assert match is not None
    rest = written[match.end() :]
    if rest and ANSWER_TAG.startswith(rest):
        return End(ANSWER_TAG[len(rest) :] + find_end("").text, owes_coordinates=False)
    ends = [end for parts in _PARTS if (end := _end_of(parts, rest)) is not None]
    harmless = next((end for end in ends if not end.owes_coordinates), None)
    return harmless or min(ends, key=lambda end: len(end.text))


def _end_of(parts: tuple[Part, ...], written: str) -> End | None:
    """The end of one form; None if `written` is no beginning of it."""
    position, end, owes = 0, "", False
    for part in parts:
        if isinstance(part, str):
            here = written[position : position + len(part)]
            if not part.startswith(here):
                return None
            end += part[len(here) :]
            position += len(here)
            continue
        match = _SLOTS[part][0].match(written, position)
        assert match is not None
        position = match.end()
        if part is Slot.TEXT and written[position:] == "\\":  # an escape was begun
            end += "\\"
            position += 1
        elif position == len(written) and part is Slot.NUMBER:
            owes = True
            end += _LONGEST_NUMBER[len(match[0]) :]
        elif position == len(written) and part is Slot.SECONDS and not match[0]:
            end += "1"
    return End(end, owes)


class ActionConstraint(GrammarConstraint):
    """One sequence's place in the grammar of action_lark.

    tokenize     bytes -> token ids that spell them
    token_bytes  the bytes of a token
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        vocab_size: int,
        tokenize: Callable[[bytes], list[int]],
        token_bytes: Callable[[int], bytes],
    ) -> None:
        super().__init__(matcher, vocab_size)
        self._tokenize = tokenize
        self._token_bytes = token_bytes
        self._written = b""

    def accept(self, token_id: int) -> None:
        super().accept(token_id)
        self._written += self._token_bytes(token_id)

    def closing(self, token_ids: Sequence[int], room: int) -> Sequence[int]:
        """What to write instead of token_ids to end the action within room tokens; nothing if it has room with them.

        Upholds itself: if it was asked before every token, and the first time with room for a whole short wait
        (min_action_tokens), what it gives fits.
        """
        if room > 2 * MAX_END_BYTES:
            return ()
        after = self._written + b"".join(map(self._token_bytes, token_ids))
        if self._num_end_tokens(after) <= room - len(token_ids):
            return ()
        text, missing = _decode(self._written)
        end = find_end(text)
        assert not end.owes_coordinates
        return self._tokenize(missing + end.text.encode())

    def _num_end_tokens(self, written: bytes) -> int:
        """Tokens that surely suffice to end the action."""
        text, missing = _decode(written)
        end = find_end(text)
        return len(end.text) if end.owes_coordinates else len(self._tokenize(missing + end.text.encode()))


def min_action_tokens(tokenize: Callable[[bytes], list[int]]) -> int:
    """Tokens of the shortest answer a cut one comes to: a short wait."""
    return len(tokenize(find_end("").text.encode()))


def _decode(written: bytes) -> tuple[str, bytes]:
    """The whole characters of written, and the fewest bytes that make one of a character begun at its end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text = decoder.decode(written)
    begun = decoder.getstate()[0]
    if not begun:
        return text, b""
    size = 2 if begun[0] < 0xE0 else 3 if begun[0] < 0xF0 else 4
    lowest = {0xE0: b"\xa0", 0xF0: b"\x90"}.get(begun[0], b"\x80")  # the second byte; all others begin at 0x80
    return text, (lowest + b"\x80\x80" if len(begun) == 1 else b"\x80\x80")[: size - len(begun)]
