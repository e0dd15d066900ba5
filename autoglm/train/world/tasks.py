"""Examples to learn from: a screen, typed or spoken words, and the one right thought and answer.

What is right, for an instruction that names X (first rule that fits):
  1. The page is loading: Wait, whatever X is; only Back, Home and a plain "wait" are done as asked.
  2. "Type X": Type if a text field has the focus, else finish saying that a field has to be tapped first.
  3. Exactly one tappable element is labelled X: Tap its centre, or Long Press when that was asked.
     (X on several elements, or only on things that cannot be tapped, is never asked for.)
  4. X is nowhere on the screen, X is an app and the verb was to open: Launch X.
  5. X is nowhere on the screen: finish saying so.
Scrolling words name the page's movement, swiping words the finger's: "scroll down" is "swipe up".
Questions about a screen or a sound are answered with finish(message=...), conversation without either in plain words;
a command without a screen is Launch, Back, Home or Wait, or finish asking to see the screen.
The instruction is in the language of the screen. Spoken words appear first in the thought, exactly as they were said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from autoglm.actions import Action, Back, Finish, Home, Launch, LongPress, Swipe, Tap, Type, Wait, format_action
from autoglm.train.world import replies
from autoglm.train.world.identity import (
    TOPICS,
    draw_question,
    identity_answer,
    identity_thought,
    spoken_phrasings,
)
from autoglm.train.world.labels import APPS, LANGUAGES, VISIBLE, Kind, Label, Language
from autoglm.train.world.phrases import COMMANDS, Intent, draw_phrase, written
from autoglm.train.world.salads import draw_salad
from autoglm.train.world.split import Split

if TYPE_CHECKING:
    from autoglm.train.world.screens import Element, Screen

Task = Literal[
    "typed_action", "spoken_action", "describe", "which_app", "is_here",  # with a screen
    "transcribe", "spoken_command", "spoken_identity",  # with a sound alone
    "identity", "typed_command",  # with words alone
]  # fmt: skip
# What evaluate.score looks at.
Metric = Literal["tap_in_box", "action_exact", "transcript_exact", "answer_exact", "identity_ok"]

# Shares of the tasks among the examples of one screen; those that do not fit the screen are drawn again.
SCREEN_MIX: Mapping[Task, float] = {
    "typed_action": 0.38, "spoken_action": 0.38, "describe": 0.08, "which_app": 0.06, "is_here": 0.10,
}  # fmt: skip
_COMMAND_WEIGHTS: Mapping[Intent, float] = {
    "tap": 0.40, "open": 0.24, "long_press": 0.08, "type": 0.08, "swipe_up": 0.03, "swipe_down": 0.03,
    "swipe_left": 0.02, "swipe_right": 0.02, "back": 0.04, "home": 0.04, "wait": 0.02,
}  # fmt: skip
# Among instructions that name something: how often it is not on the screen.
_ABSENT = 0.22
# How often training is asked to write down words that make no sentence.
_SALAD_SHARE = 0.5
# Names in a description; more would make the answer long and the first mistake likelier.
_NAMES_IN_DESCRIPTION = 3
_SWIPES: Mapping[Intent, Swipe] = {
    "swipe_up": Swipe(499, 749, 499, 249),
    "swipe_down": Swipe(499, 249, 499, 749),
    "swipe_left": Swipe(749, 499, 249, 499),
    "swipe_right": Swipe(249, 499, 749, 499),
}
_OPENED: tuple[Kind, ...] = ("app", "setting")
TYPED_KINDS: tuple[Kind, ...] = ("message", "app")
T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One user turn and its reply.

    typed    the text after the media, empty when the instruction was spoken
    spoken   the words said, without punctuation; None without sound
    thought, answer  what goes between the think and the answer tags
    target   the element to touch, None unless the answer is Tap or Long Press
    scored   the metrics this example counts for
    sought   the elements that show what is named: () when the screen does not, None where nothing is looked for
    listed   the elements that show each name of a description, in its order
    """

    task: Task
    language: Language
    screen: Screen | None
    typed: str
    spoken: str | None
    thought: str
    answer: str
    target: Element | None
    scored: tuple[Metric, ...]
    sought: tuple[Element, ...] | None = None
    listed: tuple[tuple[Element, ...], ...] = ()


