"""Open-AutoGLM's agent works against the server: what the model wrote arrives as the action it wrote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from autoglm.actions import FORMS
from autoglm.cli.loading import LoadedModel, ModelOptions, load_model
from autoglm.config import EngineConfig
from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.engine.engine import Engine
from autoglm.media.limits import MediaLimits
from autoglm.media.sources import MediaSources
from autoglm.server.app import create_app
from autoglm.server.driver import EngineDriver
from autoglm.server.media import MediaDoor
from autoglm.server.settings import ServerSettings
from autoglm.train.world.screens import draw_screen
from tests.cli.serving import serving
from tests.media.parts import base64_of, picture_file
from tests.server.conftest import on_socket
from tests.server.open_autoglm import ACTIONS, MODEL, Agent, read_action, thought_and_action
from tests.server.scripted_runner import ScriptedRunner

SYSTEM_PROMPT = "\n".join(
    [
        "Today's date is 2026-11-23, Monday. You work a phone for its user, one action a step, by what the newest",
        "screenshot shows. Write <think>{think}</think>\n<answer>{action}</answer>, where {action} is one of these:",
        *(
            "- " + "".join(part if isinstance(part, str) else f"<{part.value}>" for part in form.parts())
            for form in FORMS
        ),
        "Coordinates run from (0,0) at the top left to (999,999) at the bottom right.",
        "Look whether the last action took effect before the next one. Wait at most three times for a page to load.",
    ]
)
# What the model writes -> what the client is to carry out.
STEPS: list[tuple[str, dict[str, Any]]] = [
    ('do(action="Launch", app="微信")', {"action": "Launch", "app": "微信"}),
    ('do(action="Tap", element=[512,77])', {"action": "Tap", "element": [512, 77]}),
    ('do(action="Type", text="明天(周二) 见, ok?")', {"action": "Type", "text": "明天(周二) 见, ok?"}),
    (
        'do(action="Swipe", start=[499,749], end=[499,249])',
        {"action": "Swipe", "start": [499, 749], "end": [499, 249]},
    ),
    ('finish(message="消息已发送。")', {"finish": "消息已发送。"}),
]


def screenshot(number: int) -> str:
    return base64_of(picture_file(draw_screen(number, "test", width=448).image))


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="EMPTY", max_retries=0)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(
        SHIPPED_MODELS["nano"].path,
        ModelOptions(model="nano", threads=1, ctx_size=1024, takes_media=True),
        lambda what, done, total: None,
    )


@pytest.fixture(params=[False, True], ids=["free", "--actions"])
def scripted(request: pytest.FixtureRequest, loaded: LoadedModel) -> Iterator[tuple[str, ScriptedRunner]]:
    """(url, runner) of a server with Nano's tokenizer, template and eyes, whose answers are scripted."""
    assert loaded.multimodal is not None
    runner = ScriptedRunner(loaded.tokenizer)
    runner.expects_text = False
    app = create_app(
        EngineDriver(Engine(runner, loaded.tokenizer, EngineConfig())),
        loaded.tokenizer,
        loaded.template,
        model_id=MODEL,
        settings=ServerSettings(actions=request.param),
        media=MediaDoor(loaded.multimodal, MediaSources(MediaLimits())),
    )
    with on_socket(app) as url:
        yield f"{url}/v1", runner


def test_every_action_of_a_task_arrives_as_it_was_written(scripted: tuple[str, ScriptedRunner]) -> None:
    url, runner = scripted
    with client_of(url) as client:
        agent = Agent(client, "You work a phone.")
        for number, (action, meant) in enumerate(STEPS):
            runner.set_reply(f"<think>第 {number} 步</think>\n<answer>{action}</answer>")
            content = agent.step("给张三发消息", "微信", screenshot(number))
            assert len(agent.timings["images"]) == 1
            for tags_first in (False, True):
                thought, text = thought_and_action(content, tags_first=tags_first)
                assert (text, read_action(text)) == (action, meant)
                assert f"第 {number} 步" in thought


def test_nano_always_acts_with_actions_on() -> None:
    """Five steps of a long session, which Nano was never trained for: it acts, whatever it thinks."""
    # What is built ahead depends on how soon the next step comes.
    flags = ("-m", "nano", "--alias", MODEL, "--actions", "--no-prebuild")
    with serving(*flags) as server, client_of(server.url) as client:
        agent = Agent(client, SYSTEM_PROMPT)
        last_cached = 0
        for number in range(5):
            content = agent.step("打开设置" if number % 2 else "open the settings", "System Home", screenshot(number))
            actions = [read_action(thought_and_action(content, tags_first=first)[1]) for first in (False, True)]
            assert actions[0] == actions[1]
            assert "finish" in actions[0] or actions[0]["action"] in ACTIONS
            assert all(0 <= x <= 999 for name in ("element", "start", "end") for x in actions[0].get(name, ()))
            # The newest screenshot alone; all before the last turn, whose own has gone, comes out of the cache.
            assert len(agent.timings["images"]) == 1
            assert agent.timings["cached_tokens"] > last_cached or number == 0
            last_cached = agent.timings["cached_tokens"]
