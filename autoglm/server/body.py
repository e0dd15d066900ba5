"""Request body -> bounded bytes -> JSON -> checked pydantic model; every refusal names the field."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from autoglm.errors import RequestError
from autoglm.server.problems import PlainHttpError
from autoglm.server.settings import ServerSettings

Model = TypeVar("Model", bound=BaseModel)


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
    """One JSON object; nesting is bounded by the parser (200), NaN and Infinity are refused."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        # The parser's message gives the place (line, column) and never quotes the body.
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body is a JSON {_json_type(value)}, expected an object", code="invalid_json")
    return value


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


def validate(model: type[Model], value: object) -> Model:
    """The model, or a RequestError with the path of the first field that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        path = field_path(first["loc"])
        problem = "is required" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
        raise RequestError(f"{path or 'the body'}: {problem[:400]}", param=path or None, code=code) from None


async def read_object(request: Request, settings: ServerSettings) -> dict[str, Any]:
    """Read and parse one request body."""
    check_content_type(request)
    return parse_json(await read_body(request, settings))
