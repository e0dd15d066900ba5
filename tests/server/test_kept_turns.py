"""A chat whose client sends all turns and pictures again: what was read or written is not computed twice.

Over HTTP with the shipped Nano, beside one without a prefix cache that must answer the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from autoglm.cli.loading import ModelOptions, load_model
from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.media.limits import MediaLimits
from autoglm.media.sources import MediaSources
from autoglm.server.app import create_app
from autoglm.server.driver import EngineDriver
from autoglm.server.media import MediaDoor
from autoglm.server.settings import ServerSettings
from tests.engine.harness import draft_always
from tests.server.test_next_turn import picture, words


@contextmanager
def client(**options: Any) -> Iterator[TestClient]:
    """Of a Nano with these options; with drafts it drafts all it can."""
    settings = ModelOptions(model="nano", threads=2, takes_media=True, **options)
    loaded = load_model(Path(SHIPPED_MODELS["nano"].path), settings, lambda what, done, total: None)
    assert loaded.multimodal is not None
    if settings.draft_max:
        draft_always(loaded.engine)
    driver, door = EngineDriver(loaded.engine), MediaDoor(loaded.multimodal, MediaSources(MediaLimits()))
    app = create_app(driver, loaded.tokenizer, loaded.template, model_id="m", settings=ServerSettings(), media=door)
    driver.start()
    yield TestClient(app, base_url="http://127.0.0.1")
    driver.stop()


TURNS = (
    [words("turn 0: tap settings"), picture(0, 448), words("now")],
    "and then?",
    [words("turn 2: tap settings"), picture(2, 448), words("now")],
    [picture(3, 448), words("go back")],
)


@pytest.mark.parametrize("draft_max", [0, 15])
def test_a_turn_prefills_only_what_is_new_and_is_answered_as_without_a_cache(draft_max: int) -> None:
    with client(draft_max=draft_max) as cached, client(draft_max=0, prefix_cache=False) as plain:
        messages: list[dict[str, Any]] = [{"role": "system", "content": "Act on what you see."}]
        known, ends = 0, set()
        for content in TURNS:
            messages.append({"role": "user", "content": content})
            body = {"messages": messages, "temperature": 0, "max_tokens": 60, "logprobs": True, "top_logprobs": 2}
            reply, cold = (each.post("/v1/chat/completions", json=body).json() for each in (cached, plain))
            assert reply["choices"] == cold["choices"]
            usage = reply["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == reply["timings"]["cached_tokens"] == known
            assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert reply["choices"][0]["finish_reason"] == "stop"
            known = usage["total_tokens"] - 1  # an answer's last token is not run
            ends.add(known % 16)
            messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"]})
        assert len(ends - {0}) > 1, "turns that end with their blocks would prove nothing"
