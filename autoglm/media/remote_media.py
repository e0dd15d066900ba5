"""Media from http(s) hosts the operator named, never from a private address.

A server that fetches addresses for its clients can be sent to its own network. So every hop, redirects too, must name
an allowed host; the name is resolved once, each address it has must be public, and the connection is made to the
address that was checked, so that a second answer of the name server changes nothing. TLS still verifies the name. No
proxies, cookies or credentials, nothing from the environment. Allowed hosts with private addresses are refused too:
mount their files and use a media folder instead. IPv6 addresses that carry an IPv4 one (mapped, 6to4, Teredo, NAT64)
are refused without looking at it.

Sources of the ranges: IANA special-purpose registries, in Python's ipaddress; IPv6 global unicast 2000::/3, RFC 4291.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING

from autoglm.errors import ConfigError, RequestError
from autoglm.media.limits import MediaLimits

if TYPE_CHECKING:
    import httpx  # read when a host is named: a tenth of what a start imports, and few servers fetch

Resolver = Callable[[str, int], Awaitable[list[str]]]

MAX_URL_LENGTH = 8_192
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_REFUSED_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # a cloud's host agent, at a public address
        "192.0.0.0/24",  # protocol assignments, of which older Pythons know a few
        "192.88.99.0/24",  # 6to4 relays
        "2001::/23",  # protocol assignments, Teredo in them
        "2002::/16",  # 6to4
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
    )
)


async def resolve_host(host: str, port: int) -> list[str]:
    """The addresses of a host by the system's resolver, best first."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Whether an address, as a resolver gives it, is one machine of the public internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if any(ip.version == network.version and ip in network for network in _REFUSED_NETWORKS):
        return False
    if ip.version == 6 and ip not in _GLOBAL_UNICAST:
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


class RemoteMedia:
    """Fetches from `hosts`: "example.com" at its scheme's own port, or "example.com:8080" at that one.

    resolve    host and port -> addresses, for tests
    transport  makes the transport of one hop, for tests
    Raises ConfigError for a host that is no name.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        limits: MediaLimits,
        *,
        resolve: Resolver = resolve_host,
        transport: Callable[[], httpx.AsyncBaseTransport] | None = None,
    ) -> None:
        self._allowed = frozenset(_allowed_host(host) for host in hosts)
        self._limits = limits
        self._resolve = resolve
        self._tls: ssl.SSLContext | None = None
        self._transport = transport or self._direct

    async def fetch(self, url: str, *, max_bytes: int, param: str) -> bytes:
        """The body at `url`. Raises RequestError: address not allowed, no answer, too slow, too large."""
        import httpx

        try:
            return await asyncio.wait_for(self._follow(url, max_bytes, param), self._limits.remote_timeout_s)
        except asyncio.TimeoutError:
            why = f"no whole answer within {self._limits.remote_timeout_s:g} s"
            raise _refusal(param, why) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ssl.SSLError, OSError, ValueError):
            raise _refusal(param, "the address cannot be read, or its host did not answer as it should") from None

    async def _follow(self, text: str, max_bytes: int, param: str) -> bytes:
        import httpx

        if len(text) > MAX_URL_LENGTH:
            raise _refusal(param, f"an address has at most {MAX_URL_LENGTH} characters")
        url = httpx.URL(text)
        for _ in range(self._limits.max_redirects + 1):
            host, port = self._checked(url, param)
            answer = await self._get(url, host, await self._addresses(host, port, param), max_bytes, param)
            if isinstance(answer, bytes):
                return answer
            if url.scheme == "https" and answer.scheme != "https":
                raise _refusal(param, "the host redirects from https to something less safe")
            url = answer
        raise _refusal(param, f"more than {self._limits.max_redirects} redirects")

    def _checked(self, url: httpx.URL, param: str) -> tuple[str, int]:
        """Host and port of an address that may be asked; nothing has been sent yet."""
        if url.scheme not in _PORTS:
            raise _refusal(param, "the host redirects to something that is not http(s)")
        if url.userinfo:
            raise _refusal(param, "an address must not hold a name or password")
        host = url.raw_host.decode("ascii").lower().rstrip(".")
        port = url.port or _PORTS[url.scheme]
        name = (host, None if url.port in (None, _PORTS[url.scheme]) else port)
        if not host or (name not in self._allowed and (host, port) not in self._allowed):
            raise _refusal(param, f"the host {host[:80]!r} is not one that --allow-remote-media names")
        return host, port

    async def _addresses(self, host: str, port: int, param: str) -> list[str]:
        addresses = await self._resolve(host, port)
        if not addresses or not all(is_public(address) for address in addresses):
            raise _refusal(param, f"the host {host[:80]!r} has no address, or one that is not public")
        return addresses

    async def _get(
        self, url: httpx.URL, host: str, addresses: list[str], max_bytes: int, param: str
    ) -> bytes | httpx.URL:
        """The body, or where a redirect leads. Other addresses are tried where the first cannot be connected to."""
        import httpx

        headers = {"Host": url.netloc.decode("ascii"), "Accept": "*/*", "Accept-Encoding": "identity"}
        timeout_s = self._limits.remote_timeout_s
        extensions = {"sni_hostname": host, "timeout": httpx.Timeout(timeout_s).as_dict()}
        for address in addresses:
            request = httpx.Request("GET", url.copy_with(host=address), headers=headers, extensions=extensions)
            # Straight to the transport: a client would log the address, keep cookies and read the environment.
            async with self._transport() as transport:
                try:
                    response = await transport.handle_async_request(request)
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    continue
                async with aclosing(response):
                    if response.status_code in _REDIRECTS:
                        return url.join(response.headers.get("location", ""))
                    return await _body(response, max_bytes, param)
        raise _refusal(param, f"the host {host[:80]!r} cannot be connected to")

    def _direct(self) -> httpx.AsyncHTTPTransport:
        import httpx

        if self._tls is None:
            self._tls = httpx.create_ssl_context(trust_env=False)
        return httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False)


async def _body(response: httpx.Response, max_bytes: int, param: str) -> bytes:
    if response.status_code != 200:
        raise _refusal(param, f"its host answered with status {response.status_code}")
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise _refusal(param, "its host compressed the answer, though asked not to")
    announced = response.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced[:20]) > max_bytes:
        raise _refusal(param, f"the file is larger than {max_bytes} bytes")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise _refusal(param, f"the file is larger than {max_bytes} bytes")
    return bytes(body)


def _allowed_host(text: str) -> tuple[str, int | None]:
    """(name, port or None for the scheme's own), as addresses are compared with."""
    import httpx

    try:
        if not re.search(r"[/?#@*\s]", text):
            url = httpx.URL(f"http://{text}")
            host = url.raw_host.decode("ascii").lower().rstrip(".")
            # httpx forgets a port 80, which was asked for all the same.
            port = re.search(r":(\d+)$", text)
            if host:
                return host, int(port[1]) if port else None
    except (httpx.InvalidURL, ValueError):
        pass
    raise ConfigError(f"--allow-remote-media takes host names such as example.com or example.com:8080, got {text!r}")


def _refusal(param: str, what: str) -> RequestError:
    return RequestError(f"{param}: {what}", param=param, code="invalid_media_url")