@dataclass(frozen=True)
class _Decision:
    """What a command comes to on one screen: the words after the phrasing's verb, and the reply."""

    intent: Intent
    name: str
    thought: str
    action: Action
    target: Element | None = None
    sought: tuple[Element, ...] | None = None


def examples_for_screen(
    screen: Screen, rng: np.random.Generator, split: Split, count: int, *, mix: Mapping[Task, float] = SCREEN_MIX
) -> list[Example]:
    """`count` examples about one screen, their tasks drawn by the shares in `mix`."""
    tasks, weights = list(mix), np.array(list(mix.values()), dtype=np.float64)
    found: list[Example] = []
    while len(found) < count:
        task = tasks[int(rng.choice(len(tasks), p=weights / weights.sum()))]
        example = screen_example(task, screen, rng, split)
        if example is not None:
            found.append(example)
    return found


def screen_example(task: Task, screen: Screen, rng: np.random.Generator, split: Split) -> Example | None:
    """One example of `task`; None where the question makes no sense on this screen."""
    if task in ("typed_action", "spoken_action"):
        return _action_example(task, screen, rng, split)
    language = screen.language
    question = _question(task, screen, rng, split)
    if question is None:
        return None
    intent, name, thought, message = question
    typed = written(rng, language, draw_phrase(rng, language, intent, split, name), question=True)
    sought = showing(screen, name) if task == "is_here" else None
    names = [] if task != "describe" or screen.loading else described(screen)[:_NAMES_IN_DESCRIPTION]
    listed = tuple(showing(screen, one) for one in names)
    answer = format_action(Finish(message))
    return Example(task, language, screen, typed, None, thought, answer, None, ("answer_exact",), sought, listed)


def speech_only(rng: np.random.Generator, split: Split, *, language: Language | None = None) -> Example:
    """An example with sound and no screen: mostly writing down what is heard, some commands, a few questions."""
    chosen = language or _a_language(rng)
    kind = rng.random()
    if kind < 0.78:
        return transcribe(rng, split, chosen)
    if kind < 0.9:
        decision = _decide_blind(rng, chosen)
        spoken = draw_phrase(rng, chosen, decision.intent, split, decision.name)
        thought = replies.heard(chosen, spoken, decision.thought)
        answer = format_action(decision.action)
        scored: tuple[Metric, ...] = ("action_exact", "transcript_exact")
        return Example("spoken_command", chosen, None, "", spoken, thought, answer, None, scored)
    topic = _pick(rng, TOPICS[:3])
    spoken = _pick(rng, spoken_phrasings(chosen, topic))
    thought = replies.heard(chosen, spoken, identity_thought(chosen, topic))
    answer = identity_answer(chosen, topic)
    return Example(
        "spoken_identity", chosen, None, "", spoken, thought, answer, None, ("identity_ok", "transcript_exact")
    )


def transcribe(rng: np.random.Generator, split: Split, language: Language) -> Example:
    """A typed question what is heard, a spoken command (in training half of the time a salad), its words as answer."""
    is_salad = split == "train" and rng.random() < _SALAD_SHARE
    spoken = draw_salad(rng, language) if is_salad else draw_command(rng, split, language)
    typed = written(rng, language, draw_phrase(rng, language, "transcribe", split), question=True)
    answer = format_action(Finish(spoken))
    thought = replies.heard(language, spoken)
    return Example("transcribe", language, None, typed, spoken, thought, answer, None, ("transcript_exact",))


def text_only(rng: np.random.Generator, split: Split, *, language: Language | None = None) -> Example:
    """An example of words alone: talk about itself, some commands."""
    chosen = language or _a_language(rng)
    if rng.random() < 0.8:
        return identity(rng, split, chosen)
    decision = _decide_blind(rng, chosen)
    sentence = draw_phrase(rng, chosen, decision.intent, split, decision.name)
    answer = format_action(decision.action)
    typed = written(rng, chosen, sentence)
    return Example("typed_command", chosen, None, typed, None, decision.thought, answer, None, ("action_exact",))


def identity(rng: np.random.Generator, split: Split, language: Language) -> Example:
    """A question about the model itself, or a greeting, and its answer in plain words."""
    # Who it is matters most.
    topic = "who" if rng.random() < 0.4 else _pick(rng, TOPICS)
    typed = draw_question(rng, language, topic, split)
    thought, answer = identity_thought(language, topic), identity_answer(language, topic)
    return Example("identity", language, None, typed, None, thought, answer, None, ("identity_ok",))


