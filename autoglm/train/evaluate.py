"""Score replies against examples of the held-out world, with Wilson intervals and a Markdown table.

Metrics (each over the examples it is defined for, see tasks.py):
  tap_in_box        the answer is a Tap inside the target's box
  action_exact      the right action: Tap and Long Press inside the box, every other one with equal arguments
  transcript_exact  the words said, written down exactly; letter case, punctuation and white space are not speech
  answer_exact      the message equals the right one; a description names the page and things that are all on it
  identity_ok       the answer holds every fact identity.is_identity_answer asks for
Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927 (score interval).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from autoglm.actions import Action, Finish, Launch, LongPress, Tap, Type, parse_action
from autoglm.errors import FormatError
from autoglm.train.world import replies
from autoglm.train.world.identity import is_identity_answer
from autoglm.train.world.labels import LANGUAGES, Language
from autoglm.train.world.screens import Element, Screen, draw_screen
from autoglm.train.world.split import Split, rng_for
from autoglm.train.world.tasks import (
    Example,
    Metric,
    Task,
    described,
    identity,
    screen_example,
    transcribe,
)

# How many examples of each task one evaluation asks; 240 leave an interval of about 4 points at 90 %.
COUNTS: Mapping[Task, int] = {
    "typed_action": 240, "spoken_action": 240, "describe": 60, "which_app": 60, "is_here": 80,
    "transcribe": 120, "identity": 120,
}  # fmt: skip
_SCREEN_TASKS: tuple[Task, ...] = ("typed_action", "spoken_action", "describe", "which_app", "is_here")
_QUESTIONS: tuple[Task, ...] = ("describe", "which_app", "is_here")
# 97.5 % point of the normal distribution: intervals hold 95 %.
_Z = 1.959964
# The rows of the table: name, title, tasks, metric, language (None: both), the share that is asked for.
ROWS: tuple[tuple[str, str, tuple[Task, ...], Metric, Language | None, float | None], ...] = (
    ("typed_tap", "typed instruction: tap inside the box", ("typed_action",), "tap_in_box", None, 0.90),
    ("typed_action", "typed instruction: whole action right", ("typed_action",), "action_exact", None, 0.85),
    ("spoken_tap", "spoken instruction: tap inside the box", ("spoken_action",), "tap_in_box", None, 0.85),
    ("spoken_action", "spoken instruction: whole action right", ("spoken_action",), "action_exact", None, None),
    (
        "transcript", "spoken command written down exactly", ("spoken_action", "transcribe"), "transcript_exact", None,
        0.90,
    ),
    ("transcript_zh", "of these, Chinese", ("spoken_action", "transcribe"), "transcript_exact", "zh", None),
    ("transcript_en", "of these, English", ("spoken_action", "transcribe"), "transcript_exact", "en", None),
    ("questions", "screen questions", _QUESTIONS, "answer_exact", None, 0.90),
    ("describe", "of these, what is on this screen", ("describe",), "answer_exact", None, None),
    ("which_app", "of these, which app is this", ("which_app",), "answer_exact", None, None),
    ("is_here", "of these, is X here", ("is_here",), "answer_exact", None, None),
    ("identity_zh", "who are you, Chinese", ("identity",), "identity_ok", "zh", 1.0),
    ("identity_en", "who are you, English", ("identity",), "identity_ok", "en", 1.0),
)  # fmt: skip

Generate = Callable[[list[Example]], list[str]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Rate:
    """How many of how many were right."""

    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else math.nan

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval of the share; (0, 1) for no examples."""
        if not self.total:
            return 0.0, 1.0
        spread = _Z * math.sqrt(self.share * (1 - self.share) / self.total + (_Z / (2 * self.total)) ** 2)
        middle, scale = self.share + _Z**2 / (2 * self.total), 1 + _Z**2 / self.total
        return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)

    def __str__(self) -> str:
        if not self.total:
            return "–"
        low, high = self.interval()
        return f"{100 * self.share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def score(example: Example, reply: str) -> dict[Metric, bool]:
    """Each metric of `example` for a reply as the model wrote it, `<think>...</think>\\n<answer>...</answer>`.

    A reply of any other form scores what it deserves and never raises.
    """
    thought, answer = split_reply(reply)
    action = _read(answer)
    found: dict[Metric, bool] = {}
    for metric in example.scored:
        if metric == "tap_in_box":
            found[metric] = isinstance(action, Tap) and _is_inside(action, example.target)
        elif metric == "action_exact":
            found[metric] = action is not None and _is_right(action, example)
        elif metric == "transcript_exact":
            found[metric] = _wrote_down(example, thought, action)
        elif metric == "answer_exact":
            found[metric] = isinstance(action, Finish) and _answers(example, action.message)
        else:
            said = action.message if isinstance(action, Finish) else answer
            found[metric] = is_identity_answer(example.language, said)
    return found


