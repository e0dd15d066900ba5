"""The served Nano as its users meet it: openai and LangChain send a picture, a sound and words in one message."""

from __future__ import annotations

import itertools
import re
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from langchain_openai import ChatOpenAI
from numpy.typing import NDArray

from autoglm.actions import parse_action
from autoglm.train.world.screens import draw_screen
from autoglm.train.world.split import rng_for
from tests.cli.serving import ServerProcess, serving
from tests.media.parts import (
    PICTURE_FORMATS,
    SOUND_FORMATS,
    audio_url,
    base64_of,
    image_url,
    input_audio,
    picture_file,
    sound_file,
    text,
)
from tests.train.conftest import hummed

IMAGE_TOKENS = 105  # of a screen 448 pixels wide and 20:9 or so: 7 x 15 tokens of 32 x 32 pixels
SCREEN = draw_screen(1, "test", width=448).image
WAVE: NDArray[np.float32] = hummed("back", "en", "test", rng_for("test", "hum", "back")) * np.float32(0.3)
AUDIO_TOKENS = 5  # of 0.2 s
CONTENT = [image_url(picture_file(SCREEN)), input_audio(sound_file(WAVE)), text("go back")]
Fields = dict[str, Any]


def ask_openai(server: ServerProcess, content: Any, stream: bool, fields: Fields) -> tuple[str, str, Any]:
    """(content, reasoning, usage) by the SDK."""
    request: Fields = {
        "model": "nano",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 96,
        "extra_body": fields,
    }
    with openai.OpenAI(base_url=server.url, api_key="EMPTY", max_retries=0) as client:
        if not stream:
            reply = client.chat.completions.create(**request)
            message = reply.choices[0].message
            return message.content or "", getattr(message, "reasoning_content", None) or "", reply.usage
        chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    return "".join(delta.content or "" for delta in deltas), reasoning, chunks[-1].usage


def ask_langchain(server: ServerProcess, content: Any, stream: bool, fields: Fields) -> str:
    model = ChatOpenAI(
        model="nano",
        temperature=0,
        base_url=server.url,
        api_key="EMPTY",  # type: ignore[arg-type]
        extra_body=fields,
        streaming=stream,
        max_tokens=96,  # type: ignore[call-arg]
    )
    message = [{"role": "user", "content": content}]
    if stream:
        return "".join(str(chunk.content) for chunk in model.stream(message))
    reply = model.invoke(message)
    details = reply.usage_metadata["input_token_details"]  # type: ignore[index]
    assert details["audio"] == AUDIO_TOKENS and reply.usage_metadata["output_tokens"] > 0  # type: ignore[index]
    return str(reply.content)


THINKING = [
    dict(zip(("enable_thinking", "return_reasoning"), values, strict=True))
    for values in itertools.product((True, False), repeat=2)
]


@pytest.mark.parametrize("fields", [{}, *THINKING], ids=str)
def test_a_picture_a_sound_and_words_in_one_message(nano_server: ServerProcess, fields: Fields) -> None:
    """Four ways to ask, one answer: an action, its thought where the flags put it."""
    content, reasoning, usage = ask_openai(nano_server, CONTENT, False, fields)
    assert ask_openai(nano_server, CONTENT, True, fields)[:2] == (content, reasoning)
    assert {ask_langchain(nano_server, CONTENT, stream, fields) for stream in (False, True)} == {content}

    parse_action(content)
    details = usage.prompt_tokens_details
    assert (details.image_tokens, details.audio_tokens) == (IMAGE_TOKENS, AUDIO_TOKENS)
    thinks = fields.get("enable_thinking", True)
    assert (usage.completion_tokens_details.reasoning_tokens > 0) == thinks
    assert bool(reasoning) == (thinks and fields.get("return_reasoning", False))
    if fields:
        assert content.startswith(("do(", "finish(")) and "<" not in content + reasoning
    else:
        # What was said comes first in the thought of a spoken command.
        assert re.match(r"<think>Heard:.+</think>\n<answer>do\(", content, re.DOTALL)


def test_streams_tell_the_same_usage(nano_server: ServerProcess) -> None:
    whole, streamed = (ask_openai(nano_server, CONTENT, stream, {"cache_salt": str(stream)})[2] for stream in (0, 1))
    assert whole == streamed and whole.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("name", PICTURE_FORMATS)
def test_pictures_of_every_format_are_seen(nano_server: ServerProcess, name: str) -> None:
    data = picture_file(SCREEN, name)
    parts = [image_url(data, f"image/{name}"), image_url(data, "application/octet-stream")]
    answers = {ask_openai(nano_server, [part, text("go back")], True, {})[0] for part in parts}
    answer, _, usage = ask_openai(nano_server, [parts[0], text("go back")], False, {})
    assert answers == {answer} and usage.prompt_tokens_details.image_tokens == IMAGE_TOKENS
    parse_action(answer)


@pytest.mark.parametrize("name", SOUND_FORMATS)
def test_sounds_of_every_format_are_heard_alike_in_every_form(nano_server: ServerProcess, name: str) -> None:
    data = sound_file(WAVE, name)
    uri = audio_url(data, f"audio/{name}")
    bare = {"type": "audio_url", "audio_url": uri["audio_url"]["url"]}
    within = {"type": "input_audio", "input_audio": {"data": uri["audio_url"]["url"], "format": name}}
    forms = [uri, bare, within, {"type": "input_audio", "input_audio": base64_of(data)}, input_audio(data, name)]
    replies = [ask_openai(nano_server, [form], False, {"return_reasoning": True}) for form in forms]
    # A lossy format may hold a padded end: one token is 40 ms.
    assert AUDIO_TOKENS <= replies[0][2].prompt_tokens_details.audio_tokens <= AUDIO_TOKENS + 3
    assert len({(content, reasoning) for content, reasoning, _ in replies}) == 1
    assert all(reply[1].startswith("Heard:") for reply in replies)


def num_encoded(server: ServerProcess) -> float:
    metrics = httpx.get(server.url.removesuffix("/v1") + "/metrics").text
    [count] = re.findall(r"^autoglm_media_encoded_total (\S+)$", metrics, re.MULTILINE)
    return float(count)


def test_the_third_turn_encodes_one_picture_and_prefills_one_turn(nano_server: ServerProcess) -> None:
    """An agent session that keeps its screenshots; a cold server that sees the last request alone answers the same."""
    messages: list[Fields] = []
    known = 0
    for turn in range(3):
        screen = draw_screen(20 + turn, "test", width=448).image
        messages.append({"role": "user", "content": [image_url(picture_file(screen)), text(f"step {turn}: go back")]})
        body = {"model": "nano", "messages": messages, "temperature": 0, "max_tokens": 96}
        before = num_encoded(nano_server)
        reply = httpx.post(f"{nano_server.url}/chat/completions", json=body, timeout=60).json()
        assert num_encoded(nano_server) - before == 1
        usage, images = reply["usage"], reply["timings"]["images"]
        assert len(images) == turn + 1
        assert sum(image["tokens"] for image in images) == usage["prompt_tokens_details"]["image_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= known
        known = usage["total_tokens"] - 1  # an answer's last token is not run
        messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"]})
    with serving("-m", "nano") as cold_server:
        before = num_encoded(cold_server)  # the self-check's
        cold = httpx.post(f"{cold_server.url}/chat/completions", json={**body, "messages": messages[:-1]}, timeout=60)
        assert num_encoded(cold_server) - before == 3
    assert cold.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert cold.json()["choices"] == reply["choices"]
