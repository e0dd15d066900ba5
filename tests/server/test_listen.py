"""run_server in a process of its own: the last log line, a taken port, draining, and a log without content."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from autoglm.errors import ConfigError
from autoglm.server.port import reserve_socket
from tests.server.conftest import chat_body, events_of, joined
from tests.tiny_models import TinyModel

ROOT = Path(__file__).resolve().parents[2]
REPLY = "open the settings page and wait"


class ServerProcess:
    """A running server, its port, and what it wrote."""

    def __init__(self, model: TinyModel, *, port: int = 0, step_s: float = 0.0, drain_timeout_s: float = 30.0) -> None:
        arguments = [str(model.path), str(port), str(step_s), str(drain_timeout_s)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.server_process", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline().rstrip("\n")
        self.port = int(self.first_line.rsplit(" ", 1)[1]) if self.first_line else 0
        self.url = f"http://127.0.0.1:{self.port}"

    def end(self, timeout_s: float = 20.0) -> tuple[int, str]:
        """Exit code and everything the process wrote."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out + err


def slow_request(url: str, texts: list[str]) -> threading.Thread:
    """A streamed chat in a thread; its text goes into texts."""

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            body = chat_body("canary-prompt", stream=True, model="tiny")
            try:
                texts.append(client.post("/v1/chat/completions", json=body).text)
            except httpx.HTTPError as error:
                texts.append(type(error).__name__)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_the_last_line_is_said_when_it_listens(tiny_glm4: TinyModel) -> None:
    server = ServerProcess(tiny_glm4)
    assert server.first_line == f"INFO: Server running on port {server.port}"
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=chat_body("canary-prompt", model="tiny"))
    assert reply.json()["choices"][0]["message"]["content"] == REPLY
    httpx.post(f"{server.url}/v1/chat/completions", json={"canary": 1}, headers={"authorization": "Bearer canary"})
    httpx.get(f"{server.url}/canary")
    started_s = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    code, log = server.end()
    assert code == 0 and time.monotonic() - started_s < 5
    assert "canary" not in log and "Traceback" not in log


def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones(tiny_glm4: TinyModel) -> None:
    server = ServerProcess(tiny_glm4, step_s=0.15)
    texts: list[str] = []
    thread = slow_request(server.url, texts)
    time.sleep(0.6)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=chat_body(model="tiny"))
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    assert httpx.get(f"{server.url}/health").status_code == 503
    thread.join()
    assert joined(events_of(texts[0]), "content") == REPLY and events_of(texts[0])[-1] == "[DONE]"
    assert server.end()[0] == 0


def test_draining_is_bounded_and_tells_the_stream(tiny_glm4: TinyModel) -> None:
    server = ServerProcess(tiny_glm4, step_s=0.3, drain_timeout_s=0.5)
    texts: list[str] = []
    thread = slow_request(server.url, texts)
    time.sleep(0.8)
    started_s = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    thread.join()
    code, log = server.end()
    assert code == 0 and time.monotonic() - started_s < 3
    assert events_of(texts[0])[-1]["error"]["type"] == "service_unavailable_error"
    assert "canary" not in log


def test_a_second_signal_stops_at_once(tiny_glm4: TinyModel) -> None:
    server = ServerProcess(tiny_glm4, step_s=30)  # in the middle of a step, as a large model's prefill takes
    texts: list[str] = []
    thread = slow_request(server.url, texts)
    time.sleep(0.8)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    started_s = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    code, log = server.end()
    assert time.monotonic() - started_s < 10
    assert code == 1 and "canary" not in log
    thread.join()


def test_a_taken_port_is_one_line_with_the_mend(tiny_glm4: TinyModel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = ServerProcess(tiny_glm4, port=taken.getsockname()[1])
        code, log = server.end()
    errors = [line for line in log.splitlines() if line.startswith("ERROR")]
    assert code == ConfigError.exit_code and len(errors) == 1
    assert "taken" in errors[0] and "--port" in errors[0]


def test_reserving_says_what_is_wrong() -> None:
    for host, port, word in (
        ("no.such.host.invalid", 8000, "--host"),
        ("192.0.2.1", 8000, "--host"),
        ("127.0.0.1", 70000, "--port"),
    ):
        with pytest.raises(ConfigError, match=word):
            reserve_socket(host, port)
    with reserve_socket("127.0.0.1", 0) as sock:
        assert sock.getsockname()[1] > 0
