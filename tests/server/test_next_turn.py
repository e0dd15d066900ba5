"""The next turn of a phone agent, predicted and built while its client acts: fewer tokens to prefill, the same answers.

Over HTTP with the shipped Nano (gcmf) and a tiny random GLM-4.1V, by a client that keeps its history as Open-AutoGLM's.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image, ImageDraw
from starlette.testclient import TestClient

from autoglm.cli.loading import LoadedModel, ModelOptions, load_model
from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.media.limits import MediaLimits
from autoglm.media.sources import MediaSources
from autoglm.server.app import create_app
from autoglm.server.body import validate
from autoglm.server.driver import EngineDriver
from autoglm.server.media import MediaDoor
from autoglm.server.next_turn import next_messages
from autoglm.server.schemas import ChatRequest
from autoglm.server.settings import ServerSettings

TINY = Path(__file__).parents[1] / "fixtures" / "glm4v-tiny"
ANSWER = 'I see it.\n<answer>do(action="Tap", element=[1,2])'


def picture(number: int, width: int) -> dict[str, Any]:
    image = Image.new("RGB", (width, 2 * width), (20 * number, 200, 255 - 20 * number))
    ImageDraw.Draw(image).rectangle((number, 9, 40 + 3 * number, 50), fill=(9, 9, 9))
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def resent(answer: str) -> dict[str, Any]:
    """What the client makes of an answer: all before the action is its thought, whatever stands there."""
    thought, _, action = answer.partition("do(action=")
    return {"role": "assistant", "content": f"<think>{thought.strip()}</think><answer>do(action={action}</answer>"}


@dataclass
class Agent:
    """The client: one picture in a request, in its last turn."""

    client: TestClient
    fields: dict[str, Any]
    width: int
    history: list[dict[str, Any]] = field(default_factory=lambda: [{"role": "system", "content": "Act. " * 9}])
    num_turns: int = 0

    def step(self) -> tuple[str, dict[str, Any]]:
        """One turn: the answer, and its timings."""
        text = words(f"** Screen Info **\n\n{self.num_turns} tap settings")
        turn = {"role": "user", "content": [picture(self.num_turns, self.width), text]}
        body = {"messages": [*self.history, turn], "temperature": 0, "max_tokens": 60, **self.fields}
        reply = self.client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        answer = reply.json()["choices"][0]["message"]["content"]
        assert "do(action=" in answer, "random weights: choose other words"
        self.history += [{"role": "user", "content": [text]}, resent(answer)]
        self.num_turns += 1
        return answer, reply.json()["timings"]


@dataclass
class Rig:
    loaded: LoadedModel
    clients: dict[bool, TestClient]  # by whether it prebuilds
    fields: dict[str, Any]
    width: int

    def agent(self, salt: str, *, prebuild: bool) -> Agent:
        return Agent(self.clients[prebuild], {**self.fields, "cache_salt": salt}, self.width)

    def wait(self) -> None:
        """Until the engine has nothing left to do, some time after an answer."""
        deadline = time.monotonic() + 20
        before = -1
        while (now := self.loaded.engine.stats().num_prebuilt_tokens_total) != before or self.loaded.engine.has_work():
            assert time.monotonic() < deadline
            before = now
            time.sleep(0.15)


@pytest.fixture(scope="module", params=["nano", "glm4v"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    if request.param == "nano":
        path, options = Path(SHIPPED_MODELS["nano"].path), ModelOptions(model="nano", threads=2, takes_media=True)
    else:
        path = TINY / "main-f32.gguf"
        options = ModelOptions(model=str(path), mmproj=TINY / "mmproj-f32.gguf", threads=2)
    loaded = load_model(path, options, lambda what, done, total: None)
    assert loaded.multimodal is not None
    driver, door = EngineDriver(loaded.engine), MediaDoor(loaded.multimodal, MediaSources(MediaLimits()))
    clients = {}
    for prebuild in (True, False):
        settings = ServerSettings(actions=True, prebuild=prebuild)
        app = create_app(driver, loaded.tokenizer, loaded.template, model_id="m", settings=settings, media=door)
        clients[prebuild] = TestClient(app, base_url="http://127.0.0.1")
    width = 448 if request.param == "nano" else 56
    # "f" opens finish(, which would end the session.
    bias = {str(i): -100 for i in range(loaded.tokenizer.vocab_size) if loaded.tokenizer.token_text(i)[:1] == "f"}
    driver.start()
    yield Rig(loaded, clients, {"logit_bias": bias, "chat_template_kwargs": {"enable_thinking": False}}, width)
    driver.stop()


def test_a_session_is_answered_alike_and_prefills_less(rig: Rig) -> None:
    with_it, without = rig.agent("on", prebuild=True), rig.agent("off", prebuild=False)
    size, model = rig.loaded.engine.block_manager.block_size, rig.loaded.multimodal
    assert model is not None
    shape = model.picture_size(rig.width, 2 * rig.width)
    saved = 0
    for turn in range(3):
        stats = rig.loaded.engine.stats()
        (answer, told), (plain, other) = with_it.step(), without.step()
        assert answer == plain
        prefilled, wanted = (t["prompt_tokens"] - t["cached_tokens"] for t in (told, other))
        if turn:
            # The new picture, the words around it, and what is left of a block.
            assert prefilled <= shape.rows * shape.columns + 40 + size
            assert prefilled <= wanted - 2 * size
            hits = rig.loaded.engine.stats().num_prebuilt_hit_tokens_total - stats.num_prebuilt_hit_tokens_total
            assert hits == wanted - prefilled
        saved += wanted - prefilled
        rig.wait()
    assert saved >= 4 * size


def test_another_session_finds_nothing_of_it(rig: Rig) -> None:
    agent = rig.agent("first", prebuild=True)
    agent.step()
    rig.wait()
    stranger = rig.agent("second", prebuild=True)
    stranger.history, stranger.num_turns = list(agent.history), 1
    assert stranger.step()[1]["cached_tokens"] == 0


def request(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    return validate(ChatRequest, {"messages": list(messages), **fields})


SCREEN = {"role": "user", "content": [picture(1, 28), words("tap it")]}
BEFORE = [{"role": "system", "content": "s"}, {"role": "user", "content": [words("a")]}, resent(ANSWER)]


def test_what_the_client_will_send() -> None:
    found = next_messages(request(*BEFORE, SCREEN), ANSWER)
    assert found is not None
    assert [msgspec.to_builtins(message) for message in found] == [
        *BEFORE,
        {"role": "user", "content": [words("tap it")]},
        resent(ANSWER),
        SCREEN,
    ]


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (request(*BEFORE, SCREEN), "It shows the settings."),
        (request(*BEFORE, SCREEN), 'finish(message="do(action= is not needed")'),
        (request(*BEFORE, {"role": "user", "content": "tap it"}), ANSWER),
        (request(SCREEN, resent(ANSWER), SCREEN), ANSWER),
        (request(*BEFORE, SCREEN, tools=[{"type": "function", "function": {"name": "f"}}]), ANSWER),
    ],
    ids=["no action", "last action", "no picture", "pictures are kept", "tools"],
)
def test_no_guess_where_another_client_is_likely(asked: ChatRequest, answer: str) -> None:
    assert next_messages(asked, answer) is None
