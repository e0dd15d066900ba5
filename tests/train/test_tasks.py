"""Examples: exactly the right action by the rules of tasks.py, on made-up screens and on drawn ones."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from autoglm.actions import Back, Finish, Home, Launch, LongPress, Swipe, Tap, Type, Wait, parse_action
from autoglm.train.tokenizer import load_tokenizer
from autoglm.train.world import replies
from autoglm.train.world.labels import BY_KEY, LANGUAGES, Kind, Language
from autoglm.train.world.screens import Element, Screen, draw_screen
from autoglm.train.world.split import rng_for
from autoglm.train.world.tasks import (
    Example,
    Task,
    centre,
    described,
    examples_for_screen,
    identity,
    reading_order,
    screen_example,
    speech_only,
    text_only,
    transcribe,
)

ICON = Image.new("RGB", (90, 200))


def element(kind: Kind, key: str, x: float = 0.1, y: float = 0.1, *, tappable: bool = True) -> Element:
    box = (x, y, x + 0.2, y + 0.08)
    return Element(BY_KEY[kind, key], "row", box, box, tappable)


def screen(
    *elements: Element,
    page: str = "launcher",
    app: str | None = None,
    language: Language = "en",
    focused: bool = False,
    loading: bool = False,
) -> Screen:
    return Screen(
        image=ICON, page=BY_KEY["page", page], app=BY_KEY["app", app] if app else None, language=language,
        elements=elements, keyboard=focused, field_focused=focused, dark=False, loading=loading,
    )  # fmt: skip


def actions(one: Screen, count: int = 300, kind: Task = "typed_action") -> list[Example]:
    rng = np.random.default_rng(11)
    return [e for e in (screen_example(kind, one, rng, "train") for _ in range(count)) if e is not None]


def asks_for(example: Example, name: str) -> bool:
    return name.casefold() in (example.typed + (example.spoken or "")).casefold()


def test_what_is_there_is_tapped_or_pressed_in_its_middle() -> None:
    target = element("app", "wechat", 0.3, 0.5)
    asked = [e for e in actions(screen(target)) if asks_for(e, "WeChat") and e.target is not None]
    assert {type(parse_action(e.answer)) for e in asked} == {Tap, LongPress}
    for example in asked:
        action = parse_action(example.answer)
        assert isinstance(action, (Tap, LongPress)) and (action.x, action.y) == (400, 540) == centre(target)
        pressed = any(word in example.typed.lower() for word in ("long press", "hold"))
        assert pressed == isinstance(action, LongPress)
        assert ("tap_in_box" in example.scored) == isinstance(action, Tap)
        assert example.thought == ("Long press WeChat" if pressed else "Tap WeChat")


def test_an_app_that_is_not_there_is_launched_when_it_was_to_be_opened_and_missed_when_it_was_to_be_tapped() -> None:
    seen = Counter()
    for example in actions(screen(element("button", "ok")), 800):
        action = parse_action(example.answer)
        words = example.typed.lower()
        if isinstance(action, Launch):
            assert any(verb in words for verb in ("open", "go to", "enter")) and asks_for(example, action.app)
            seen["launch"] += 1
        elif isinstance(action, Finish) and "There is no" in action.message:
            assert any(verb in words for verb in ("tap", "click", "press", "select", "hold", "open", "go to", "enter"))
            seen["missed"] += 1
    assert seen["launch"] > 20 and seen["missed"] > 20


def test_what_is_named_is_sought_whether_it_is_there_or_not() -> None:
    """Taps seek their target, launches and "there is no" seek nothing that is shown, the rest does not seek."""
    target, seen = element("app", "wechat", 0.3, 0.5), Counter()
    for example in actions(screen(target), 800):
        action = parse_action(example.answer)
        missed = isinstance(action, Launch) or (isinstance(action, Finish) and "There is no" in action.message)
        kind = "here" if isinstance(action, (Tap, LongPress)) else "missed" if missed else "other"
        assert example.sought == {"here": (target,), "missed": (), "other": None}[kind]
        seen[kind if not isinstance(action, Launch) else "launched"] += 1
    assert min(seen[kind] for kind in ("here", "missed", "launched", "other")) > 10


def test_what_stands_twice_or_cannot_be_touched_is_never_asked_for() -> None:
    twice = screen(
        element("app", "mail"), element("app", "mail", y=0.6), element("app", "music", y=0.8, tappable=False),
        element("app", "news", y=0.3), page="dialog",
    )  # fmt: skip
    for example in actions(twice, 600):
        assert example.target is None or example.target.label.key == "news"
        if example.target is None and not isinstance(parse_action(example.answer), Type):
            assert isinstance(parse_action(example.answer), Finish) or not asks_for(example, "Music")
            assert "on this screen" not in example.answer or not asks_for(example, " Mail")


def test_the_page_s_own_app_is_neither_launched_nor_missed() -> None:
    for example in actions(screen(element("button", "send"), page="chat", app="wechat"), 800):
        if asks_for(example, "WeChat"):
            assert not isinstance(parse_action(example.answer), Launch)
            assert "There is no" not in example.answer


def test_typing_needs_a_focused_field() -> None:
    for focused in (True, False):
        asked = [
            e for e in actions(screen(element("button", "send"), focused=focused), 600)
            if any(verb in e.typed.lower() for verb in ("type ", "write "))
        ]  # fmt: skip
        assert len(asked) > 10
        for example in asked:
            action = parse_action(example.answer)
            if focused:
                assert isinstance(action, Type) and asks_for(example, action.text)
            else:
                assert action == Finish("Please tap a text field first.")


def test_a_loading_page_is_waited_for_unless_one_wants_away() -> None:
    kinds = Counter()
    page = screen(element("app", "wechat", tappable=False), page="shop", app="taobao", loading=True)
    for example in actions(page, 400):
        action = parse_action(example.answer)
        kinds[type(action)] += 1
        words = example.typed.lower()
        if isinstance(action, (Back, Home)):
            assert "back" in words or "home" in words
        else:
            assert action == Wait()
    assert set(kinds) == {Back, Home, Wait}


def test_scrolling_moves_the_page_and_swiping_the_finger() -> None:
    for example in actions(screen(), 1500):
        action = parse_action(example.answer)
        if isinstance(action, Swipe):
            up = action.to_y < action.y
            words = example.typed.lower()
            assert up == ("swipe up" in words or "scroll down" in words)
            right = action.to_x > action.x
            assert right == ("right" in words)


def test_spoken_words_come_first_in_the_thought_and_nothing_is_typed() -> None:
    one = screen(element("app", "wechat"), language="zh")
    for example in actions(one, 200, "spoken_action"):
        assert example.typed == "" and example.spoken
        assert replies.heard_in("zh", example.thought) == example.spoken
        assert "transcript_exact" in example.scored and "\n" in example.thought


def test_descriptions_read_in_rows_and_leave_the_title_out() -> None:
    page = screen(
        element("contact", "mom", 0.5, 0.50), element("contact", "dad", 0.1, 0.51), element("app", "wechat", y=0.02),
        element("contact", "boss", y=0.8), element("button", "search", 0.7, 0.03), page="chat_list", app="wechat",
    )  # fmt: skip
    assert [e.label.key for e in reading_order(page)] == ["wechat", "search", "dad", "mom", "boss"]
    assert described(page) == ["Search", "Dad", "Mom", "David"]
    example = screen_example("describe", page, np.random.default_rng(0), "train")
    assert example is not None
    assert parse_action(example.answer) == Finish("This is the chat list with Search, Dad, Mom.")


def test_under_a_dialog_only_its_own_things_count() -> None:
    page = screen(
        element("app", "mail", tappable=False), element("button", "ok", y=0.6), page="dialog", app="books"
    )  # fmt: skip
    rng = np.random.default_rng(0)
    assert described(page) == ["OK"]
    messages = set()
    for _ in range(400):
        example = screen_example("is_here", page, rng, "train")
        assert example is not None
        messages.add(example.answer)
    assert 'finish(message="Yes, OK is on this screen.")' in messages and len(messages) > 20
    assert not {answer for answer in messages if " Mail " in answer or " Books " in answer}


def test_which_app_needs_an_app_or_the_home_screen() -> None:
    rng = np.random.default_rng(0)
    assert screen_example("which_app", screen(page="dialog"), rng, "train") is None
    for one, said in ((screen(app="maps", page="shop"), "This is Maps."), (screen(), "This is the home screen.")):
        example = screen_example("which_app", one, rng, "train")
        assert example is not None and parse_action(example.answer) == Finish(said)


def test_without_a_screen_apps_are_launched_and_the_rest_wants_to_see_one() -> None:
    rng = np.random.default_rng(1)
    commands = [e for e in (text_only(rng, "train") for _ in range(800)) if e.task == "typed_command"]
    kinds = {type(parse_action(e.answer)) for e in commands}
    assert kinds == {Launch, Back, Home, Wait, Finish}


def test_speech_alone_is_written_down_done_or_answered() -> None:
    rng = np.random.default_rng(2)
    tasks = Counter(speech_only(rng, "train").task for _ in range(300))
    assert set(tasks) == {"transcribe", "spoken_command", "spoken_identity"}
    example = transcribe(rng, "test", "zh")
    assert example.spoken and parse_action(example.answer) == Finish(example.spoken)


def test_talk_about_itself_is_answered_in_plain_words() -> None:
    for language in LANGUAGES:
        example = identity(np.random.default_rng(2), "test", language)
        assert "AutoGLM-Phone-Nano" in example.answer and not example.answer.startswith("finish")


def test_the_same_seed_gives_the_same_examples() -> None:
    page = screen(element("app", "mail"), element("button", "ok", y=0.6))
    first, again = (examples_for_screen(page, rng_for("train", "x", 1), "train", 20) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("split", ["train", "test"])
def test_examples_of_drawn_screens_keep_every_promise(split: Literal["train", "test"]) -> None:
    tokenizer = load_tokenizer()
    tasks = Counter()
    for seed in range(12):
        drawn = draw_screen(seed, split, width=300)
        for example in examples_for_screen(drawn, rng_for(split, "test", seed), split, 12):
            tasks[example.task] += 1
            action = parse_action(example.answer)
            assert (example.target is not None) == isinstance(action, (Tap, LongPress))
            if isinstance(action, (Tap, LongPress)) and example.target is not None:
                x0, y0, x1, y1 = example.target.box
                assert x0 < (action.x + 0.5) / 1000 < x1 and y0 < (action.y + 0.5) / 1000 < y1
            last_line = example.thought.splitlines()[-1]
            assert len(tokenizer.encode(last_line)) <= 12
            assert len(tokenizer.reply(example.thought, example.answer)) <= 60
    assert set(tasks) == {"typed_action", "spoken_action", "describe", "which_app", "is_here"}
