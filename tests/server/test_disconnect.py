"""A client that leaves, over a real socket: its sequences end within a step, whatever it was waiting for."""

from __future__ import annotations

import json
import socket
import time
from urllib.parse import urlsplit

import pytest

from autoglm.config import EngineConfig
from tests.server.conftest import ServedModel, ServeFunction, chat_body, on_socket


def send(url: str, path: str, body: dict[str, object]) -> socket.socket:
    """A request on a bare socket, so that the test decides when it goes away."""
    parts = urlsplit(url)
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    )
    sock = socket.create_connection((parts.hostname, parts.port), timeout=10)
    sock.sendall(head.encode() + b"\r\n\r\n" + data)
    return sock


def wait_until_running(served: ServedModel, num: int = 1) -> None:
    deadline = time.monotonic() + 10
    while served.engine.stats().num_running < num:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_leaving_frees_the_blocks_within_a_step(serve: ServeFunction, path: str, stream: bool) -> None:
    step_s = 0.1
    served = serve("", step_s=step_s, start=False)
    body = chat_body(stream=stream, n=3, ignore_eos=True, prompt="the phone", max_tokens=500)
    with on_socket(served.app) as url:
        sock = send(url, path, body)
        wait_until_running(served, 3)
        time.sleep(2 * step_s)
        num_steps = served.engine.stats().num_steps_total
        sock.close()
        left_s = time.monotonic()
        served.assert_idle()
        assert time.monotonic() - left_s < 4 * step_s
        assert served.engine.stats().num_steps_total - num_steps <= 2


def test_leaving_the_queue_does_not_disturb_who_runs(serve: ServeFunction) -> None:
    served = serve(
        "open the settings page and wait",
        step_s=0.02,
        start=False,
        engine_config=EngineConfig(max_num_seqs=1),
    )
    with on_socket(served.app) as url:
        first = send(url, "/v1/chat/completions", chat_body())
        wait_until_running(served)
        second = send(url, "/v1/chat/completions", chat_body(stream=True))
        deadline = time.monotonic() + 5
        while not served.engine.stats().num_waiting and time.monotonic() < deadline:
            time.sleep(0.002)
        second.close()
        reply = b""
        while b"timings" not in reply:
            reply += first.recv(65536)
        assert b"open the settings page and wait" in reply
        first.close()
        served.assert_idle()


def test_leaving_in_the_middle_of_a_body_is_nobodys_problem(serve: ServeFunction) -> None:
    served = serve("ok", start=False)
    with on_socket(served.app) as url:
        parts = urlsplit(url)
        for _ in range(20):
            sock = socket.create_connection((parts.hostname, parts.port), timeout=10)
            sock.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
                "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{".encode()
            )
            sock.close()
        sock = send(url, "/v1/chat/completions", chat_body())
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        sock.close()
        served.assert_idle()
