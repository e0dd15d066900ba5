"""The doors before the routes, as plain ASGI: crash guard, browser origin, Host name, API key, CORS.

A server on a loopback address can be reached by every page the person's browser shows. So:
 * A request with an Origin header is refused unless the origin is allowed, or is this server itself
   under a name that cannot be rebound (an IP address or localhost).
 * On a loopback address the Host header must be an IP address, localhost or an allowed name, which
   stops DNS rebinding for requests that carry no Origin.
Programs (SDKs, curl) send no Origin and a Host of the first kind, and notice none of this.
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoglm.errors import AuthenticationError
from autoglm.server.problems import PlainHttpError, error_response, log_failure
from autoglm.server.settings import ServerSettings

OPEN_PATHS = frozenset({"/health", "/v1/health"})
CORS_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
    "Access-Control-Allow-Headers": "authorization, content-type, x-request-id",
    "Access-Control-Max-Age": "600",
}


def host_name(netloc: str) -> str:
    """The host of 'host:port', lower case, without brackets; '' when there is none."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_fixed_host(host: str) -> bool:
    """Whether a host name always means this machine or one address: an IP address or localhost."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class CrashGuard:
    """Outermost: an exception nobody expected is logged without its text and becomes a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_begun = False

        async def watched_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except Exception as error:
            log_failure(error, f"{scope['method'][:16]} request")
            if not has_begun:
                await error_response(error)(scope, receive, send)


class BrowserGuard:
    """Refuses foreign browser pages and rebound host names; adds CORS headers for allowed origins."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self.settings = settings
        self._hosts = {host.lower() for host in settings.allowed_hosts}
        self._hosts |= {host_name(origin.split("://", 1)[1]) for origin in settings.allowed_origins if origin != "*"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        refusal = self._check_host(scope, headers) or self._check_origin(origin, headers)
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)
            return
        if origin is None or not self._is_listed(origin):
            await self.app(scope, receive, send)
            return
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            reply = Response(status_code=204, headers={**CORS_HEADERS, **self._origin_headers(origin)})
            await reply(scope, receive, send)
            return

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._origin_headers(origin))
            await send(message)

        await self.app(scope, receive, send_with_cors)

    def _is_listed(self, origin: str) -> bool:
        return "*" in self.settings.allowed_origins or origin in self.settings.allowed_origins

    @staticmethod
    def _origin_headers(origin: str) -> dict[str, str]:
        return {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}

    def _check_host(self, scope: Scope, headers: Headers) -> PlainHttpError | None:
        server = scope.get("server")
        try:
            is_loopback = server is not None and ipaddress.ip_address(server[0]).is_loopback
        except ValueError:
            is_loopback = False
        host = host_name(headers.get("host", ""))
        if not is_loopback or is_fixed_host(host) or host in self._hosts:
            return None
        return PlainHttpError(
            403,
            "the Host header names a machine this loopback server does not know; use 127.0.0.1 or localhost, "
            "or start the server with that name among its allowed hosts",
            code="host_not_allowed",
        )

    def _check_origin(self, origin: str | None, headers: Headers) -> PlainHttpError | None:
        if origin is None or self._is_listed(origin):
            return None
        own = headers.get("host", "")
        if own and origin in (f"http://{own}", f"https://{own}") and is_fixed_host(host_name(own)):
            return None
        return PlainHttpError(
            403,
            "this server answers no web pages of other sites; start it with this page's origin among "
            "its allowed origins to let it in",
            code="origin_not_allowed",
        )


class KeyGuard:
    """Compares the bearer key in constant time. Without a key any request is let in."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app = app
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._key is None or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if hmac.compare_digest(given.encode("latin-1", "replace"), self._key):
            await self.app(scope, receive, send)
            return
        problem = "wrong API key" if given else "this server needs an API key; send it as 'Authorization: Bearer KEY'"
        await error_response(AuthenticationError(problem))(scope, receive, send)
