"""The sentences of thoughts and answers, in two languages: one wording for each thing there is to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from autoglm.train.world.labels import Language

Key = Literal[
    "tap", "long_press", "launch", "type", "swipe_up", "swipe_down", "swipe_left", "swipe_right", "back", "home",
    "wait", "loading", "absent", "no_field", "no_screen", "present", "page", "heard",
]  # fmt: skip

_THOUGHTS: dict[Language, dict[Key, str]] = {
    "zh": {
        "tap": "点击{x}", "long_press": "长按{x}", "launch": "启动{x}", "type": "输入{x}", "swipe_up": "向上滑",
        "swipe_down": "向下滑", "swipe_left": "向左滑", "swipe_right": "向右滑", "back": "返回", "home": "回到桌面",
        "wait": "等一下", "loading": "正在加载", "absent": "没有{x}", "no_field": "没有输入框",
        "no_screen": "没有屏幕", "present": "看到{x}", "page": "看到{x}", "heard": "听到：{x}",
    },
    "en": {
        "tap": "Tap {x}", "long_press": "Long press {x}", "launch": "Launch {x}", "type": "Type {x}",
        "swipe_up": "Swipe up", "swipe_down": "Swipe down", "swipe_left": "Swipe left", "swipe_right": "Swipe right",
        "back": "Go back", "home": "Go home", "wait": "Wait", "loading": "Loading", "absent": "No {x}",
        "no_field": "No text field", "no_screen": "No screen", "present": "I see {x}", "page": "I see {x}",
        "heard": "Heard: {x}",
    },
}  # fmt: skip
_MESSAGES: dict[Language, dict[Key, str]] = {
    "zh": {
        "absent": "屏幕上没有{x}。", "present": "屏幕上有{x}。", "no_field": "请先点击输入框。",
        "no_screen": "请给我看屏幕。", "loading": "页面正在加载。",
    },
    "en": {
        "absent": "There is no {x} on this screen.", "present": "Yes, {x} is on this screen.",
        "no_field": "Please tap a text field first.", "no_screen": "Please show me the screen.",
        "loading": "The page is loading.",
    },
}  # fmt: skip
MESSAGE_KEYS: tuple[Key, ...] = tuple(_MESSAGES["zh"])


def thought(language: Language, key: Key, name: str = "") -> str:
    return _THOUGHTS[language][key].replace("{x}", name)


def message(language: Language, key: Key, name: str = "") -> str:
    return _MESSAGES[language][key].replace("{x}", name)


def heard(language: Language, sentence: str, then: str = "") -> str:
    """The thought about something spoken: a line with the words, then `then`."""
    start = thought(language, "heard", sentence)
    return f"{start}\n{then}" if then else start


def heard_in(language: Language, text: str) -> str | None:
    """The words a thought written by `heard` holds; None if there are none."""
    start = thought(language, "heard")
    if not text.startswith(start):
        return None
    return text[len(start) :].partition("\n")[0].strip()


def describe(language: Language, page: str, names: Sequence[str]) -> str:
    """What a page is and the things named on it."""
    if language == "zh":
        return f"这是{page}，有{'、'.join(names)}。" if names else f"这是{page}。"
    return f"This is the {page} with {', '.join(names)}." if names else f"This is the {page}."


def described(language: Language, text: str) -> tuple[str, tuple[str, ...]] | None:
    """The page and the names out of a sentence written by `describe`; None if it is of another form."""
    start, between, comma = ("这是", "，有", "、") if language == "zh" else ("This is the ", " with ", ", ")
    if not text.startswith(start):
        return None
    page, _, names = text[len(start) :].rstrip("。.").partition(between)
    return page, tuple(names.split(comma)) if names else ()


def app_is(language: Language, name: str) -> str:
    """The answer to which app this is."""
    return f"这是{name}。" if language == "zh" else f"This is {name}."