def draw_command(rng: np.random.Generator, split: Split, language: Language) -> str:
    """One sentence of command as it is spoken, over all intents and names; for banks of speech."""
    intent = _pick_intent(rng)
    kinds = {"open": _OPENED, "type": TYPED_KINDS}.get(intent)
    names = [label for label in VISIBLE if kinds is None or label.kind in kinds]
    return draw_phrase(rng, language, intent, split, _pick(rng, names).text(language))


def _action_example(task: Task, screen: Screen, rng: np.random.Generator, split: Split) -> Example | None:
    decision = _decide(screen, rng)
    if decision is None:
        return None
    language, answer = screen.language, format_action(decision.action)
    sentence = draw_phrase(rng, language, decision.intent, split, decision.name)
    scored: tuple[Metric, ...] = ("action_exact",)
    if isinstance(decision.action, Tap):
        scored = ("tap_in_box", *scored)
    if task == "typed_action":
        typed = written(rng, language, sentence)
        return Example(
            task, language, screen, typed, None, decision.thought, answer, decision.target, scored, decision.sought
        )
    thought = replies.heard(language, sentence, decision.thought)
    scored = (*scored, "transcript_exact")
    return Example(task, language, screen, "", sentence, thought, answer, decision.target, scored, decision.sought)


def _decide(screen: Screen, rng: np.random.Generator) -> _Decision | None:
    """Draw a command and what is right on this screen by the rules of this module; None if none fits."""
    language, intent = screen.language, _pick_intent(rng)
    if screen.field_focused and rng.random() < 0.25:
        intent = "type"
    if intent not in ("tap", "open", "long_press", "type"):
        return _loading(intent, "", language) if _must_wait(screen, intent) else _fixed(intent, language)
    element, label = _thing_to_name(screen, rng, intent)
    if label is None:
        return None
    name = label.text(language)
    if screen.loading:
        return _loading(intent, name, language)
    if intent == "type":
        if screen.field_focused:
            return _Decision(intent, name, replies.thought(language, "type", name), Type(name))
        if screen.keyboard:  # a keyboard without a focused field cannot be judged by looking
            return None
        return _finish(intent, name, language, "no_field")
    if element is not None:
        x, y = centre(element)
        action: Action = LongPress(x, y) if intent == "long_press" else Tap(x, y)
        key: replies.Key = "long_press" if intent == "long_press" else "tap"
        return _Decision(intent, name, replies.thought(language, key, name), action, element, (element,))
    if intent == "open" and label.kind == "app":
        return _Decision(intent, name, replies.thought(language, "launch", name), Launch(name), sought=())
    return replace(_finish(intent, name, language, "absent"), sought=())


def _thing_to_name(screen: Screen, rng: np.random.Generator, intent: Intent) -> tuple[Element | None, Label | None]:
    """An element to act on, or only the label of something that is not on the screen (or is to be typed)."""
    if intent == "type":
        return None, _pick(rng, [label for label in VISIBLE if label.kind in TYPED_KINDS])
    kinds = _OPENED if intent == "open" else None
    here = [] if screen.loading else [one for one in _unambiguous(screen) if kinds is None or one.label.kind in kinds]
    if here and rng.random() >= _ABSENT:
        element = _pick(rng, here)
        return element, element.label
    return None, _absent_label(screen, rng, kinds)


def _decide_blind(rng: np.random.Generator, language: Language) -> _Decision:
    """A command given without a screen."""
    intent = _pick_intent(rng)
    if intent in ("back", "home", "wait"):
        return _fixed(intent, language)
    if intent == "open":
        name = _pick(rng, APPS).text(language)
        return _Decision(intent, name, replies.thought(language, "launch", name), Launch(name))
    return _finish(intent, _pick(rng, VISIBLE).text(language), language, "no_screen")


def _question(
    task: Task, screen: Screen, rng: np.random.Generator, split: Split
) -> tuple[Intent, str, str, str] | None:
    """Intent, name asked for, thought and message of one question about `screen`."""
    language = screen.language
    page = screen.page.text(language)
    the_page = f"the {page}" if language == "en" else page
    if task == "describe":
        if screen.loading:
            return "describe", "", replies.thought(language, "loading"), replies.message(language, "loading")
        message = replies.describe(language, page, described(screen)[:_NAMES_IN_DESCRIPTION])
        return "describe", "", replies.thought(language, "page", the_page), message
    if task == "which_app":
        if screen.app is None and screen.page.key != "launcher":
            return None
        name = the_page if screen.app is None else screen.app.text(language)
        return "which_app", "", replies.thought(language, "page", name), replies.app_is(language, name)
    here = reading_order(screen)
    if here and rng.random() < 0.5:
        name = _pick(rng, here).label.text(language)
        return "is_here", name, replies.thought(language, "present", name), replies.message(language, "present", name)
    label = _absent_label(screen, rng, None)
    if label is None:
        return None
    name = label.text(language)
    return "is_here", name, replies.thought(language, "absent", name), replies.message(language, "absent", name)


