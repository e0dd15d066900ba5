"""Every trick with an address, sent to a server that may fetch: a canary on loopback never hears of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from autoglm.cli.loading import ModelOptions, load_model
from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.media.limits import MediaLimits
from autoglm.media.sources import MediaSources
from autoglm.server.app import create_app
from autoglm.server.driver import EngineDriver
from autoglm.server.media import MediaDoor
from tests.cli.serving import ServerProcess, serving
from tests.media.parts import picture_file
from tests.media.picture_files import noise
from tests.media.test_remote_media import PUBLIC, Internet, redirect, serve


class Canary:
    """Listens on loopback, IPv4 and IPv6 on one port, and counts who comes."""

    def __init__(self) -> None:
        self.num_heard = 0
        self.sockets = [socket.create_server(("127.0.0.1", 0))]
        self.port: int = self.sockets[0].getsockname()[1]
        if socket.has_ipv6:
            try:
                self.sockets.append(socket.create_server(("::1", self.port), family=socket.AF_INET6))
            except OSError:  # a machine without IPv6
                pass
        for sock in self.sockets:
            threading.Thread(target=self._listen, args=(sock,), daemon=True).start()

    def _listen(self, sock: socket.socket) -> None:
        while True:
            try:
                connection, _ = sock.accept()
            except OSError:
                return
            self.num_heard += 1
            connection.close()

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    canary = Canary()
    socket.create_connection(("127.0.0.1", canary.port)).close()
    while canary.num_heard == 0:  # it does hear
        time.sleep(0.01)
    canary.num_heard = 0
    yield canary
    canary.close()


# All of these are allowed by name, so that it is their address that keeps them out.
HOSTS = (
    "127.0.0.1", "localhost", "[::1]", "127.1", "2130706433", "0x7f000001", "0", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]",
)  # fmt: skip


@dataclass
class Served:
    """A server that may read `folder` and fetch from HOSTS."""

    process: ServerProcess
    folder: Path
    client: httpx.Client

    def ask(self, part: dict[str, Any]) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
        return self.client.post("/chat/completions", json=body)


@pytest.fixture(scope="module")
def server(canary: Canary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("media")
    (folder / "inside.png").write_bytes(picture_file(noise(64, 64)))
    (folder.parent / "secret.png").write_bytes(picture_file(noise(64, 64)))
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    flags = [flag for host in HOSTS for flag in ("--allow-remote-media", f"{host}:{canary.port}")]
    with serving("-m", "nano", "--media-path", str(folder), *flags) as process:
        with httpx.Client(base_url=process.url, timeout=60) as client:
            yield Served(process, folder, client)


def forms(url: str) -> list[dict[str, Any]]:
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "audio_url", "audio_url": {"url": url}},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
    ]


@pytest.mark.parametrize("host", HOSTS)
def test_allowed_names_of_this_machine_are_not_reached(server: Served, canary: Canary, host: str) -> None:
    url = f"http://{host}:{canary.port}/a.png"
    for part in forms(url)[:3]:
        reply = server.ask(part)
        assert reply.status_code == 400 and reply.json()["error"]["param"].endswith(".url")
        # Refused for its address, or because the resolver does not know that spelling of it.
        words = reply.json()["error"]["message"]
        assert "not public" in words or "cannot be read" in words
    assert canary.num_heard == 0


TRICKS = [
    "http://localhost@127.0.0.1:{port}/", "http://user:pass@localhost:{port}/", "http://localhost:{port}@127.0.0.1/",
    "http://localhost:{port}\\@127.0.0.1/", "//127.0.0.1:{port}/", " http://127.0.0.1:{port}/", "http:127.0.0.1:{port}",
    "http:/127.0.0.1:{port}/", "http:\\\\127.0.0.1:{port}\\", "ht\ntp://127.0.0.1:{port}/", "HTTP://LOCALHOST:{port}/",
    "https://localhost:{port}/", "http://localhost.:{port}/", "http://0177.0.0.1:{port}/", "http://127.0.0.2:{port}/",
    "http://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460:{port}/", "http://127\u30020\u30020\u30021:{port}/",
    "http://[::1%25lo]:{port}/", "http://[::ffff:7f00:0001]:{port}/", "http://[::1:{port}/", "http://%6cocalhost:{port}/",
    "ftp://127.0.0.1:{port}/", "gopher://127.0.0.1:{port}/_x", "dict://127.0.0.1:{port}/x", "ws://127.0.0.1:{port}/",
    "jar:http://127.0.0.1:{port}!/", "unix:/tmp/x", "http+unix://%2ftmp%2fx/", "blob:http://127.0.0.1:{port}/x",
    "file:///etc/passwd", "file:/etc/passwd", "FILE:///etc/passwd", "file://localhost/etc/passwd",
    "file://127.0.0.1/etc/passwd", "%66ile:///etc/passwd", "file:///proc/self/environ", "file:////etc/passwd",
    "file://{folder}/../secret.png", "file://{folder}/%2e%2e/secret.png", "file://{folder}/link.png",
    "file://{folder}/inside.png%00.png", "file://{folder}/inside.png?x", "file://{folder}", "file:inside.png",
    "{folder}/inside.png", "/etc/passwd", "\\\\127.0.0.1\\share\\a.png",
]  # fmt: skip


def test_tricks_are_refused_and_quoted_nowhere(server: Served, canary: Canary) -> None:
    inside = server.ask(forms(f"file://{server.folder}/inside.png")[0])
    assert inside.status_code == 200, "the folder itself is readable"
    for trick in TRICKS:
        for part in forms(trick.format(port=canary.port, folder=server.folder)):
            reply = server.ask(part)
            assert reply.status_code == 400, (trick, reply.text)
            words = reply.json()["error"]["message"]
            assert "passwd" not in words and "secret" not in words and "root:" not in words, trick
    assert canary.num_heard == 0
    log = "\n".join(server.process.lines)
    assert "passwd" not in log and "secret" not in log and "Traceback" not in log


@pytest.mark.parametrize(
    "location", ["http://127.0.0.1/a.png", "http://inside.example/a.png", "file:///etc/passwd", "//[::1]/a.png"]
)
async def test_a_redirect_to_this_machine_is_refused_over_the_server(location: str) -> None:
    """The one case that needs a public host to begin with: a made-up internet behind the real server's door."""
    web = Internet(0, names={"pics.example": [[PUBLIC]], "inside.example": [["10.0.0.1"]]})
    png = picture_file(noise(64, 64))
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(png), png)
    listener = await serve(web, {"/go": redirect(location), "/a.png": whole})
    loaded = load_model(
        SHIPPED_MODELS["nano"].path,
        ModelOptions(model="nano", threads=1, ctx_size=512, takes_media=True),
        lambda what, done, total: None,
    )
    assert loaded.multimodal is not None
    sources = MediaSources(MediaLimits(), remote=web.remote("pics.example", "inside.example"))
    driver = EngineDriver(loaded.engine)
    app = create_app(
        driver, loaded.tokenizer, loaded.template, model_id="nano", media=MediaDoor(loaded.multimodal, sources)
    )
    driver.start()
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            statuses = []
            for path in ("a.png", "go"):
                content = [{"type": "image_url", "image_url": {"url": f"http://pics.example/{path}"}}]
                body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
                statuses.append((await client.post("/v1/chat/completions", json=body)).status_code)
    finally:
        driver.stop()
        listener.close()
    assert statuses == [200, 400]
    assert web.connected == [(PUBLIC, None)] * 2
