"""What the comparisons of servers rest on: answers clocked token by token, and refused where they prove nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TIMINGS = {"encode_ms": 3.0}


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import many_people
        import peer_servers

        yield peer_servers, many_people


class Peer(ThreadingHTTPServer):
    """Answers every chat with `pieces`, a chunk each, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pieces: list[str] = []
        self.timings: dict[str, Any] = TIMINGS
        self.bodies: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        peer = self.server
        assert isinstance(peer, Peer)
        peer.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()
        usage = {"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 32}}
        chunks: list[dict[str, Any]] = [{"choices": [{"delta": {"role": "assistant", "content": None}}]}]
        chunks += [{"choices": [{"delta": {"content": piece}}]} for piece in peer.pieces]
        chunks.append({"choices": [], "usage": usage, "timings": peer.timings})
        for chunk in chunks:
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_an_answer_is_clocked_token_by_token(modules: tuple[ModuleType, ModuleType], peer: Peer) -> None:
    peer.pieces = [" a", " a a"]
    answer = modules[0].ask(peer.server_address[1], [{"role": "user", "content": "go"}], 3)
    assert len(answer.token_times_s) == 3 and len(answer.gaps_s) == 2
    assert answer.asked_s <= answer.token_times_s[0] and answer.ttft_s >= 0 and answer.gaps_s[1] == 0
    assert (answer.content, answer.prompt_tokens, answer.cached_tokens) == (" a a a", 40, 32)
    assert answer.timings == TIMINGS
    body = peer.bodies[0]
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (3, True, 0)


@pytest.mark.parametrize("pieces", [[" a"] * 2, [" a"] * 4, [" a", " b", " a"]])
def test_an_answer_of_other_tokens_is_refused(
    modules: tuple[ModuleType, ModuleType], peer: Peer, pieces: list[str]
) -> None:
    peer.pieces = pieces
    with pytest.raises(SystemExit, match="expected 3"):
        modules[0].ask(peer.server_address[1], [], 3)


def test_a_server_that_drafts_is_refused(modules: tuple[ModuleType, ModuleType], peer: Peer) -> None:
    peer.pieces, peer.timings = [" a"], {"draft_n": 1}
    with pytest.raises(SystemExit, match="drafts"):
        modules[0].ask(peer.server_address[1], [], 1)


def test_everybody_of_a_crowd_asks_something_of_their_own(modules: tuple[ModuleType, ModuleType]) -> None:
    _, many_people = modules
    people = many_people.crowd(1, 4)
    assert people == many_people.crowd(1, 4), "the same for both servers"
    assert len({messages[0]["content"] for messages in people}) == 1
    assert [isinstance(messages[-1]["content"], list) for messages in people] == [True, False] * 2
    own = {json.dumps(messages[1:]) for crowd in (people, many_people.crowd(2, 4)) for messages in crowd}
    assert len(own) == 8
    pictures = {messages[-1]["content"][0]["image_url"]["url"] for messages in people[::2]}
    assert len(pictures) == 2


def test_arrivals(modules: tuple[ModuleType, ModuleType]) -> None:
    _, many_people = modules
    assert many_people.arrivals_s(1, 3, 0.0) == [0.0, 0.0, 0.0]
    times_s = many_people.arrivals_s(1, 200, 2.0)
    assert times_s == sorted(times_s) and times_s[0] == 0.0
    assert 1.5 < times_s[-1] / 199 < 2.5
