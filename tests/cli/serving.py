"""Starts `autoglm serve` as its own process for a test, reads its log, and ends it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(r"^INFO: Server running on port (\d+)$")


@dataclass
class ServerProcess:
    """A running server: its process, its port, what it logged."""

    process: subprocess.Popen[str]
    port: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stop(self, timeout_s: float = 60) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=timeout_s)


@contextmanager
def serving(*arguments: str, timeout_s: float = 120, **environment: str) -> Iterator[ServerProcess]:
    """Run `autoglm serve` on a free port and wait until it says that it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "autoglm", "serve", "--port", "0", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    server = ServerProcess(process)
    is_ready = threading.Event()

    def read_log() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.lines.append(line.rstrip("\n"))
            if match := READY.match(server.lines[-1]):
                server.port = int(match[1])
                is_ready.set()
        is_ready.set()

    reader = threading.Thread(target=read_log, daemon=True)
    reader.start()
    try:
        is_ready.wait(timeout_s)
        assert server.port, "the server did not start:\n" + "\n".join(server.lines)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=30)
        reader.join(timeout=10)
        assert process.stderr is not None
        process.stderr.close()
