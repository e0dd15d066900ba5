"""autoglm's server and llama.cpp's, each a process of its own, on one pair of files; and their streamed answers, timed.

The pair has AutoGLM-Phone-9B's layer shapes and random weights: 8 text layers (glm4_file.py) and 5 tower layers
(tower_file.py), which is nearly the real 40 to 24, so that text and pictures weigh as they do there. Random weights
answer nonsense: logit_bias makes every token of an answer the same one, on both servers, so that answers have the
length asked for, every token is text, and a history sent back is made of the very tokens that were computed.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare_llamacpp import HERE
from llama_server import find_llama_server, llama_server_version
from served import RESULTS, about_the_run, glm4v_files
from stream_client import content_of, stream

TOWER_LAYERS = 5
SCREEN_SIZE = (540, 1200)  # what both make 817 tokens of
ANSWER_TOKEN, ANSWER_TEXT = 8545, " a"  # in glm4_file.py's vocabulary, where it merges with no other
START_LIMIT_S = 300


class Server:
    """One server over the pair on a free loopback port, ready when this is made."""

    def __init__(self, name: str, command: list[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.port: int = sock.getsockname()[1]
        self.name = name
        self._log = tempfile.TemporaryFile()
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [*command, *address], stdout=self._log, stderr=self._log, env={**os.environ, "PYTHONPATH": path}
        )
        limit_s = time.monotonic() + START_LIMIT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > limit_s:
                self.stop()
                self._log.seek(0)
                raise SystemExit(f"{name} did not start; the end of its log:\n{self._log.read()[-2000:].decode()}")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def autoglm_command(ctx_size: int, threads: int) -> list[str]:
    """Its defaults, without drafts: an answer of one token over and over is too easy to guess.

    ctx_size is what one conversation may hold.
    """
    return [sys.executable, "-m", "autoglm", "serve", *_shared_flags(ctx_size, threads), "--draft-max", "0"]


def llama_command(ctx_size: int, threads: int, num_slots: int) -> list[str]:
    """Its defaults too (flash attention auto, prompt cache, continuous batching, batches of 2048 and 512).

    --parallel is named, since its prompt cache and context are divided by it; ctx_size is what one slot may hold.
    """
    return [str(find_llama_server()), *_shared_flags(ctx_size * num_slots, threads), "--parallel", str(num_slots)]


def _shared_flags(ctx_size: int, threads: int) -> list[str]:
    text, mmproj, template = map(str, glm4v_files(TOWER_LAYERS))
    files = ["--model", text, "--mmproj", mmproj, "--chat-template-file", template]
    return [*files, "--ctx-size", str(ctx_size), "--threads", str(threads)]


def positive(text: str) -> int:
    """A count on the command line."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def run_options(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """The options of every comparison of servers."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat: a smoke test, not a result")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--repeats", type=positive, default=repeats)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the plot")
    return parser


def about(threads: int, commands: list[list[str]]) -> dict[str, Any]:
    """What a results file begins with: machine, peer, pair of files and flags."""
    return {
        "machine": about_the_run(threads),
        "threads": threads,
        "llama_server": llama_server_version(find_llama_server()),
        "commands": [" ".join(Path(part).name for part in command) for command in commands],
        "tower_layers": TOWER_LAYERS,
        "screen": SCREEN_SIZE,
    }


@dataclass
class Answer:
    """A streamed answer: when it was asked for and when each of its tokens came, and what the server tells of it."""

    asked_s: float
    token_times_s: list[float] = field(default_factory=list)
    content: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    timings: dict[str, Any] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.asked_s

    @property
    def gaps_s(self) -> list[float]:
        """Between a token and the next."""
        return [b - a for a, b in zip(self.token_times_s, self.token_times_s[1:], strict=False)]


def ask(port: int, messages: list[dict[str, Any]], max_tokens: int) -> Answer:
    """Send a chat and read the whole answer; raises SystemExit unless it has just the tokens asked for."""
    body = {
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logit_bias": {str(ANSWER_TOKEN): 100},
        "stream_options": {"include_usage": True},
    }
    answer = Answer(time.perf_counter())
    for at_s, chunk in stream(port, body):
        text = content_of(chunk)
        answer.token_times_s += [at_s] * text.count(ANSWER_TEXT)  # a busy server may send two at once
        answer.content += text
        answer.timings = chunk.get("timings") or answer.timings
        usage = chunk.get("usage")
        if usage:
            answer.prompt_tokens = usage["prompt_tokens"]
            answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    if answer.content != ANSWER_TEXT * max_tokens:
        raise SystemExit(f"an answer has {len(answer.token_times_s)} of its tokens, expected {max_tokens} and no other")
    if answer.timings.get("draft_n"):
        raise SystemExit("the server drafts tokens, and these answers are all too easy to guess: nothing is compared")
    return answer
