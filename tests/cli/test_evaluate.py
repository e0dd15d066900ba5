"""autoglm eval over HTTP and its flags: what is sent, what a reply becomes, and each mistake in one sentence."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from PIL import Image

pytest.importorskip("torch")

from autoglm.cli import main  # noqa: E402
from autoglm.cli.client import Server, ServerError  # noqa: E402
from autoglm.cli.evaluate import _named  # noqa: E402
from autoglm.cli.served import content_of, served_replier  # noqa: E402
from autoglm.train import dataset  # noqa: E402
from autoglm.train.evaluate import evaluation_examples, split_reply  # noqa: E402
from tests.train.conftest import hum  # noqa: E402, F401


def server(answer: Any, status: int = 200, seen: list[dict[str, Any]] | None = None) -> Server:
    def handle(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(json.loads(request.content))
        return httpx.Response(status, json=answer)

    return Server(httpx.Client(base_url="http://test/v1/", transport=httpx.MockTransport(handle)), "phone")


def message(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", **fields}}]}


def test_picture_sound_and_words_are_sent_whole(hum: None) -> None:  # noqa: F811
    """In the order of training, and without loss: the same pixels, the same samples."""
    (spoken,), (typed,) = (evaluation_examples(task, 1) for task in ("spoken_action", "typed_action"))
    seen: list[dict[str, Any]] = []
    served_replier(server(message(content="x"), seen=seen))([spoken])
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
    def handle(request: httpx.Request) -> httpx.Response:
        said = json.loads(request.content)["messages"][0]["content"][-1]["text"]
        return httpx.Response(200, json=message(content=said))

    echo = Server(httpx.Client(base_url="http://test/v1/", transport=httpx.MockTransport(handle)), "phone")
    examples = evaluation_examples("identity", 12)
    assert served_replier(echo)(examples) == [example.typed for example in examples]
    apart = served_replier(server(message(content='do(action="Back")', reasoning_content="back")))(examples[:1])
    assert split_reply(apart[0]) == ("back", 'do(action="Back")')


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        ({"error": {"message": "the queue is full"}}, 429, "the queue is full"),
        ({"choices": []}, 200, "the server's reply holds no message"),
        ([1], 200, "the server's reply holds no message"),
    ],
)
def test_a_server_that_does_not_answer_is_one_sentence(answer: Any, status: int, said: str) -> None:
    with pytest.raises(ServerError, match=said):
        served_replier(server(answer, status))(evaluation_examples("identity", 1))


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
