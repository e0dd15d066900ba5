"""How often two models give the same replies to the same examples, and the replies that differ.

Metrics, over the examples both were asked:
  same_answers   what stands between the answer tags is equal to the last character; the thought may differ
  same_replies   thought and answer are; white space and closing tags around them may differ
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoglm.train.evaluate import Generate, Rate, split_reply
from autoglm.train.world.tasks import Example


class Recorder:
    """A `generate` that remembers the examples it was asked and the replies it gave, in order."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self.examples: list[Example] = []
        self.replies: list[str] = []

    def __call__(self, examples: list[Example]) -> list[str]:
        replies = self._generate(examples)
        self.examples += examples
        self.replies += replies
        return replies


@dataclass(frozen=True)
class Difference:
    """One example that two models answered differently; number counts the examples of its task from 0."""

    number: int
    example: Example
    first: str
    second: str


@dataclass(frozen=True)
class Agreement:
    """same_answers and same_replies, see above; media_answers is same_answers of examples with picture or sound."""

    same_answers: Rate
    media_answers: Rate
    same_replies: Rate
    differences: tuple[Difference, ...]


def agreement(examples: Sequence[Example], first: Sequence[str], second: Sequence[str]) -> Agreement:
    """Compare the replies of two models, one each per example. `differences` holds those whose answers differ."""
    is_same = [split_reply(a)[1] == split_reply(b)[1] for a, b in zip(first, second, strict=True)]
    has_media = [example.screen is not None or example.spoken is not None for example in examples]
    numbers: dict[str, int] = {}
    differences = []
    for example, same, one, other in zip(examples, is_same, first, second, strict=True):
        number = numbers[example.task] = numbers.get(example.task, -1) + 1
        if not same:
            differences.append(Difference(number, example, one, other))
    return Agreement(
        Rate(sum(is_same), len(is_same)),
        Rate(sum(same and media for same, media in zip(is_same, has_media, strict=True)), sum(has_media)),
        Rate(sum(split_reply(a) == split_reply(b) for a, b in zip(first, second, strict=True)), len(is_same)),
        tuple(differences),
    )
