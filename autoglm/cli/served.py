"""Held-out examples asked of a server over the OpenAI API: pictures as PNG, sounds as wav, a few requests at once.

A server hears what `train.inference.replier` lets a PyTorch model hear when both are asked the same examples in the
same order, to the last sample: the wav holds floats.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

from autoglm.cli.api_client import Answer, ApiClient
from autoglm.media.log_mel import SAMPLE_RATE_HZ
from autoglm.train.dataset import draw_utterance
from autoglm.train.evaluate import Generate
from autoglm.train.inference import MAX_REPLY_TOKENS, heard_groups
from autoglm.train.world.split import Split
from autoglm.train.world.tasks import Example

# Enough that the server decodes in batches; few enough that none has to wait in its line.
_AT_ONCE = 4


def served_replier(client: ApiClient, *, split: Split = "test", seed: int = 0) -> Generate:
    """A function from examples to the server's greedy replies, in order: evaluate's `generate`.

    Raises ServerError when a request is refused or the server goes away.
    """
    num_calls = 0

    def generate(examples: list[Example]) -> list[str]:
        nonlocal num_calls
        contents: list[list[dict[str, Any]]] = [[] for _ in examples]
        for group, rng in heard_groups(examples, num_calls, split=split, seed=seed):
            for index in group:
                example = examples[index]
                wave = None
                if example.spoken is not None:
                    wave, _ = draw_utterance(example.spoken, example.language, split, rng)
                contents[index] = content_of(example, wave)
        num_calls += 1
        return ask_all(client, contents)

    return generate


def ask_all(client: ApiClient, contents: Sequence[list[dict[str, Any]]]) -> list[str]:
    """Greedy replies to user turns of these content parts, in order."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda content: _ask(client, content), contents))


def content_of(example: Example, wave: NDArray[np.float32] | None) -> list[dict[str, Any]]:
    """The user turn of an example as content parts, in the order of training: picture, sound, words.

    wave  f32 [num_samples] at 16 kHz, what is heard; None without sound
    """
    parts: list[dict[str, Any]] = []
    if example.screen is not None:
        url = f"data:image/png;base64,{_base64(png(example.screen.image))}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    if wave is not None:
        parts.append({"type": "input_audio", "input_audio": {"data": _base64(_wav(wave)), "format": "wav"}})
    if example.typed:
        parts.append({"type": "text", "text": example.typed})
    return parts


def _ask(client: ApiClient, content: list[dict[str, Any]]) -> str:
    messages = [{"role": "user", "content": content}]
    # None: the server writes the thought where the model does, so that a reply without its tags scores as one.
    body = {"messages": messages, "temperature": 0, "max_tokens": MAX_REPLY_TOKENS, "return_reasoning": None}
    answer = Answer()
    for _ in client.stream(body, answer):
        pass
    # Another server may take the two halves apart all the same.
    return f"<think>{answer.thought}</think>\n<answer>{answer.content}</answer>" if answer.thought else answer.content


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _wav(wave: NDArray[np.float32]) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, SAMPLE_RATE_HZ, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
