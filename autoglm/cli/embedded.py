"""The HTTP server inside this process, on a thread and a free loopback port, for as long as a `with` block lasts."""

from __future__ import annotations

import socket
import threading
import time
from types import TracebackType

import uvicorn

from autoglm.cli.loading import LoadedModel
from autoglm.cli.media_door import open_door
from autoglm.errors import EngineError
from autoglm.media.limits import MediaLimits
from autoglm.media.sources import MediaSources
from autoglm.server.app import create_app
from autoglm.server.driver import EngineDriver

_START_TIMEOUT_S = 30.0


class EmbeddedServer:
    """Serves one loaded model on 127.0.0.1; url ends in /v1. Behind the key only, since other users share loopback."""

    def __init__(self, loaded: LoadedModel, *, api_key: str) -> None:
        self._driver = EngineDriver(loaded.engine)
        app = create_app(
            self._driver,
            loaded.tokenizer,
            loaded.template,
            model_id=loaded.model_id,
            aliases=(),
            api_key=api_key,
            media=open_door(loaded, MediaSources(MediaLimits())),
        )
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"

    def __enter__(self) -> EmbeddedServer:
        self._driver.start()
        self._thread.start()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise EngineError("the server part did not start")
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._driver.stop()
        self._socket.close()