def split_reply(reply: str) -> tuple[str, str]:
    """The thought and the answer out of a reply; missing tags leave either empty."""
    thought = re.search(r"<think>(.*?)</think>", reply, re.DOTALL)
    answer = re.search(r"<answer>(.*?)(?:</answer>|<\|endoftext\|>|\Z)", reply, re.DOTALL)
    return (thought[1] if thought else ""), (answer[1] if answer else "")


def evaluation_examples(
    task: Task, count: int, *, split: Split = "test", seed: int = 0, width: int | None = 448, blank: bool = False
) -> list[Example]:
    """The first `count` examples of `task`, the same on every call; languages alternate.

    width  of the screens drawn, None for each device's own
    blank  the pictures are one grey: what is left is what was heard
    """
    found: list[Example] = []
    number = 0
    while len(found) < count:
        # The language follows the examples found, so that both are asked equally often whatever was skipped.
        language = LANGUAGES[len(found) % len(LANGUAGES)]
        rng = rng_for(split, "evaluate", seed, task, number)
        if task in _SCREEN_TASKS:
            screen = draw_screen(seed * 1_000_003 + number, split, width=width, language=language)
            example = screen_example(task, _blank(screen) if blank else screen, rng, split)
            if example is not None:
                found.append(example)
        elif task == "transcribe":
            found.append(transcribe(rng, split, language))
        elif task == "identity":
            found.append(identity(rng, split, language))
        else:
            raise ValueError(f"no evaluation asks {task!r}, tasks are {', '.join(COUNTS)}")
        number += 1
    return found


def evaluate(
    generate: Generate,
    *,
    split: Split = "test",
    counts: Mapping[Task, int] = COUNTS,
    seed: int = 0,
    width: int | None = 448,
    blank: bool = False,
    chunk: int = 40,
    progress: Progress | None = None,
) -> dict[str, Rate]:
    """Ask `generate` the examples of every task and count what is right: row name -> Rate, rows without examples out.

    generate  a list of examples -> their replies, in order; called with at most `chunk` examples of one task
    progress  called with (examples done, examples in all)
    """
    results: list[tuple[Example, dict[Metric, bool]]] = []
    total = sum(counts.values())
    for task, count in counts.items():
        examples = evaluation_examples(task, count, split=split, seed=seed, width=width, blank=blank)
        for start in range(0, len(examples), chunk):
            asked = examples[start : start + chunk]
            given = generate(asked)
            if len(given) != len(asked):
                raise ValueError(f"generate gave {len(given)} replies to {len(asked)} examples")
            results += [(example, score(example, reply)) for example, reply in zip(asked, given, strict=True)]
            if progress is not None:
                progress(len(results), total)
    return count_rows(results)


def count_rows(results: Sequence[tuple[Example, Mapping[Metric, bool]]]) -> dict[str, Rate]:
    """The rows of the table that the scored examples fill."""
    rows: dict[str, Rate] = {}
    for name, _, tasks, metric, language, _ in ROWS:
        right = [
            scores[metric]
            for example, scores in results
            if example.task in tasks and metric in scores and language in (None, example.language)
        ]
        if right:
            rows[name] = Rate(sum(right), len(right))
    return rows


def to_json(rates: Mapping[str, Rate]) -> dict[str, dict[str, float]]:
    """Rates for a metrics file."""
    return {
        name: {"right": rate.right, "total": rate.total, "share": rate.share, "low": low, "high": high}
        for name, rate in rates.items()
        for low, high in [rate.interval()]
    }


