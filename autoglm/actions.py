"""The AutoGLM action language: text <-> typed actions, `do(action="Tap", element=[x,y])` and `finish(message="...")`.

Coordinates are whole numbers 0..999 of the whole screen, x to the right and y down, whatever its size in pixels.
The texts are Python calls with literal arguments: what format_action writes, ast.parse reads with the same values.
FORMS is the one list of the language; parser, writer and the grammar of chat/action_grammar.py all follow it.
Source: the published AutoGLM prompts and the action handler of Open-AutoGLM, restated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import Enum

from msgspec import Struct
from msgspec.structs import astuple

from autoglm.errors import FormatError

# The largest coordinate.
MAX_COORDINATE = 999
MAX_SECONDS = 9999


class Tap(Struct, frozen=True):
    """Touch the point (x, y) once; a message says why the user should be asked first (payment, privacy)."""

    x: int
    y: int
    message: str | None = None


class DoubleTap(Struct, frozen=True):
    """Touch the point (x, y) twice, quickly."""

    x: int
    y: int


class LongPress(Struct, frozen=True):
    """Hold the point (x, y)."""

    x: int
    y: int


class Swipe(Struct, frozen=True):
    """The finger goes from (x, y) to (to_x, to_y)."""

    x: int
    y: int
    to_x: int
    to_y: int


class Type(Struct, frozen=True):
    """Write into the field that has the focus, in place of what is in it; `Type_Name` (of a person) is the same."""

    text: str


class Launch(Struct, frozen=True):
    """Start an app by its name, whatever is on the screen."""

    app: str


class Back(Struct, frozen=True):
    """Go back one page."""


class Home(Struct, frozen=True):
    """Go to the home screen."""


class Wait(Struct, frozen=True):
    """Do nothing for some seconds, for a page that is loading."""

    seconds: int = 2


class TakeOver(Struct, frozen=True):
    """The user has to act, for a login or a check that they are human; the message says what."""

    message: str


class Interact(Struct, frozen=True):
    """Several things on the screen fit: ask the user which."""


class Note(Struct, frozen=True):
    """Keep what is on this page for later; the prompt gives "True" as the message."""

    message: str


class CallAPI(Struct, frozen=True):
    """Sum up or comment on this page or what was noted, as the instruction says."""

    instruction: str


class Finish(Struct, frozen=True):
    """Nothing more to do; the message is for the user."""

    message: str


Action = (
    Tap
    | DoubleTap
    | LongPress
    | Swipe
    | Type
    | Launch
    | Back
    | Home
    | Wait
    | TakeOver
    | Interact
    | Note
    | CallAPI
    | Finish
)


class Slot(Enum):
    """A part of an action's text that is not fixed."""

    NUMBER = "a coordinate"
    SECONDS = "a number of seconds"
    TEXT = "text inside quotes, escaped"


Part = str | Slot
_SHAPES: dict[str, tuple[Part, ...]] = {
    "point": ("[", Slot.NUMBER, ",", Slot.NUMBER, "]"),
    "text": ('"', Slot.TEXT, '"'),
    "duration": ('"', Slot.SECONDS, ' seconds"'),
}


class Form(Struct, frozen=True):
    """One way to write one kind of action.

    name       the action as the text names it; None for finish(...)
    arguments  keyword and shape ("point", "text", "duration"); their values are the fields of kind, in order
    """

    kind: Callable[..., Action]
    name: str | None
    arguments: tuple[tuple[str, str], ...] = ()

    def parts(self) -> tuple[Part, ...]:
        """The whole text as fixed parts and slots, neighbouring fixed parts joined."""
        parts: list[Part] = ["finish("] if self.name is None else [f'do(action="{self.name}"']
        for i, (keyword, shape) in enumerate(self.arguments):
            lead = "" if self.name is None and i == 0 else ", "
            for part in (f"{lead}{keyword}=", *_SHAPES[shape]):
                _add(parts, part)
        _add(parts, ")")
        return tuple(parts)


def _add(parts: list[Part], part: Part) -> None:
    if isinstance(part, str) and isinstance(parts[-1], str):
        parts[-1] += part
    else:
        parts.append(part)


# An answer that has to end early ends in the first of these that still fits what is written and needs no
# coordinates, so what does the least harm comes first. An action is written in the first form that holds it.
FORMS = (
    Form(Wait, "Wait", (("duration", "duration"),)),
    Form(TakeOver, "Take_over", (("message", "text"),)),
    Form(Interact, "Interact"),
    Form(Note, "Note", (("message", "text"),)),
    Form(CallAPI, "Call_API", (("instruction", "text"),)),
    Form(Launch, "Launch", (("app", "text"),)),
    Form(Type, "Type", (("text", "text"),)),
    Form(Type, "Type_Name", (("text", "text"),)),
    Form(Back, "Back"),
    Form(Home, "Home"),
    Form(Finish, None, (("message", "text"),)),
    Form(Tap, "Tap", (("element", "point"),)),
    Form(Tap, "Tap", (("element", "point"), ("message", "text"))),
    Form(DoubleTap, "Double Tap", (("element", "point"),)),
    Form(LongPress, "Long Press", (("element", "point"),)),
    Form(Swipe, "Swipe", (("start", "point"), ("end", "point"))),
)
_THOUGHT_END = "</think>"
_ANSWER_TAGS = ("<answer>", "</answer>")
_CALL = re.compile(r"(do|finish)\((.*)\)", re.DOTALL)
_STRING = r'"((?:[^"\\\n\r]|\\.)*)"'
_POINT = r"\[\s*(0|[1-9]\d{0,3})\s*,\s*(0|[1-9]\d{0,3})\s*\]"
_ARGUMENT = re.compile(rf"\s*(\w+)\s*=\s*(?:{_STRING}|{_POINT})\s*(?:,|\Z)", re.ASCII | re.DOTALL)
_ESCAPED = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_ESCAPES = {"\\": "\\", '"': '"', "'": "'", "n": "\n", "r": "\r", "t": "\t"}
_MUST_ESCAPE = re.compile(r'[\\"\x00-\x1f\x7f\ud800-\udfff]')
_Value = str | tuple[int, int]


