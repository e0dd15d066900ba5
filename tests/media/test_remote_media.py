"""Every trick with an address is refused before a byte is sent; what is allowed goes to the checked address."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from autoglm.errors import ConfigError, RequestError
from autoglm.media.limits import MediaLimits
from autoglm.media.remote_media import RemoteMedia, is_public, resolve_host

PUBLIC = "93.184.215.14"
OTHER_PUBLIC = "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
LIMITS = MediaLimits(remote_timeout_s=5.0)
# path -> whole HTTP answer
ANSWERS = {
    "/a.png": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "/chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "/missing": b"HTTP/1.1 404 No\r\nContent-Length: 6\r\n\r\nsecret",
    "/gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
    "/announced": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nhello",
    "/endless": b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 300_000,
    "/short": b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello",
    "/junk": b"SSH-2.0-OpenSSH_9.2\r\n",
    "/to-a": b"HTTP/1.1 302 Found\r\nLocation: /a.png\r\nContent-Length: 0\r\nSet-Cookie: a=b\r\n\r\n",
    "/loop": b"HTTP/1.1 301 Moved\r\nLocation: /loop\r\nContent-Length: 0\r\n\r\n",
    "/nowhere": b"HTTP/1.1 307 Moved\r\nContent-Length: 0\r\n\r\n",
}


def redirect(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


@dataclass
class Internet:
    """A name server and one web server on loopback that stands for every address, and what was asked of both."""

    port: int
    names: dict[str, list[list[str]]] = field(default_factory=dict)
    resolved: list[tuple[str, int]] = field(default_factory=list)
    connected: list[tuple[str, int | None]] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    tls: ssl.SSLContext = field(default_factory=lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    async def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append((host, port))
        answers = self.names.get(host)
        if answers is None:
            raise socket.gaierror(-2, "Name or service not known")
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def transport(self) -> httpx.AsyncBaseTransport:
        internet, real = self, httpx.AsyncHTTPTransport(verify=self.tls, trust_env=False)

        class ToLoopback(httpx.AsyncBaseTransport):
            async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
                internet.connected.append((request.url.host, request.url.port))
                if request.url.host in internet.dead:
                    raise httpx.ConnectError("refused")
                request.url = request.url.copy_with(host="127.0.0.1", port=internet.port)
                return await real.handle_async_request(request)

            async def aclose(self) -> None:
                await real.aclose()

        return ToLoopback()

    def remote(self, *hosts: str, limits: MediaLimits = LIMITS) -> RemoteMedia:
        return RemoteMedia(hosts, limits, resolve=self.resolve, transport=self.transport)


async def serve(internet: Internet, answers: dict[str, bytes], **options: ssl.SSLContext) -> asyncio.Server:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            internet.requests.append(head)
            path = head.split(b" ", 2)[1].decode()
            if path == "/slow":
                await asyncio.sleep(30)
            writer.write(answers[path])
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, **options)
    internet.port = server.sockets[0].getsockname()[1]
    return server


@pytest.fixture
async def internet() -> AsyncIterator[Internet]:
    web = Internet(0, names={"pics.example": [[PUBLIC]]})
    server = await serve(web, ANSWERS)
    yield web
    server.close()


async def refusal(remote: RemoteMedia, url: str) -> str:
    with pytest.raises(RequestError) as caught:
        await remote.fetch(url, max_bytes=100_000, param="field")
    assert caught.value.param == "field" and caught.value.status == 400
    return str(caught.value)


async def test_a_named_host_is_read_at_the_address_that_was_checked(internet: Internet) -> None:
    # The second answer of a rebinding name server is never asked for.
    internet.names["pics.example"] = [[PUBLIC], ["127.0.0.1"]]
    remote = internet.remote("Pics.Example.")
    assert await remote.fetch("http://PICS.example/a.png#x", max_bytes=5, param="field") == b"hello"
    assert internet.resolved == [("pics.example", 80)] and internet.connected == [(PUBLIC, None)]
    head = internet.requests[0].decode().lower()
    assert head.startswith("get /a.png http/1.1\r\n")
    assert "\r\nhost: pics.example\r\n" in head and "accept-encoding: identity" in head


async def test_redirects_are_followed_hop_by_hop_without_cookies(internet: Internet) -> None:
    assert await internet.remote("pics.example").fetch("http://pics.example/to-a", max_bytes=9, param="x") == b"hello"
    assert len(internet.resolved) == len(internet.connected) == 2
    assert b"cookie" not in internet.requests[1].lower()


async def test_the_next_address_is_tried_where_the_first_is_dead(internet: Internet) -> None:
    internet.names["pics.example"] = [[OTHER_PUBLIC, PUBLIC]]
    internet.dead = {OTHER_PUBLIC}
    assert (
        await internet.remote("pics.example").fetch("http://pics.example/chunked", max_bytes=9, param="x") == b"hello"
    )
    internet.dead.add(PUBLIC)
    assert "cannot be connected to" in await refusal(internet.remote("pics.example"), "http://pics.example/a.png")


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/a.png",
        "http://pics.example.evil.example/a.png",
        "http://evil-pics.example/a.png",
        "http://pics.example:8080/a.png",
        "http://pics.example:443/a.png",
        "https://pics.example:80/a.png",
        "http://127.0.0.1/a.png",
        "http://2130706433/a.png",
        "http://0x7f000001/a.png",
        "http://0177.0.0.1/a.png",
        "http://127.1/a.png",
        "http://[::1]/a.png",
        "http://[::ffff:127.0.0.1]/a.png",
        "http://[fe80::1%25eth0]/a.png",
        "http://localhost/a.png",
        "http://user:secret@pics.example/a.png",
        "http://pics.example@127.0.0.1/a.png",
        "http://pics.example\\@127.0.0.1/a.png",
        "http://pics.example%00.evil.example/",
        "http:///a.png",
        "http://",
        "http:pics.example/a.png",
        "http://[::1/a.png",
        "http://pics.example:99999/a.png",
        "http://pics.example:0x50/a.png",
        "http://pics.example/" + "a" * 9_000,
        "http://pics.exam\tple/a\r\nHost: x",
        "http://0/a.png",
        "http://017700000001/a.png",
        "http://0x7f.0.0.1/a.png",
        "http://127.0.0.1./a.png",
        "http://127\u30020\u30020\u30021/a.png",
        "http://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460/a.png",
        "http://\uff11\uff12\uff17.0.0.1/a.png",
        "http://127.0.0.1#@pics.example/",
        "http://127.0.0.1?@pics.example/",
        "http://127.0.0.1/@pics.example",
        "http://pics.example;127.0.0.1/",
        "http://pics.example%2f@127.0.0.1/",
        "http://pics.example:80@127.0.0.1:80/",
        "http://:@pics.example/",
        "http:/127.0.0.1/",
        "http:\\\\127.0.0.1\\a.png",
        "http://[0:0:0:0:0:0:0:1]/",
        "http://[::127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[64:ff9b::127.0.0.1]/",
        "http://pics.example.localhost/",
        "http://pics.example\u200b/",
        "http://pics.example\u2024evil.example/",
        "http://\u0440ics.example/",
        "http://pics.example\0.evil.example/",
    ],
)
async def test_addresses_that_are_not_the_named_host_are_refused_unasked(internet: Internet, url: str) -> None:
    await refusal(internet.remote("pics.example"), url)
    assert not internet.resolved and not internet.connected


PRIVATE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "100.100.100.200", "192.0.0.8", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.5", "224.0.0.1",
    "239.255.255.250", "240.0.0.1", "255.255.255.255", "168.63.129.16", "192.88.99.1",
    "::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1",
    "::ffff:93.184.215.14", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::1", "2002:5db8:d70e::",
    "2001::1", "2001:db8::1", "3fff::1", "100::1", "5f00::1", "not an address", "",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
async def test_a_name_for_an_address_that_is_not_public_is_refused(internet: Internet, address: str) -> None:
    assert not is_public(address)
    for answer in ([address], [PUBLIC, address]):
        internet.names["pics.example"] = [answer]
        assert "not public" in await refusal(internet.remote("pics.example"), "http://pics.example/a.png")
    assert not internet.connected


@pytest.mark.parametrize("address", [PUBLIC, OTHER_PUBLIC, "8.8.8.8", "172.32.0.1", "2a00:1450:4001:82a::200e"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "localhost", "[::1]"])
async def test_naming_a_private_host_opens_nothing(host: str) -> None:
    """By the system's own resolver, which reads every spelling of an address."""
    connected: list[str] = []

    def transport() -> httpx.AsyncBaseTransport:
        connected.append("opened")
        return httpx.AsyncHTTPTransport()

    await refusal(RemoteMedia([host], LIMITS, resolve=resolve_host, transport=transport), f"http://{host}/a.png")
    assert not connected


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/a.png",
        "http://inside.example/a.png",
        "//127.0.0.1/a.png",
        "http://[::1]:80/",
        "http://other.example/a.png",
        "file:///etc/passwd",
        "ftp://pics.example/a.png",
        "gopher://pics.example/",
        "http://user@pics.example/a.png",
        "http://pics.example:22/",
        "http://[::ffff:7f00:1]/",
        "http://x\x7f/",
    ],
)
async def test_redirects_are_held_to_the_same_rules(internet: Internet, location: str) -> None:
    server = await serve(internet, {"/go": redirect(location)})
    # A host that is named, but whose address is private, is not reached by a redirect either.
    internet.names["inside.example"] = [["10.0.0.1"]]
    await refusal(internet.remote("pics.example", "inside.example"), "http://pics.example/go")
    assert internet.connected == [(PUBLIC, None)]
    server.close()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/missing", "status 404"),
        ("/gzip", "compressed"),
        ("/announced", "larger than 100000"),
        ("/endless", "larger than 100000"),
        ("/short", "did not answer as it should"),
        ("/junk", "did not answer as it should"),
        ("/loop", "more than 3 redirects"),
        ("/nowhere", "redirects"),
        ("/slow", "no whole answer within 0.5 s"),
    ],
)
async def test_answers_that_are_no_file_are_refused(internet: Internet, path: str, words: str) -> None:
    limits = MediaLimits(remote_timeout_s=0.5) if path == "/slow" else LIMITS
    text = await refusal(internet.remote("pics.example", limits=limits), f"http://pics.example{path}")
    assert words in text and "secret" not in text


