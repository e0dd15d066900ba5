"""Salads: words of commands and names without an order, a finite number of them, in training alone."""

from __future__ import annotations

import numpy as np
import pytest

from autoglm.train.dataset import alphabet
from autoglm.train.tokenizer import load_tokenizer
from autoglm.train.world.labels import LANGUAGES, VISIBLE, Language
from autoglm.train.world.phrases import COMMANDS, phrasings
from autoglm.train.world.salads import NUM_SALADS, draw_salad, salad
from autoglm.train.world.split import rng_for
from autoglm.train.world.tasks import transcribe


@pytest.mark.parametrize("language", LANGUAGES)
def test_salads_are_words_of_commands_and_names(language: Language) -> None:
    salads = [salad(language, number) for number in range(400)]
    assert salads == [salad(language, number) for number in range(400)] and len(set(salads)) > 200
    names = {label.text(language) for label in VISIBLE}
    assert 20 < sum(one in names for one in salads) < 150, "some are a name alone"
    known, tokenizer = alphabet(), load_tokenizer()
    assert all(tokenizer.decode(tokenizer.encode(one)) == one for one in salads)
    assert all(character.lower() in known for one in salads for character in one)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_word_of_a_held_out_command_is_in_some_salad(language: Language) -> None:
    salads = [salad(language, number) for number in range(NUM_SALADS)]
    parts = {p for intent in COMMANDS for one in phrasings(language, intent, "test") for p in one.parts if p}
    words = {
        w for part in parts for piece in part.split("{x}") for w in (piece.split() if language == "en" else [piece])
    }
    for word in words - {""}:
        assert any(word in (one.split() if language == "en" else one) for one in salads), word


@pytest.mark.parametrize("language", LANGUAGES)
def test_only_training_hears_them(language: Language) -> None:
    salads = {salad(language, number) for number in range(NUM_SALADS)}

    def share(split: str) -> float:
        rng = rng_for("train", "transcribe", language)
        drawn = [transcribe(rng, split, language).spoken for _ in range(120)]  # type: ignore[arg-type]
        return sum(one in salads for one in drawn) / len(drawn)

    assert 0.35 < share("train") < 0.75 and share("test") < 0.1


def test_drawing_reaches_all_of_them() -> None:
    rng = np.random.default_rng(1)
    assert len({draw_salad(rng, "en") for _ in range(400)}) > 150
