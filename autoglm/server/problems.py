"""Exceptions -> HTTP status, headers and OpenAI's error object."""

from __future__ import annotations

import logging
import traceback
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from autoglm.errors import AutoglmError, CapacityError, RequestError

logger = logging.getLogger("autoglm.server")

MAX_MESSAGE_CHARS = 1000


def error_object(error: BaseException) -> dict[str, Any]:
    """OpenAI's `{"error": {message, type, param, code}}` for any exception.

    An exception that is not ours says only that it happened: its text may quote the request.
    """
    if isinstance(error, AutoglmError):
        message = str(error)
        if len(message) > MAX_MESSAGE_CHARS:
            message = message[:MAX_MESSAGE_CHARS] + "..."
        kind, param, code = error.type, None, None
        if isinstance(error, RequestError):
            param, code = error.param, error.code
        elif isinstance(error, CapacityError):
            code = "queue_full" if error.status == 429 else "unavailable"
    else:
        message, kind, param, code = "the server failed on this request; see its log", "server_error", None, None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_status(error: BaseException) -> int:
    """The HTTP status an exception ends in."""
    return error.status if isinstance(error, AutoglmError) else 500


def error_response(error: BaseException) -> JSONResponse:
    """The whole error reply; a capacity error says when to come back."""
    headers = {}
    if isinstance(error, CapacityError):
        headers["Retry-After"] = str(max(1, error.retry_after_s))
    if error_status(error) in (408, 413):
        # The rest of the body is still coming; without this it would be read to its end and thrown away.
        headers["Connection"] = "close"
    if error_status(error) == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_object(error), status_code=error_status(error), headers=headers)


def log_failure(error: BaseException, where: str) -> None:
    """Write type and call stack of an unexpected exception, never its text: that may quote a request."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s failed with %s\n%s", where, type(error).__name__, frames)


class PlainHttpError(RequestError):
    """A refusal that has an HTTP status of its own (404 route, 405, 408, 413, 415, 403)."""

    def __init__(self, status: int, message: str, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.status = status


async def on_autoglm_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of everything we raise on purpose."""
    if error_status(error) >= 500 and not isinstance(error, CapacityError):
        log_failure(error, request.url.path)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Handler of the router's own refusals: unknown route, wrong method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message, code = f"there is no {request.method} {request.url.path[:200]} here", "not_found"
    elif error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "another method")
        message, code = f"{request.method} is not served at {request.url.path[:200]}; use {allow}", "method_not_allowed"
    else:
        message, code = HTTPStatus(error.status_code).phrase, None
    response = error_response(PlainHttpError(error.status_code, message, code=code))
    response.headers.update(error.headers or {})
    return response