def format_action(action: Action) -> str:
    """The action as the model writes it, on one line.

    Raises FormatError for a coordinate outside 0 to 999, or seconds that are no whole number.
    """
    values = [value for value in astuple(action) if value is not None]
    for form in FORMS:
        parts = form.parts()
        if form.kind is type(action) and sum(isinstance(part, Slot) for part in parts) == len(values):
            rest = iter(values)
            return "".join(part if isinstance(part, str) else _write(part, next(rest)) for part in parts)
    raise FormatError(f"{type(action).__name__} is no action")


def parse_action(text: str) -> Action:
    """Read one action, alone or after a thought (`...</think>`), with or without <answer> tags around it.

    Raises FormatError, which says what is wrong and never quotes the text, unless it is exactly one action.
    """
    call = _CALL.fullmatch(_without_thought(text))
    if call is None:
        raise FormatError(f"an answer of {len(text)} characters is no action, expected do(...) or finish(...)")
    arguments = _arguments(call[2])
    name = None
    if call[1] == "do":
        name = _text(arguments.pop("action", None), "action")
    forms = [form for form in FORMS if form.name == name]
    if not forms:
        names = ", ".join(dict.fromkeys(form.name for form in FORMS if form.name is not None))
        raise FormatError(f"an action is of an unknown kind, expected one of {names}")
    form = next((f for f in forms if {keyword for keyword, _ in f.arguments} == set(arguments)), forms[0])
    values = [
        value for keyword, shape in form.arguments for value in _read(arguments.pop(keyword, None), keyword, shape)
    ]
    if arguments:
        raise FormatError(f"{name or 'finish'} has an argument that it does not take")
    return form.kind(*values)


def _without_thought(text: str) -> str:
    """What stands after the thought, without white space and tags around it."""
    text = text.strip()
    if not text.startswith(("do(", "finish(", _ANSWER_TAGS[0])) and _THOUGHT_END in text:
        text = text.partition(_THOUGHT_END)[2].lstrip()
    return text.removeprefix(_ANSWER_TAGS[0]).removesuffix(_ANSWER_TAGS[1]).strip()


def _arguments(text: str) -> dict[str, _Value]:
    found: dict[str, _Value] = {}
    position = 0
    while position < len(text):
        match = _ARGUMENT.match(text, position)
        if match is None or match[1] in found:
            raise FormatError('an action has an argument that is not name="text" or name=[x,y], each name once')
        found[match[1]] = (int(match[3]), int(match[4])) if match[3] is not None else _unescape(match[2])
        position = match.end()
    return found


def _read(value: _Value | None, keyword: str, shape: str) -> Iterator[int | str]:
    """The fields one argument stands for."""
    if shape == "point":
        if not isinstance(value, tuple) or max(value) > MAX_COORDINATE:
            raise FormatError(f"an action lacks the point {keyword}=[x,y] with coordinates 0 to {MAX_COORDINATE}")
        yield from value
    elif shape == "duration":
        match = re.fullmatch(r"(\d{1,4}) seconds?", _text(value, keyword), re.ASCII)
        if match is None:
            raise FormatError(f'an action lacks {keyword}="N seconds"')
        yield int(match[1])
    else:
        yield _text(value, keyword)


def _text(value: _Value | None, keyword: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"an action lacks the text {keyword}=")
    return value


def _write(slot: Slot, value: object) -> str:
    if slot is Slot.TEXT and isinstance(value, str):
        return _MUST_ESCAPE.sub(_escape, value)
    most = MAX_COORDINATE if slot is Slot.NUMBER else MAX_SECONDS
    if slot is Slot.TEXT or isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise FormatError(f"an action holds something else where {slot.value} belongs, expected 0 to {most} or a text")
    return str(value)


def _escape(match: re.Match[str]) -> str:
    """A character Python's own literals cannot hold as it is, as their escape."""
    char = match[0]
    for letter, meant in _ESCAPES.items():
        if char == meant:
            return "\\" + letter
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"


def _unescape(text: str) -> str:
    def plain(match: re.Match[str]) -> str:
        code = match[1] or match[2]
        if code is not None:
            return chr(int(code, 16))
        if match[3] not in _ESCAPES:
            raise FormatError("an action's text holds a backslash that begins no escape; a plain one is written twice")
        return _ESCAPES[match[3]]

    return _ESCAPED.sub(plain, text)
