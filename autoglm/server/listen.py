"""Run uvicorn on a reserved port, announce it, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from autoglm.errors import ConfigError
from autoglm.server.driver import EngineDriver
from autoglm.server.port import bind_problem, reserve_socket
from autoglm.server.service import Service

logger = logging.getLogger("autoglm.server")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
BACKLOG = 512
IDLE_CONNECTION_S = 75


class DrainingServer(uvicorn.Server):
    """uvicorn with our announcement and our way to stop.

    The first SIGTERM or SIGINT drains: new work gets 503, running requests finish, bounded by
    drain_timeout_s, then run_server returns. The second one stops at once.
    """

    def __init__(
        self, config: uvicorn.Config, driver: EngineDriver, drain_timeout_s: float, announce: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._driver = driver
        self._drain_timeout_s = drain_timeout_s
        self._announce = announce
        self._num_signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_task: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            self._announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Like uvicorn's, but a drained server ends with exit code 0 instead of raising the signal again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signal handler: drain first, then stop."""
        self._num_signals += 1
        if self._num_signals > 1 or self._loop is None:
            self.force_exit = self.should_exit = True
            return
        self._driver.begin_drain()
        self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._drain_task = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        deadline_s = asyncio.get_running_loop().time() + self._drain_timeout_s
        while self._driver.num_in_flight and not self.should_exit:
            if asyncio.get_running_loop().time() >= deadline_s:
                logger.warning("stopping with %d requests unfinished", self._driver.num_in_flight)
                break
            await asyncio.sleep(0.05)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the engine first, so that unfinished streams get their error event, then the connections."""
        self._driver.request_stop()
        while self._driver.is_running and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def run_server(
    app: Starlette,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    sock: socket.socket | None = None,
    log: Callable[[str], None] | None = None,
) -> None:
    """Serve until a signal ends it; returns after a clean drain.

    sock  from reserve_socket, where the caller wanted the port before loading a model
    log   called once with "INFO: Server running on port N" when the server listens; prints it if None
    Raises ConfigError if the port cannot be had. A second signal during a long step ends the process with 1.
    """
    sock = sock or reserve_socket(host, port)
    service: Service = app.state.service
    actual_port = sock.getsockname()[1]
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        # Two programs may have reserved a port; only one gets to listen.
        sock.close()
        raise ConfigError(bind_problem(host, actual_port, error)) from None

    def announce() -> None:
        line = f"INFO: Server running on port {actual_port}"
        if log is None:
            print(line, flush=True)
        else:
            log(line)

    config = uvicorn.Config(
        app,
        log_config=None,  # our loggers; and no access log, which would hold paths clients made up
        access_log=False,
        log_level=logging.WARNING,
        lifespan="on",
        timeout_keep_alive=IDLE_CONNECTION_S,
        timeout_graceful_shutdown=5,
        backlog=BACKLOG,
        server_header=False,
        ws="none",
        h11_max_incomplete_event_size=64 << 10,
    )
    server = DrainingServer(config, service.driver, service.settings.drain_timeout_s, announce)
    server.run(sockets=[sock])
    if server.force_exit and service.driver.is_running:
        # A step of a large model takes seconds, and an interpreter that ends while native code runs may crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
