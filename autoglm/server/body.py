"""Request body -> bounded bytes -> JSON -> checked request type; every refusal names the field."""

from __future__ import annotations

import asyncio
import re
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from autoglm.errors import RequestError
from autoglm.server.problems import PlainHttpError
from autoglm.server.schemas import Body, take
from autoglm.server.settings import ServerSettings

MAX_DEPTH = 200
Model = TypeVar("Model", bound=Body)

# 1e999 is JSON: the field that holds it refuses it by name, as float makes it infinite.
_decoder = msgspec.json.Decoder(float_hook=float)


async def read_body(request: Request, settings: ServerSettings) -> bytes:
    """The body, at most max_body_bytes of it; the limit is met before more than that is held."""
    limit = settings.max_body_bytes
    too_large = PlainHttpError(413, f"the body is larger than this server's limit of {limit} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and len(declared) < 20 and int(declared) > limit:
        raise too_large
    pieces: list[bytes] = []
    num_bytes = 0
    stream = request.stream()
    while True:
        try:
            piece = await asyncio.wait_for(stream.__anext__(), settings.body_timeout_s)
        except StopAsyncIteration:
            return b"".join(pieces)
        except (asyncio.TimeoutError, TimeoutError):
            raise PlainHttpError(408, f"the body did not arrive within {settings.body_timeout_s:g} s") from None
        except ClientDisconnect:
            raise PlainHttpError(400, "the client left before its body arrived") from None
        num_bytes += len(piece)
        if num_bytes > limit:
            raise too_large
        pieces.append(piece)


def check_content_type(request: Request) -> None:
    """JSON only: a page cannot send application/json to another site without the browser asking first."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise PlainHttpError(415, "the body must be sent as JSON, with the header 'Content-Type: application/json'")


def parse_json(body: bytes) -> dict[str, Any]:
    """One JSON object, at most MAX_DEPTH levels deep; NaN and Infinity are refused."""
    try:
        value = _decoder.decode(body)
        is_too_deep = _is_too_deep(value)
    except RecursionError:
        is_too_deep = True
    except ValueError as error:
        # The parser's message gives the place and never quotes the body.
        problem = str(error).removeprefix("JSON is malformed: ").split(" - at ")[0]
        raise RequestError(f"the body is not valid JSON: {problem}", code="invalid_json") from None
    if is_too_deep:
        raise RequestError(f"the body is nested more than {MAX_DEPTH} levels deep", code="invalid_json")
    if not isinstance(value, dict):
        raise RequestError(f"the body is a JSON {_json_type(value)}, expected an object", code="invalid_json")
    return value


def _is_too_deep(value: object) -> bool:
    """Whether more than MAX_DEPTH lists and objects stand in each other, empty ones not counted."""
    level = [value] if isinstance(value, (list, dict)) else []
    for _ in range(MAX_DEPTH):
        members = (item.values() if isinstance(item, dict) else item for item in level)
        level = [member for each in members for member in each if member and type(member) in (list, dict)]
        if not level:
            return False
    return True


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return names.get(type(value), "value")


def field_path(location: tuple[int | str, ...]) -> str:
    """('messages', 0, 'content') -> 'messages[0].content', bounded."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path[:200]


def validate(model: type[Model], value: dict[str, Any]) -> Model:
    """The request, or a RequestError with the path of the first field that is wrong, as declared."""
    model.refuse_unserved(value)
    try:
        try:
            return msgspec.convert(value, model, dec_hook=take)
        except msgspec.ValidationError:
            msgspec.convert(_in_declared_order(value), model, dec_hook=take)
            raise
    except msgspec.ValidationError as error:
        raise _request_error(str(error)) from None


def _in_declared_order(value: object) -> object:
    """The same value; msgspec reads the fields of a mapping that is no dict in the order of their declaration."""
    if isinstance(value, dict):
        return MappingProxyType({name: _in_declared_order(member) for name, member in value.items()})
    return [_in_declared_order(item) for item in value] if isinstance(value, list) else value


_MISSING = re.compile("Object missing required field `(.*)`")
_PATTERN = re.compile(r"Expected `str` matching regex '\^(.*)\\\\Z'")
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "a boolean",
    "array": "a list",
    "object": "an object",
    "mappingproxy": "an object",
}


def _request_error(problem: str) -> RequestError:
    """msgspec's message, such as "Expected `int | null`, got `str` - at `$.n`", in our words; it quotes no value."""
    problem, *places = problem.split(" - at `$")
    # A field's own `take` names the place within the field first.
    path = "".join(place.rstrip("`") for place in reversed(places)).removeprefix(".")
    missing = _MISSING.fullmatch(problem)
    if missing:
        path = field_path((path, missing[1]))
        return RequestError(f"{path}: is required", param=path, code="missing_required_parameter")
    return RequestError(f"{path or 'the body'}: {_wording(problem)}", param=path or None, code="invalid_value")


def _wording(problem: str) -> str:
    """'Expected `int | null`, got `str`' -> 'expected an integer, got a string'; a pattern's choices are listed."""
    pattern = _PATTERN.fullmatch(problem)
    if pattern and pattern[1].startswith("("):
        *others, last = pattern[1].strip("()").split("|")
        return "must be " + " or ".join(filter(None, (", ".join(others), last)))
    if pattern:
        return f"must match {pattern[1]}"
    problem = problem.replace("got `float`", "got a decimal number")
    return re.sub("`(.*?)`", lambda names: _type_names(names[1]), problem[:1].lower() + problem[1:])


def _type_names(names: str) -> str:
    return " or ".join(_TYPES[name] for name in names.split(" | ") if name != "null") or "null"


async def read_object(request: Request, settings: ServerSettings) -> dict[str, Any]:
    """Read and parse one request body."""
    check_content_type(request)
    return parse_json(await read_body(request, settings))
