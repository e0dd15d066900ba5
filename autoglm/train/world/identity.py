"""Talk about itself: who it is, what it can do, who made it, greetings; answers that always name the model.

Phrasings are (prefix, core, suffix) triples divided as in phrases.py; punctuation at the end is drawn apart. Every
answer names AutoGLM-Phone-Nano, says that it is a multimodal model made for phones and that it understands text,
pictures and speech; `is_identity_answer` is the one test of that, used by the evaluation.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np

from autoglm.train.world.labels import Language
from autoglm.train.world.phrases import Phrasing, split_phrasings
from autoglm.train.world.split import Split

NAME = "AutoGLM-Phone-Nano"
Topic = Literal["who", "abilities", "maker", "hello", "thanks"]
TOPICS: tuple[Topic, ...] = ("who", "abilities", "maker", "hello", "thanks")
GREETINGS: frozenset[Topic] = frozenset({"hello", "thanks"})

_CORES: dict[Topic, dict[Language, tuple[str, ...]]] = {
    "who": {
        "zh": (
            "你是谁", "你是什么", "你叫什么", "你叫什么名字", "你的名字是什么", "你是什么模型", "你是哪个模型",
            "说说你自己", "你是什么应用",
        ),
        "en": (
            "who are you", "what are you", "what is your name", "what model are you", "which model are you",
            "tell me about yourself", "say who you are", "what can I call you",
        ),
    },
    "abilities": {
        "zh": ("你能做什么", "你会做什么", "你可以做什么", "你能帮我做什么", "你能理解什么"),
        "en": ("what can you do", "what can you do for me", "how can you help me", "what do you understand"),
    },
    "maker": {
        "zh": ("谁做了你", "你是谁做的", "谁设计了你", "你从哪里来"),
        "en": ("who made you", "are you made by AutoGLM", "where do you come from"),
    },
    "hello": {"zh": ("你好", "你好吗", "你在吗"), "en": ("hello", "hi", "good morning")},
    "thanks": {"zh": ("谢谢", "谢谢你", "谢谢你了"), "en": ("thanks", "thank you", "thank you for this")},
}  # fmt: skip
# Requests, which take no other question words and no question mark.
_REQUESTS: frozenset[str] = frozenset({"说说你自己", "tell me about yourself", "say who you are"})
_NOT_WITH_REQUESTS: frozenset[str] = frozenset({"请问", "请告诉我", "please tell me,", "呢", "exactly"})
_PREFIXES: dict[Language, tuple[str, ...]] = {
    "zh": ("", "请问", "请告诉我", "你好，"),
    "en": ("", "please tell me,", "hello,"),
}
_SUFFIXES: dict[Language, tuple[str, ...]] = {"zh": ("", "呢"), "en": ("", "exactly")}
_GREETING_PREFIXES: dict[Language, tuple[str, ...]] = {"zh": ("", "好的，"), "en": ("", "hello,")}
# What may be typed at the end; it is no part of a phrasing, so nothing in the test differs by it alone.
_ENDS: dict[tuple[Language, bool], tuple[str, ...]] = {
    ("zh", False): ("", "", "？", "？", "。"),
    ("en", False): ("", "", "?", "?", "."),
    ("zh", True): ("", "", "！", "。"),
    ("en", True): ("", "", "!", "."),
}

_ANSWERS: dict[Topic, dict[Language, str]] = {
    "who": {
        "zh": f"我是 {NAME}，一个为手机设计的多模态模型，能理解文字、图片和语音。",
        "en": f"I am {NAME}, a multimodal model made for phones. I understand text, pictures and speech.",
    },
    "abilities": {
        "zh": f"我是 {NAME}，一个为手机设计的多模态模型，能理解文字、图片和语音。"
        "我能看屏幕、听语音，帮你点击、输入和滑动。",
        "en": f"I am {NAME}, a multimodal model made for phones. I understand text, pictures and speech. "
        "I can see the screen, hear you, and tap, type and swipe for you.",
    },
    "maker": {
        "zh": f"我是 AutoGLM 做的 {NAME}，一个为手机设计的多模态模型，能理解文字、图片和语音。",
        "en": f"I am {NAME}, made by AutoGLM, a multimodal model made for phones. "
        "I understand text, pictures and speech.",
    },
    "hello": {
        "zh": f"你好！我是 {NAME}，一个为手机设计的多模态模型，能理解文字、图片和语音。",
        "en": f"Hello! I am {NAME}, a multimodal model made for phones. I understand text, pictures and speech.",
    },
    "thanks": {
        "zh": f"不客气！我是 {NAME}，一个为手机设计的多模态模型，能理解文字、图片和语音。",
        "en": f"You are welcome! I am {NAME}, a multimodal model made for phones. "
        "I understand text, pictures and speech.",
    },
}
_THOUGHTS: dict[Topic, dict[Language, str]] = {
    "who": {"zh": "问我是谁", "en": "Who I am"},
    "abilities": {"zh": "问我能做什么", "en": "What I can do"},
    "maker": {"zh": "问谁训练了我", "en": "Who made me"},
    "hello": {"zh": "你好", "en": "Hello"},
    "thanks": {"zh": "谢谢", "en": "Thanks"},
}
# Each group is one thing an answer must say; any of its spellings says it.
_MUST_SAY: dict[Language, tuple[tuple[str, ...], ...]] = {
    "zh": ((NAME,), ("多模态",), ("手机",), ("文字", "文本"), ("图片", "图像"), ("语音", "声音")),
    "en": ((NAME,), ("multimodal",), ("phone",), ("text",), ("picture", "image"), ("speech", "sound", "voice")),
}


@cache
def _split_of(language: Language, topic: Topic) -> dict[Split, tuple[Phrasing, ...]]:
    is_greeting = topic in GREETINGS
    prefixes = (_GREETING_PREFIXES if is_greeting else _PREFIXES)[language]
    suffixes = _SUFFIXES[language][: 1 if is_greeting else None]
    return split_phrasings(
        Phrasing(language, topic, prefix, core, suffix)
        for core in _CORES[topic][language]
        for prefix in prefixes
        for suffix in suffixes
        if core not in _REQUESTS or not {prefix, suffix} & _NOT_WITH_REQUESTS
    )


def identity_phrasings(language: Language, topic: Topic, split: Split) -> tuple[str, ...]:
    """All questions or greetings of `topic` in `split`, without punctuation at the end."""
    return tuple(_join(one) for one in _split_of(language, topic)[split])


def spoken_phrasings(language: Language, topic: Topic) -> tuple[str, ...]:
    """The bare questions without punctuation, fit to be spoken."""
    return _CORES[topic][language]


def identity_answer(language: Language, topic: Topic) -> str:
    return _ANSWERS[topic][language]


def identity_thought(language: Language, topic: Topic) -> str:
    return _THOUGHTS[topic][language]


def draw_question(rng: np.random.Generator, language: Language, topic: Topic, split: Split) -> str:
    """One question or greeting as it is typed: with or without a sign at the end and, in English, a capital."""
    choices = identity_phrasings(language, topic, split)
    ends = _ENDS[language, topic in GREETINGS]
    text = choices[int(rng.integers(len(choices)))] + ends[int(rng.integers(len(ends)))]
    if language == "en" and rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text


def is_identity_answer(language: Language, text: str) -> bool:
    """Whether `text` names the model and says multimodal, phones, text, pictures and speech."""
    return all(any(spelling in text for spelling in group) for group in _MUST_SAY[language])


def _join(one: Phrasing) -> str:
    return ("" if one.language == "zh" else " ").join(part for part in one.parts if part)
