"""Counting equal answers: only what stands between the answer tags decides, and what differs is listed by number."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from autoglm.train.agreement import Recorder, agreement  # noqa: E402
from autoglm.train.evaluate import Rate, evaluate  # noqa: E402
from autoglm.train.world.split import rng_for  # noqa: E402
from autoglm.train.world.tasks import identity, speech_only  # noqa: E402


def reply(thought: str, answer: str) -> str:
    return f"<think>{thought}</think>\n<answer>{answer}</answer>"


def test_answers_thoughts_and_media_are_counted_apart() -> None:
    asked = [identity(rng_for("test", "agreement", number), "test", "en") for number in range(3)]
    asked += [speech_only(rng_for("test", "agreement", "sound", number), "test") for number in range(2)]
    first = [reply("a", "1"), reply("a", "2"), reply("a", "3"), reply("a", "4"), reply("a", "5")]
    second = [reply("a", "1"), reply("b", "2"), reply("a", "x"), reply("a", "4"), reply("a", "5 ")]
    found = agreement(asked, first, second)
    assert (found.same_answers, found.media_answers, found.same_replies) == (Rate(3, 5), Rate(1, 2), Rate(2, 5))
    assert [(other.number, other.second) for other in found.differences] == [(2, second[2]), (1, second[4])]


def test_a_recorder_keeps_what_was_asked_in_order() -> None:
    recorder = Recorder(lambda examples: [example.typed for example in examples])
    evaluate(recorder, counts={"identity": 7}, chunk=3)
    assert recorder.replies == [example.typed for example in recorder.examples] and len(recorder.replies) == 7
