"""Server-sent events: one ASGI response that keeps alive during silence and notices a client that left."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from autoglm.server.problems import error_object, error_status, log_failure

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
Result = TypeVar("Result")


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


def encode_event(data: dict[str, Any]) -> bytes:
    """One `data:` event; the JSON has no line breaks, so one line holds it."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has left. Only after the body was read whole."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_client_leaves(request: Request, work: Callable[[], Awaitable[Result]]) -> Result:
    """Run work for a plain reply; raises ClientGone, after cancelling it, when the client leaves first."""
    task = asyncio.ensure_future(work())
    watch = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        watch.cancel()
        if not task.done():
            with contextlib.suppress(Exception):
                await _end(task)
        await _end(watch)


class EventStream(Response):
    """Sends dicts as events, then [DONE].

    events          yields the JSON of each event
    on_close        called once, however the reply ends: the place to cancel the work behind it
    keep_alive_s    a comment is sent after so many seconds without an event
    An exception of `events` becomes one error event and the end, without [DONE].
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[dict[str, Any], None], *, on_close: Callable[[], None], keep_alive_s: float
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_close = on_close
        self._keep_alive_s = keep_alive_s
        self._last_sent_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(wait_for_disconnect(receive))
        writer = asyncio.ensure_future(self._write(send))
        try:
            await asyncio.wait({watch, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._on_close()
            await _end(watch, writer)
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        # One send is one write, so the two tasks cannot mix their bytes.
        keep_alive = asyncio.ensure_future(self._keep_alive(send))
        try:
            async for event in self._events:
                await self._send_body(send, encode_event(event))
            last = DONE
        except OSError:
            raise  # the connection broke; there is nobody to tell
        except Exception as error:
            if error_status(error) >= 500:
                log_failure(error, "a stream")
            last = encode_event(error_object(error))
        finally:
            await _end(keep_alive)
        await self._send_body(send, last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_body(self, send: Send, chunk: bytes) -> None:
        self._last_sent_s = time.monotonic()
        await send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            silent_s = time.monotonic() - self._last_sent_s
            if silent_s >= self._keep_alive_s:
                await self._send_body(send, KEEP_ALIVE)
                silent_s = 0.0
            await asyncio.sleep(self._keep_alive_s - silent_s)


class Job(Protocol):
    """A generation under way, for one request: told as events or as a whole; close() ends it either way."""

    def events(self) -> AsyncGenerator[dict[str, Any], None]: ...
    async def whole(self) -> Response: ...
    def close(self) -> None: ...


async def respond(
    request: Request, start: Callable[[], Awaitable[Job]], *, is_stream: bool, keep_alive_s: float
) -> Response:
    """The reply of a generating route: server-sent events, or one JSON body; ended when the client leaves."""
    if is_stream:
        job = await unless_client_leaves(request, start)
        return EventStream(job.events(), on_close=job.close, keep_alive_s=keep_alive_s)

    async def work() -> Response:
        job = await start()
        try:
            return await job.whole()
        finally:
            job.close()

    return await unless_client_leaves(request, work)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait for their end; a connection that broke under them is no news."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await task
