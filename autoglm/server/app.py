"""Routes, lifespan, exception -> (status, body) table, /metrics; run_server lives in listen.py."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoglm.chat.template import ChatTemplate
from autoglm.chat.tokenizer import Tokenizer
from autoglm.errors import AutoglmError, CapacityError, UnknownModelError
from autoglm.server.chat import chat_completions
from autoglm.server.completions import completions
from autoglm.server.driver import EngineDriver
from autoglm.server.guard import BrowserGuard, CrashGuard, KeyGuard
from autoglm.server.listen import run_server
from autoglm.server.media import MediaDoor
from autoglm.server.metrics import Metrics
from autoglm.server.problems import error_response, on_autoglm_error, on_http_exception
from autoglm.server.service import Service
from autoglm.server.settings import ServerSettings
from autoglm.server.sse import ClientGone
from autoglm.server.tokens import detokenize, tokenize

__all__ = ["create_app", "run_server"]

Answer = Callable[[Service, Request], Awaitable[Response]]

POST_ROUTES: dict[str, Answer] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}
GET_ROUTES = ("/v1/models", "/v1/models/{model_id:path}", "/health", "/metrics")


async def list_models(service: Service, http: Request) -> Response:
    """Every name this server answers to."""
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.model_names]})


async def get_model(service: Service, http: Request) -> Response:
    """One model; 404 for any other name."""
    name = str(http.path_params["model_id"])
    if not name:
        raise UnknownModelError("the path names no model")
    return JSONResponse(_model(service, service.check_model(name)))


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "autoglm",
        "max_model_len": service.max_context,
    }


async def health(service: Service, http: Request) -> Response:
    """200 while requests are taken; 503 with the reason while loading, draining or failed."""
    try:
        service.driver.check_ready()
    except CapacityError as error:
        return error_response(error)
    return JSONResponse({"status": "ok"})


async def metrics(service: Service, http: Request) -> Response:
    """Prometheus text format."""
    body, content_type = service.metrics.render()
    return Response(body, headers={"Content-Type": content_type})


class RequestCounter:
    """Counts replies by route and status; the route is one of ours or 'other', never a path a client made up."""

    def __init__(self, app: ASGIApp, counts: Metrics) -> None:
        self.app = app
        self._counts = counts
        self._routes = {*POST_ROUTES, *GET_ROUTES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._routes else "other"

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counts.requests.inc(labels=(path, str(message["status"])))
            await send(message)

        await self.app(scope, receive, counting_send)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    # Nobody reads this; 499 is what proxies write in their logs for it.
    return Response(status_code=499)


def create_app(
    driver: EngineDriver,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    model_id: str,
    aliases: Sequence[str] = (),
    api_key: str | None = None,
    max_context: int | None = None,
    settings: ServerSettings | None = None,
    read_stats: Callable[[], Any] | None = None,
    media: MediaDoor | None = None,
) -> Starlette:
    """The whole HTTP service around one engine driver.

    model_id, aliases  names taken in the `model` field
    api_key            None: any key and none are taken
    max_context        tokens one sequence may hold; the engine's own limit if None
    read_stats         gives an EngineStats for /metrics; the engine's own if None
    media              what reads pictures and sounds; None: text only
    The driver is started with the app's lifespan and stopped with it.
    """
    settings = settings or ServerSettings()
    service = Service(
        driver,
        tokenizer,
        template,
        model_id=model_id,
        aliases=aliases,
        max_context=max_context or driver.engine.max_sequence_tokens,
        settings=settings,
        read_stats=read_stats or driver.engine.stats,
        media=media,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        driver.start()
        yield
        driver.stop(drain=False)
        service.close()

    app = Starlette(
        routes=_routes(service),
        middleware=[
            Middleware(CrashGuard),
            Middleware(RequestCounter, counts=service.metrics),
            Middleware(BrowserGuard, settings=settings),
            Middleware(KeyGuard, api_key=api_key),
        ],
        exception_handlers={
            AutoglmError: on_autoglm_error,
            HTTPException: on_http_exception,
            ClientGone: _on_client_gone,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def _routes(service: Service) -> list[Route]:
    def endpoint(answer: Answer) -> Callable[[Request], Awaitable[Response]]:
        async def answer_request(request: Request) -> Response:
            return await answer(service, request)

        return answer_request

    posts = [Route(path, endpoint(answer), methods=["POST"]) for path, answer in POST_ROUTES.items()]
    answers = zip(GET_ROUTES, (list_models, get_model, health, metrics), strict=True)
    return posts + [Route(path, endpoint(answer), methods=["GET"]) for path, answer in answers]
