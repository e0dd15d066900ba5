"""A server on a scripted or hashing fake runner, in process or on a real socket; the engine itself is the real one."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from autoglm.chat.template import ChatTemplate
from autoglm.chat.tokenizer import Tokenizer
from autoglm.config import EngineConfig
from autoglm.engine.engine import Engine
from autoglm.formats.gguf import GGUFFile
from autoglm.server.app import create_app
from autoglm.server.driver import EngineDriver
from autoglm.server.settings import ServerSettings
from tests.server.scripted_runner import ScriptedRunner
from tests.tiny_models import TinyModel

MODEL_ID = "tiny-glm4"


@dataclass
class ServedModel:
    """Everything behind one test server."""

    app: Starlette
    driver: EngineDriver
    engine: Engine
    runner: ScriptedRunner
    tokenizer: Tokenizer

    def assert_idle(self, timeout_s: float = 5.0) -> None:
        """All sequences are gone and every KV block is free again, within a moment."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            stats = self.engine.stats()
            if not (stats.num_running or stats.num_waiting or stats.kv_blocks_used or self.driver.num_in_flight):
                return
            time.sleep(0.01)
        raise AssertionError(f"not idle: {self.engine.stats()}, {self.driver.num_in_flight} in flight")


@pytest.fixture(scope="session")
def glm4_parts(tiny_glm4: TinyModel) -> tuple[Tokenizer, ChatTemplate]:
    """Tokenizer and template of the tiny GLM-4."""
    with GGUFFile.open(tiny_glm4.path) as gguf:
        return Tokenizer.from_gguf(gguf), ChatTemplate.from_gguf(gguf, None)


ServeFunction = Callable[..., ServedModel]


@pytest.fixture
def serve(glm4_parts: tuple[Tokenizer, ChatTemplate]) -> Iterator[ServeFunction]:
    """serve(reply, ...) -> ServedModel with its engine thread running; stopped at the end of the test."""
    drivers: list[EngineDriver] = []

    def make(
        reply: str = "",
        *,
        engine_config: EngineConfig | None = None,
        api_key: str | None = None,
        aliases: tuple[str, ...] = (),
        settings: ServerSettings | None = None,
        start: bool = True,
        **runner_options: Any,
    ) -> ServedModel:
        tokenizer, template = glm4_parts
        runner = ScriptedRunner(tokenizer, reply, **runner_options)
        # Without drafts: how many steps an answer takes must not hang on the machine.
        engine = Engine(runner, tokenizer, engine_config or EngineConfig(draft_max=0))
        driver = EngineDriver(engine)
        app = create_app(
            driver, tokenizer, template, model_id=MODEL_ID, aliases=aliases, api_key=api_key, settings=settings
        )
        drivers.append(driver)
        if start:
            driver.start()
        return ServedModel(app, driver, engine, runner, tokenizer)

    yield make
    for driver in drivers:
        driver.stop()


@contextlib.asynccontextmanager
async def client_of(served: ServedModel, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client that calls the app in process."""
    transport = httpx.ASGITransport(app=served.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
        yield client


@contextlib.contextmanager
def on_socket(app: Starlette) -> Iterator[str]:
    """The app on a free loopback port, in a thread; yields the base URL."""
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        sock.close()


def chat_body(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    """A greedy chat request."""
    return {"model": MODEL_ID, "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


def events_of(text: str) -> list[Any]:
    """The data of every event of an SSE body; [DONE] as that string."""
    events = []
    for block in text.split("\n\n"):
        for line in block.splitlines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                events.append(data if data == "[DONE]" else json.loads(data))
    return events


def joined(events: list[Any], field: str, index: int = 0) -> str:
    """One delta field of one choice over a whole stream."""
    return "".join(
        choice["delta"].get(field) or ""
        for event in events
        if isinstance(event, dict)
        for choice in event.get("choices", ())
        if choice["index"] == index
    )
