"""All words the generated world can say, once each with a weight: what the tokenizer is built from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from autoglm.actions import Back, Finish, Home, Launch, LongPress, Swipe, Tap, Type, Wait, format_action
from autoglm.train.world import replies
from autoglm.train.world.identity import TOPICS, identity_answer, identity_phrasings, identity_thought
from autoglm.train.world.labels import LABELS, LANGUAGES, Language
from autoglm.train.world.phrases import COMMANDS, QUESTIONS, has_slot, phrasings
from autoglm.train.world.split import SPLITS
from autoglm.train.world.tasks import TYPED_KINDS

# A name is said in many sentences, a sentence's frame in few.
_NAME_WEIGHT = 40


def texts() -> Iterator[tuple[str, int]]:
    """(text, weight): every label, sentence, thought and answer of both splits, slots filled with one short name."""
    for language in LANGUAGES:
        yield from _sentences(language)
        yield from _replies(language)
        for label in LABELS:
            name = label.text(language)
            yield from ((f" {name}", _NAME_WEIGHT), (f"听到：{name}" if language == "zh" else f"to {name}.", 1))
            if label.kind in TYPED_KINDS:  # within quotes a name has no space before it
                yield f'="{name}"', _NAME_WEIGHT
        for topic in TOPICS:
            yield identity_answer(language, topic), 10
            yield identity_thought(language, topic), 10


def chinese_words() -> Iterator[tuple[str, int]]:
    """(word, weight) worth a token of their own: what commands are made of, then names by how often they act."""
    words: dict[str, int] = {"听到": 100, "看到": 60, "没有": 60, "屏幕上": 60, "正在": 30}
    for intent in COMMANDS:
        for one in phrasings("zh", intent, "train"):
            verbs = one.core.split("{x}") if has_slot(intent) else []
            words |= {part: 80 for part in (one.prefix, *verbs, one.suffix) if len(part) > 1}
    weights = {"app": 50, "setting": 40, "button": 35, "contact": 20, "product": 10, "message": 10, "page": 10}
    for label in LABELS:
        words[label.zh] = max(words.get(label.zh, 0), weights[label.kind])
    yield from words.items()


def _sentences(language: Language) -> Iterator[tuple[str, int]]:
    for intent in COMMANDS + QUESTIONS:
        for split in SPLITS:
            for one in phrasings(language, intent, split):
                sentence = one.fill("1") if has_slot(intent) else one.fill()
                yield sentence, 1
                yield replies.heard(language, sentence, "1"), 1
                yield format_action(Finish(sentence)), 1
                if language == "en":
                    yield sentence[0].upper() + sentence[1:] + "?", 1
    for topic in TOPICS:
        for split in SPLITS:
            for sentence in identity_phrasings(language, topic, split):
                yield sentence, 1
                yield sentence[0].upper() + sentence[1:], 1


def _replies(language: Language) -> Iterator[tuple[str, int]]:
    for key in get_args(replies.Key):
        yield replies.heard(language, "1", replies.thought(language, key, "1")), 10
    for message_key in replies.MESSAGE_KEYS:
        yield format_action(Finish(replies.message(language, message_key, "1"))), 10
    yield format_action(Finish(replies.describe(language, "1", ["1", "2"]))), 10
    yield format_action(Finish(replies.app_is(language, "1"))), 10
    for action in (Back(), Finish("1"), Home(), Launch("1"), LongPress(1, 2), Swipe(1, 2, 3, 4), Tap(1, 2), Type("1")):
        yield f"<think>1</think>\n<answer>{format_action(action)}</answer>", 10
    yield format_action(Wait()), 10
