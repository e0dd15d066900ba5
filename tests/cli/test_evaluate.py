"""autoglm eval over HTTP and its flags: what is sent, what a reply becomes, and each mistake in one sentence."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from PIL import Image

pytest.importorskip("torch")

from autoglm.cli import main  # noqa: E402
from autoglm.cli.api_client import ApiClient, ServerError  # noqa: E402
from autoglm.cli.evaluate import _named  # noqa: E402
from autoglm.cli.served import content_of, served_replier  # noqa: E402
from autoglm.train import dataset  # noqa: E402
from autoglm.train.evaluate import evaluation_examples, split_reply  # noqa: E402
from tests.train.conftest import hum  # noqa: E402, F401

Reply = Callable[[dict[str, Any]], dict[str, Any] | str]


def client(reply: Reply, status: int = 200) -> ApiClient:
    """A server that answers each body with one delta, or with the error whose message is given."""

    def handle(request: httpx.Request) -> httpx.Response:
        delta = reply(json.loads(request.content))
        if isinstance(delta, str):
            return httpx.Response(status, json={"error": {"message": delta}})
        chunk = json.dumps({"choices": [{"delta": delta, "finish_reason": "stop"}]})
        return httpx.Response(status, text=f"data: {chunk}\n\ndata: [DONE]\n\n")

    return ApiClient(httpx.Client(base_url="http://test/v1/", transport=httpx.MockTransport(handle)), "phone")


def test_picture_sound_and_words_are_sent_whole(hum: None) -> None:  # noqa: F811
    """In the order of training, and without loss: the same pixels, the same samples."""
    (spoken,), (typed,) = (evaluation_examples(task, 1) for task in ("spoken_action", "typed_action"))
    seen: list[dict[str, Any]] = []
    served_replier(client(lambda body: seen.append(body) or {"content": "x"}))([spoken])
    (body,) = seen
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("phone", 0, 96)
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["image_url", "input_audio"]
    assert spoken.screen is not None and spoken.spoken is not None
    picture, sound = body["messages"][0]["content"]
    sent = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].partition(",")[2])))
    assert sent.tobytes() == spoken.screen.image.convert("RGB").tobytes()
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(sound["input_audio"]["data"])), dtype="float32")
    assert rate == 16_000 and sound["input_audio"]["format"] == "wav"
    rng = dataset.rng_for("test", "replies", 0, 0, 0)
    wave, _ = dataset.draw_utterance(spoken.spoken, spoken.language, "test", rng)
    assert np.array_equal(heard, wave)
    assert [part["type"] for part in content_of(typed, None)] == ["image_url", "text"]


def test_replies_keep_their_order_and_form() -> None:
    examples = evaluation_examples("identity", 12)
    echo = client(lambda body: {"content": body["messages"][0]["content"][-1]["text"]})
    assert served_replier(echo)(examples) == [example.typed for example in examples]
    apart = client(lambda body: {"content": 'do(action="Back")', "reasoning_content": "back"})
    assert split_reply(served_replier(apart)(examples[:1])[0]) == ("back", 'do(action="Back")')


def test_a_server_that_refuses_is_one_sentence() -> None:
    with pytest.raises(ServerError, match="the queue is full"):
        served_replier(client(lambda body: "the queue is full", 429))(evaluation_examples("identity", 1))


def test_models_are_called_by_name_file_or_address() -> None:
    assert _named("served=http://127.0.0.1:8000/v1?x=1") == ("served", "http://127.0.0.1:8000/v1?x=1")
    assert _named("http://127.0.0.1:8000/v1?x=1") == ("127.0.0.1:8000", "http://127.0.0.1:8000/v1?x=1")
    assert _named("QAT=models/phone.gguf") == ("QAT", "models/phone.gguf")
    assert _named("models/phone.gguf") == ("phone.gguf", "models/phone.gguf")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["http://127.0.0.1:9/v1"], "no server answers at http://127.0.0.1:9/v1"),
        (["nano", "--compare"], "--compare holds models against the first one"),
        (["nano", "--every-type"], "--reference and --every-type are about a click card; add --card"),
        (["http://127.0.0.1:9/v1", "--card"], "--card measures one model file"),
        (["nano", "--card", "--compare"], "--card takes -n, --seed, --mmproj, --reference and --every-type"),
    ],
)
def test_mistakes_are_told_before_anything_is_asked(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *arguments]) in (1, 2)
    assert said in capfd.readouterr().err
