"""What people say to a phone: prefix x verb x slot x suffix in two languages, one phrasing in five held out.

A phrasing is the triple (prefix, core, suffix) of an intent. In the order of a hash of the triple, a fifth of each
intent's phrasings is held out for the test split. Bare phrasings (no prefix, no suffix) are always taught, and a
triple is held out only when each of its three parts is taught in another triple of the same intent: no word is ever
first met in the test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from autoglm.train.world.labels import LANGUAGES, Language
from autoglm.train.world.split import Split

# One phrasing in this many is held out for the test split.
HELD_OUT_ONE_IN = 5

Intent = Literal[
    "tap", "open", "long_press", "type", "swipe_up", "swipe_down", "swipe_left", "swipe_right",
    "back", "home", "wait", "transcribe", "describe", "which_app", "is_here",
]  # fmt: skip
COMMANDS: tuple[Intent, ...] = (
    "tap", "open", "long_press", "type", "swipe_up", "swipe_down", "swipe_left", "swipe_right", "back", "home", "wait",
)  # fmt: skip
QUESTIONS: tuple[Intent, ...] = ("transcribe", "describe", "which_app", "is_here")


@dataclass(frozen=True)
class Phrasing:
    """One way to ask for one thing; `core` holds {x} where the intent takes a name."""

    language: Language
    intent: str
    prefix: str
    core: str
    suffix: str

    def fill(self, name: str = "") -> str:
        """The sentence without punctuation, as it is spoken: English words apart, Chinese characters together."""
        parts = [self.prefix, self.core.replace("{x}", name), self.suffix]
        return (" " if self.language == "en" else "").join(part for part in parts if part)

    @property
    def parts(self) -> tuple[str, str, str]:
        return self.prefix, self.core, self.suffix


_PREFIXES: dict[Language, tuple[str, ...]] = {
    "zh": ("", "请", "帮我", "请帮我", "给我", "现在"),
    "en": ("", "please", "can you", "help me", "I want to"),
}
_SUFFIXES: dict[Language, tuple[str, ...]] = {
    "zh": ("", "吧", "谢谢"),
    "en": ("", "for me", "now", "thanks"),
}
_ASKING: dict[Language, tuple[str, ...]] = {
    "zh": ("", "请问", "请告诉我", "告诉我"),
    "en": ("", "tell me", "please tell me", "now tell me"),
}
# Said by nobody.
_ODD: frozenset[tuple[str, str]] = frozenset({("I want to", "for me"), ("help me", "for me")})
# Requests among the questions, which take none of _ASKING.
_REQUESTS: frozenset[str] = frozenset({"写下你听到的话", "write down what you hear"})

# In `swipe_up` the finger moves up, which scrolls the page down.
_CORES: dict[Intent, dict[Language, tuple[str, ...]]] = {
    "tap": {
        "zh": ("点击{x}", "点一下{x}", "按一下{x}", "选择{x}"),
        "en": ("tap {x}", "click {x}", "press {x}", "select {x}"),
    },
    "open": {"zh": ("打开{x}", "进入{x}", "启动{x}"), "en": ("open {x}", "go to {x}", "enter {x}")},
    "long_press": {"zh": ("长按{x}", "按住{x}"), "en": ("long press {x}", "hold {x}")},
    "type": {"zh": ("输入{x}", "写上{x}"), "en": ("type {x}", "write {x}")},
    "swipe_up": {"zh": ("向上滑", "往上滑动", "往下翻页"), "en": ("swipe up", "scroll down")},
    "swipe_down": {"zh": ("向下滑", "往下滑动", "往上翻页"), "en": ("swipe down", "scroll up")},
    "swipe_left": {"zh": ("向左滑", "往左滑动"), "en": ("swipe left", "swipe to the left")},
    "swipe_right": {"zh": ("向右滑", "往右滑动"), "en": ("swipe right", "swipe to the right")},
    "back": {"zh": ("返回", "返回上一页"), "en": ("go back", "go back to the last page")},
    "home": {"zh": ("回到桌面", "返回桌面"), "en": ("go home", "go to the home screen")},
    "wait": {"zh": ("等一下", "等一等"), "en": ("wait", "wait a moment")},
    "transcribe": {
        "zh": ("你听到了什么", "我说了什么", "写下你听到的话", "语音里说了什么"),
        "en": ("what do you hear", "what did I say", "write down what you hear", "what is said in the sound"),
    },
    "describe": {
        "zh": ("屏幕上有什么", "这个屏幕上有什么", "你看到了什么", "这是什么页面"),
        "en": ("what is on this screen", "what is on the screen", "what do you see", "what page is this"),
    },
    "which_app": {
        "zh": ("这是什么应用", "这是哪个应用", "现在打开的是什么应用", "我在哪个应用里"),
        "en": ("which app is this", "what app is this", "which app is open", "what app am I in"),
    },
    "is_here": {
        "zh": ("屏幕上有{x}吗", "这里有{x}吗", "有没有{x}", "能看到{x}吗"),
        "en": ("is {x} on this screen", "is {x} here", "is there {x} here", "can you see {x}"),
    },
}


def has_slot(intent: str) -> bool:
    """Whether the sentences of `intent` take a name."""
    return "{x}" in _CORES[intent][LANGUAGES[0]][0]  # type: ignore[index]


def split_phrasings(everything: Iterable[Phrasing]) -> dict[Split, tuple[Phrasing, ...]]:
    """Divide the phrasings of one intent and language into train and test by the rule of this module."""
    train = list(everything)
    quota = len(train) // HELD_OUT_ONE_IN
    test: list[Phrasing] = []
    for one in sorted(train, key=_rank):
        rest = [other for other in train if other is not one]
        taught = all(any(one.parts[i] == other.parts[i] for other in rest) for i in range(3))
        if len(test) < quota and taught and (one.prefix or one.suffix):
            train, test = rest, [*test, one]
    return {"train": tuple(train), "test": tuple(test)}


def _rank(one: Phrasing) -> bytes:
    """A shuffled order that is the same on every machine."""
    return hashlib.sha256("|".join((one.language, one.intent, *one.parts)).encode("utf-8")).digest()


@cache
def _split_of(language: Language, intent: Intent) -> dict[Split, tuple[Phrasing, ...]]:
    if intent in QUESTIONS:
        prefixes, suffixes = _ASKING[language], _SUFFIXES[language][:1]
    else:
        # After words to type, a suffix could be one of them ("type thank you").
        prefixes, suffixes = _PREFIXES[language], _SUFFIXES[language][: 1 if intent == "type" else None]
    return split_phrasings(
        Phrasing(language, intent, prefix, core, suffix)
        for core in _CORES[intent][language]
        for prefix in prefixes
        for suffix in suffixes
        if (prefix, suffix) not in _ODD and not (prefix and core in _REQUESTS)
    )


def phrasings(language: Language, intent: Intent, split: Split) -> tuple[Phrasing, ...]:
    """All ways to say `intent` in `language` that belong to `split`; never empty."""
    return _split_of(language, intent)[split]


def draw_phrase(rng: np.random.Generator, language: Language, intent: Intent, split: Split, name: str = "") -> str:
    """One sentence of `intent` with `name` in its slot; in the train split 2 in 5 are bare, as most commands are."""
    choices = phrasings(language, intent, split)
    bare = [one for one in choices if not one.prefix and not one.suffix]
    if bare and rng.random() < 0.4:
        choices = tuple(bare)
    return choices[int(rng.integers(len(choices)))].fill(name)


def written(rng: np.random.Generator, language: Language, sentence: str, *, question: bool = False) -> str:
    """A spoken sentence as somebody types it: a capital at times, a stop or a question mark at times."""
    if language == "en" and rng.random() < 0.5:
        sentence = sentence[0].upper() + sentence[1:]
    if rng.random() < 0.3:
        sentence += {("zh", True): "？", ("zh", False): "。", ("en", True): "?", ("en", False): "."}[language, question]
    return sentence
