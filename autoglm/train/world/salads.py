"""Words of commands and names in no order: to write these down, ears have to hear and cannot guess.

Of commands alone a decoder learns which words follow which, and writes that ("I want to write Files") where another
sentence of the same words was said ("I want to type Files"). There are NUM_SALADS a language, so that each is
synthesized once.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from autoglm.train.world.labels import VISIBLE, Language
from autoglm.train.world.phrases import COMMANDS, phrasings
from autoglm.train.world.split import rng_for

NUM_SALADS = 3000
_MAX_PIECES = 4


@cache
def _pieces(language: Language) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What commands are made of beside names (English by words, Chinese by parts), and the names."""
    found: set[str] = set()
    for intent in COMMANDS:
        for one in phrasings(language, intent, "train"):
            parts = [piece for part in one.parts for piece in part.split("{x}")]
            found.update(word for part in parts for word in (part.split() if language == "en" else [part]) if word)
    return tuple(sorted(found)), tuple(label.text(language) for label in VISIBLE)


@cache
def salad(language: Language, number: int) -> str:
    """Salad `number` of a language, 0 to NUM_SALADS - 1: one to four pieces, half of them names."""
    rng = rng_for("train", "salad", language, number)
    count = 1 + int(rng.integers(_MAX_PIECES))
    pools = (_pieces(language)[int(rng.integers(2))] for _ in range(count))
    return ("" if language == "zh" else " ").join(pool[int(rng.integers(len(pool)))] for pool in pools)


def draw_salad(rng: np.random.Generator, language: Language) -> str:
    """One of a language's salads, each as likely."""
    return salad(language, int(rng.integers(NUM_SALADS)))