def centre(element: Element) -> tuple[int, int]:
    """The middle of an element's box in coordinates 0..999 of the screen."""
    x0, y0, x1, y1 = element.box
    return min(999, int((x0 + x1) * 500)), min(999, int((y0 + y1) * 500))


def reading_order(screen: Screen) -> list[Element]:
    """The elements by rows, each row from left to right; over a dialog only what can be touched counts.

    Two elements are in one row when their middles differ by less than 2 % of the height.
    """
    shown = [one for one in screen.elements if one.tappable or screen.page.key != "dialog"]
    rows: list[list[Element]] = []
    for element in sorted(shown, key=lambda one: one.box[1] + one.box[3]):
        middle = element.box[1] + element.box[3]
        if rows and middle - (rows[-1][0].box[1] + rows[-1][0].box[3]) < 0.04:
            rows[-1].append(element)
        else:
            rows.append([element])
    return [element for row in rows for element in sorted(row, key=lambda one: one.box[0])]


def described(screen: Screen) -> list[str]:
    """All names a description of `screen` may give, in reading order: everything on it but its own title."""
    names = [one.label.text(screen.language) for one in reading_order(screen) if one.label != screen.app]
    return list(dict.fromkeys(names))


def showing(screen: Screen, name: str) -> tuple[Element, ...]:
    """The elements of `screen` whose words are `name`, whatever the case of its letters."""
    return tuple(one for one in screen.elements if _folded(one.label, screen) == name.casefold())


def _unambiguous(screen: Screen) -> list[Element]:
    """The tappable elements whose words are on no other element."""
    texts = [_folded(one.label, screen) for one in screen.elements]
    return [one for one in screen.elements if one.tappable and texts.count(_folded(one.label, screen)) == 1]


def _absent_label(screen: Screen, rng: np.random.Generator, kinds: Sequence[Kind] | None) -> Label | None:
    """Something not on the screen, half of the time of a kind that is (those are the hard ones)."""
    taken = {_folded(one.label, screen) for one in screen.elements} | {_folded(screen.page, screen)}
    if screen.app is not None:
        taken.add(_folded(screen.app, screen))
    free = [one for one in VISIBLE if _folded(one, screen) not in taken and (kinds is None or one.kind in kinds)]
    present = {one.label.kind for one in screen.elements}
    near = [one for one in free if one.kind in present]
    choices = near if near and rng.random() < 0.5 else free
    return _pick(rng, choices) if choices else None


def _folded(label: Label, screen: Screen) -> str:
    return label.text(screen.language).casefold()


def _must_wait(screen: Screen, intent: Intent) -> bool:
    return screen.loading and intent not in ("back", "home", "wait")


def _loading(intent: Intent, name: str, language: Language) -> _Decision:
    return _Decision(intent, name, replies.thought(language, "loading"), Wait())


def _finish(intent: Intent, name: str, language: Language, key: replies.Key) -> _Decision:
    message = replies.message(language, key, name)
    return _Decision(intent, name, replies.thought(language, key, name), Finish(message))


def _fixed(intent: Intent, language: Language) -> _Decision:
    """A command without a name: swipes, Back, Home and Wait."""
    others: Mapping[Intent, Action] = {"back": Back(), "home": Home(), "wait": Wait()}
    key: replies.Key = intent  # type: ignore[assignment]  # these intents are keys too
    return _Decision(intent, "", replies.thought(language, key), {**_SWIPES, **others}[intent])


def _pick_intent(rng: np.random.Generator) -> Intent:
    weights = [_COMMAND_WEIGHTS[intent] for intent in COMMANDS]
    return COMMANDS[int(rng.choice(len(COMMANDS), p=weights))]


def _a_language(rng: np.random.Generator) -> Language:
    return LANGUAGES[int(rng.integers(len(LANGUAGES)))]


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]
