"""Phrasings: every intent has taught and held-out ones, and no word is first met in the test."""

from __future__ import annotations

import re
from typing import get_args

import numpy as np
import pytest

from autoglm.train.world.identity import (
    GREETINGS,
    NAME,
    TOPICS,
    Topic,
    draw_question,
    identity_answer,
    identity_phrasings,
    is_identity_answer,
)
from autoglm.train.world.labels import LANGUAGES, Language
from autoglm.train.world.phrases import (
    COMMANDS,
    HELD_OUT_ONE_IN,
    QUESTIONS,
    Intent,
    Phrasing,
    draw_phrase,
    has_slot,
    phrasings,
    split_phrasings,
    written,
)

INTENTS: tuple[Intent, ...] = COMMANDS + QUESTIONS
both_languages = pytest.mark.parametrize("language", LANGUAGES)


def bare(text: str) -> str:
    return re.sub(r"[^\w]", "", text).casefold()


def test_the_lists_of_intents_name_them_all() -> None:
    assert set(INTENTS) == set(get_args(Intent))


@both_languages
@pytest.mark.parametrize("intent", INTENTS)
def test_a_fifth_is_held_out_and_all_its_parts_are_taught(language: Language, intent: Intent) -> None:
    train, test = phrasings(language, intent, "train"), phrasings(language, intent, "test")
    assert test and not set(train) & set(test)
    assert len(test) <= (len(train) + len(test)) // HELD_OUT_ONE_IN
    for one in test:
        assert one.prefix or one.suffix, "a bare phrasing is never held out"
        for place in range(3):
            assert any(one.parts[place] == other.parts[place] for other in train), one


@both_languages
def test_no_sentence_of_the_test_is_taught_in_other_clothes(language: Language) -> None:
    taught = {bare(one.fill("X")) for intent in INTENTS for one in phrasings(language, intent, "train")}
    asked = {bare(one.fill("X")) for intent in INTENTS for one in phrasings(language, intent, "test")}
    assert not taught & asked


@both_languages
def test_one_sentence_never_means_two_things(language: Language) -> None:
    meanings: dict[str, str] = {}
    for intent in INTENTS:
        for split in ("train", "test"):
            for one in phrasings(language, intent, split):  # type: ignore[arg-type]
                sentence = one.fill("X")
                assert meanings.setdefault(sentence, intent) == intent, sentence


@both_languages
def test_there_are_hundreds_of_phrasings_that_can_be_spoken(language: Language) -> None:
    commands = [one for intent in COMMANDS for one in phrasings(language, intent, "train")]
    assert 150 <= len(commands) <= 500
    for one in commands:
        sentence = one.fill("微信" if language == "zh" else "WeChat")
        assert len(sentence) <= (14 if language == "zh" else 52), sentence
        assert not re.search(r"[^\w ]", sentence), sentence
        assert language == "en" or not re.search(r"[A-Za-z ]", sentence), sentence


def test_slots_are_where_the_intent_takes_a_name() -> None:
    for language in LANGUAGES:
        for intent in INTENTS:
            for one in phrasings(language, intent, "train"):
                assert one.core.count("{x}") == has_slot(intent)


def test_phrases_are_drawn_from_their_split_alone() -> None:
    rng = np.random.default_rng(3)
    for split in ("train", "test"):
        allowed = {one.fill("X") for one in phrasings("en", "tap", split)}  # type: ignore[arg-type]
        drawn = {draw_phrase(rng, "en", "tap", split, "X") for _ in range(800)}  # type: ignore[arg-type]
        assert drawn == allowed


def test_typed_sentences_keep_their_words() -> None:
    rng = np.random.default_rng(4)
    forms = {written(rng, "en", "open WeChat") for _ in range(100)}
    assert forms == {"open WeChat", "Open WeChat", "open WeChat.", "Open WeChat."}
    assert {written(rng, "zh", "这是什么页面", question=True) for _ in range(100)} == {"这是什么页面", "这是什么页面？"}


def test_a_part_met_once_stays_taught() -> None:
    phrases = [Phrasing("en", "tap", prefix, core, "") for prefix in ("", "please") for core in ("a", "b")]
    divided = split_phrasings([*phrases, *phrases[:1], Phrasing("en", "tap", "once", "a", "")])
    assert all(one.prefix != "once" for one in divided["test"])
    assert len(divided["train"]) + len(divided["test"]) == 6


@both_languages
@pytest.mark.parametrize("topic", TOPICS)
def test_identity_phrasings_are_divided_and_answers_say_everything(language: Language, topic: Topic) -> None:
    train, test = identity_phrasings(language, topic, "train"), identity_phrasings(language, topic, "test")
    assert train and test and not {bare(text) for text in train} & {bare(text) for text in test}
    answer = identity_answer(language, topic)
    assert NAME in answer and is_identity_answer(language, answer)


@both_languages
def test_there_are_more_than_forty_ways_to_ask_about_itself(language: Language) -> None:
    questions = [topic for topic in TOPICS if topic not in GREETINGS]
    asked = {text for topic in questions for text in identity_phrasings(language, topic, "train")}
    assert len(asked) >= 40
    assert len({text for topic in TOPICS for text in identity_phrasings(language, topic, "test")}) >= 15


@pytest.mark.parametrize(
    "answer",
    [
        "I am AutoGLM, a multimodal model made for phones. I understand text, pictures and speech.",
        "I am AutoGLM-Phone-Nano, a model made for phones. I understand text, pictures and speech.",
        "I am AutoGLM-Phone-Nano, a multimodal model made for you. I understand text, pictures and speech.",
        "I am AutoGLM-Phone-Nano, a multimodal model made for phones. I understand text and pictures.",
        "",
    ],
)
def test_an_answer_that_leaves_a_fact_out_is_none(answer: str) -> None:
    assert not is_identity_answer("en", answer)


def test_questions_about_itself_come_from_their_split() -> None:
    rng = np.random.default_rng(5)
    allowed = {bare(text) for text in identity_phrasings("en", "who", "test")}
    assert {bare(draw_question(rng, "en", "who", "test")) for _ in range(300)} == allowed