async def test_unknown_names_are_refused(internet: Internet) -> None:
    assert "cannot be read" in await refusal(internet.remote("gone.example"), "http://gone.example/a.png")


@pytest.mark.parametrize(
    "host", ["https://a.example", "a.example/x", "*", "*.example", "a@b.example", "", "a b", "a:x", "0177.0.0.1"]
)
def test_hosts_that_are_no_names_are_a_wrong_setting(host: str) -> None:
    with pytest.raises(ConfigError, match="--allow-remote-media"):
        RemoteMedia([host], LIMITS)


@pytest.mark.parametrize(
    ("host", "url"),
    [("a.example:8080", "http://a.example:8080/a.png"), ("a.example:80", "http://a.example/a.png")],
)
async def test_a_port_is_named_with_its_host(internet: Internet, host: str, url: str) -> None:
    internet.names["a.example"] = [[PUBLIC]]
    assert await internet.remote(host).fetch(url, max_bytes=9, param="x") == b"hello"
    await refusal(internet.remote(host), "http://a.example:81/a.png")


async def test_environment_proxies_are_not_used(internet: Internet, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert await internet.remote("pics.example").fetch("http://pics.example/a.png", max_bytes=9, param="x") == b"hello"
    real = RemoteMedia(["pics.example"], LIMITS)._direct()
    assert type(real._pool).__name__ == "AsyncConnectionPool"


@pytest.fixture
def certificate(tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Makes a self-signed certificate for a name: (certificate, key)."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")

    def make(name: str) -> tuple[Path, Path]:
        paths = tmp_path / "certificate.pem", tmp_path / "key.pem"
        options = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        names = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        files = ["-out", str(paths[0]), "-keyout", str(paths[1])]
        subprocess.run([openssl, "req", *options, *names, *files], check=True, capture_output=True)
        return paths

    return make


@pytest.mark.parametrize(("name", "is_read"), [("pics.example", True), ("other.example", False)])
async def test_tls_verifies_the_name_though_an_address_is_dialled(
    internet: Internet, certificate: Callable[[str], tuple[Path, Path]], name: str, is_read: bool
) -> None:
    paths = certificate(name)
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(*paths)
    server = await serve(internet, {**ANSWERS, "/down": redirect("http://pics.example/a.png")}, ssl=server_side)
    internet.tls = ssl.create_default_context(cafile=str(paths[0]))
    remote = internet.remote("pics.example")
    if is_read:
        assert await remote.fetch("https://pics.example/a.png", max_bytes=9, param="x") == b"hello"
        assert internet.resolved == [("pics.example", 443)]
        assert "less safe" in await refusal(remote, "https://pics.example/down")
    else:
        assert "cannot be connected to" in await refusal(remote, "https://pics.example/a.png")
    server.close()


async def test_a_certificate_nobody_signed_is_refused(
    internet: Internet, certificate: Callable[[str], tuple[Path, Path]]
) -> None:
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(*certificate("pics.example"))
    server = await serve(internet, ANSWERS, ssl=server_side)
    await refusal(internet.remote("pics.example"), "https://pics.example/a.png")
    assert not internet.requests
    server.close()
