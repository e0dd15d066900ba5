"""The AutoGLM action language: text <-> typed actions, `do(action="Tap", element=[x,y])` and `finish(message="...")`.

Coordinates are whole numbers 0..999 of the whole screen, x to the right and y down, whatever its size in pixels.
Left out: the actions this model never uses (Double Tap, Take_over, Note, Call_API, Interact).
Source: the published AutoGLM prompt's action list, restated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from autoglm.errors import FormatError

# The largest coordinate.
MAX_COORDINATE = 999


@dataclass(frozen=True)
class Tap:
    """Touch the point (x, y) once."""

    x: int
    y: int


@dataclass(frozen=True)
class LongPress:
    """Hold the point (x, y)."""

    x: int
    y: int


@dataclass(frozen=True)
class Swipe:
    """The finger goes from (x, y) to (to_x, to_y)."""

    x: int
    y: int
    to_x: int
    to_y: int


@dataclass(frozen=True)
class Type:
    """Write into the field that has the focus."""

    text: str


@dataclass(frozen=True)
class Launch:
    """Start an app by its name, whatever is on the screen."""

    app: str


@dataclass(frozen=True)
class Back:
    """Go back one page."""


@dataclass(frozen=True)
class Home:
    """Go to the home screen."""


@dataclass(frozen=True)
class Wait:
    """Do nothing for some seconds, for a page that is loading."""

    seconds: int = 2


@dataclass(frozen=True)
class Finish:
    """Nothing more to do; the message is for the user."""

    message: str


Action = Tap | LongPress | Swipe | Type | Launch | Back | Home | Wait | Finish

_NAMES: dict[type[Action], str] = {
    Tap: "Tap", LongPress: "Long Press", Swipe: "Swipe", Type: "Type", Launch: "Launch",
    Back: "Back", Home: "Home", Wait: "Wait",
}  # fmt: skip
_STRING = r'"((?:[^"\\\n]|\\.)*)"'
_POINT = r"\[\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\]"
_CALL = re.compile(r"\s*(do|finish)\((.*)\)\s*\Z", re.DOTALL)
_ARGUMENT = re.compile(rf"\s*(\w+)\s*=\s*(?:{_STRING}|{_POINT})\s*(?:,|\Z)", re.DOTALL)


def format_action(action: Action) -> str:
    """The action as the model writes it, on one line."""
    if isinstance(action, Finish):
        return f'finish(message="{_escape(action.message)}")'
    head = f'do(action="{_NAMES[type(action)]}"'
    if isinstance(action, (Tap, LongPress)):
        return f"{head}, element=[{action.x},{action.y}])"
    if isinstance(action, Swipe):
        return f"{head}, start=[{action.x},{action.y}], end=[{action.to_x},{action.to_y}])"
    if isinstance(action, Type):
        return f'{head}, text="{_escape(action.text)}")'
    if isinstance(action, Launch):
        return f'{head}, app="{_escape(action.app)}")'
    if isinstance(action, Wait):
        return f'{head}, duration="{action.seconds} seconds")'
    return f"{head})"


def parse_action(text: str) -> Action:
    """Read one action; FormatError if `text` is not exactly one (it never quotes the text)."""
    call = _CALL.match(text)
    if call is None:
        raise FormatError(f"an answer of {len(text)} characters is no action, expected do(...) or finish(...)")
    arguments = _arguments(call[2])
    if call[1] == "finish":
        return Finish(_string(arguments, "message"))
    name = _string(arguments, "action")
    if name in ("Tap", "Long Press"):
        x, y = _point(arguments, "element")
        return Tap(x, y) if name == "Tap" else LongPress(x, y)
    if name == "Swipe":
        return Swipe(*_point(arguments, "start"), *_point(arguments, "end"))
    if name == "Type":
        return Type(_string(arguments, "text"))
    if name == "Launch":
        return Launch(_string(arguments, "app"))
    if name == "Wait":
        return Wait(_seconds(_string(arguments, "duration")))
    if name in ("Back", "Home"):
        return Back() if name == "Back" else Home()
    raise FormatError(f"an action is of an unknown kind, expected one of {', '.join(_NAMES.values())}")


def _arguments(text: str) -> dict[str, str | tuple[int, int]]:
    found: dict[str, str | tuple[int, int]] = {}
    position = 0
    while position < len(text):
        match = _ARGUMENT.match(text, position)
        if match is None or match[1] in found:
            raise FormatError('an action has an argument that is not name="text" or name=[x,y], each name once')
        found[match[1]] = (int(match[3]), int(match[4])) if match[3] is not None else _unescape(match[2])
        position = match.end()
    return found


def _string(arguments: dict[str, str | tuple[int, int]], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise FormatError(f"an action lacks the text {name}=")
    return value


def _point(arguments: dict[str, str | tuple[int, int]], name: str) -> tuple[int, int]:
    value = arguments.get(name)
    if not isinstance(value, tuple) or max(value) > MAX_COORDINATE:
        raise FormatError(f"an action lacks the point {name}=[x,y] with coordinates 0 to {MAX_COORDINATE}")
    return value


def _seconds(text: str) -> int:
    match = re.fullmatch(r"(\d{1,4}) seconds?", text)
    if match is None:
        raise FormatError('an action lacks duration="N seconds"')
    return int(match[1])


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text, flags=re.DOTALL)