def from_json(content: Mapping[str, Mapping[str, float]]) -> dict[str, Rate]:
    """What to_json wrote; FormatError if a rate is damaged."""
    try:
        rates = {name: Rate(int(entry["right"]), int(entry["total"])) for name, entry in content.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FormatError("an evaluation file holds no rates; run `autoglm eval` again") from None
    if any(not 0 <= rate.right <= rate.total for rate in rates.values()):
        raise FormatError("an evaluation file has more right answers than examples; run `autoglm eval` again")
    return rates


def markdown_table(columns: Mapping[str, Mapping[str, Rate]]) -> str:
    """Metrics by rows and models by columns, with 95 % intervals, the share asked for and the number of examples."""
    lines = [
        f"| measured on the held-out set | asked | {' | '.join(columns)} | examples |",
        "| --- | ---: |" + " ---: |" * (len(columns) + 1),
    ]
    for name, title, _, _, _, goal in ROWS:
        rates = [rates.get(name) for rates in columns.values()]
        if all(rate is None for rate in rates):
            continue
        cells = " | ".join("–" if rate is None else str(rate) for rate in rates)
        totals = sorted({rate.total for rate in rates if rate is not None})
        asked = "" if goal is None else f"{100 * goal:.0f} %"
        lines.append(f"| {title} | {asked} | {cells} | {' / '.join(map(str, totals))} |")
    return "\n".join(lines) + "\n"


def _read(answer: str) -> Action | None:
    try:
        return parse_action(answer)
    except FormatError:
        return None


def _is_inside(action: Tap | LongPress, target: Element | None) -> bool:
    """Whether the middle of the named thousandth of the screen lies in the target's box."""
    if target is None:
        return False
    x0, y0, x1, y1 = target.box
    x, y = (action.x + 0.5) / 1000, (action.y + 0.5) / 1000
    return x0 <= x <= x1 and y0 <= y <= y1


def _is_right(action: Action, example: Example) -> bool:
    wanted = parse_action(example.answer)
    if type(action) is not type(wanted):
        return False
    if isinstance(action, (Tap, LongPress)):
        return _is_inside(action, example.target)
    if isinstance(action, Finish) and isinstance(wanted, Finish):
        return _plain(action.message) == _plain(wanted.message)
    if isinstance(action, Launch) and isinstance(wanted, Launch):
        return _plain(action.app) == _plain(wanted.app)
    if isinstance(action, Type) and isinstance(wanted, Type):
        return _plain(action.text) == _plain(wanted.text)
    return action == wanted


def _wrote_down(example: Example, thought: str, action: Action | None) -> bool:
    """Asked what is heard the answer counts, else the first line of the thought."""
    if example.spoken is None:
        return False
    if example.task == "transcribe":
        said = action.message if isinstance(action, Finish) else None
    else:
        said = replies.heard_in(example.language, thought)
    return said is not None and _plain(said) == _plain(example.spoken)


def _answers(example: Example, message: str) -> bool:
    wanted = parse_action(example.answer)
    assert isinstance(wanted, Finish)
    if example.task != "describe" or example.screen is None or example.screen.loading:
        return _plain(message) == _plain(wanted.message)
    right, given = (replies.described(example.language, text) for text in (wanted.message, message))
    if right is None or given is None:
        return False
    shown = {_plain(name) for name in described(example.screen)}
    named = [_plain(name) for name in given[1]]
    enough = len(set(named)) == len(named) >= len(right[1])
    return _plain(given[0]) == _plain(right[0]) and enough and shown.issuperset(named)


def _plain(text: str) -> str:
    """Letters and digits with single spaces between English words; Chinese has none to keep."""
    words = re.sub(r"[^\w\s]|_", " ", text.casefold()).split()
    return re.sub(r"(?<=[^\x00-\x7f]) (?=[^\x00-\x7f])", "", " ".join(words))


def _blank(screen: Screen) -> Screen:
    return replace(screen, image=Image.new("RGB", screen.image.size, (128, 128, 128)))
