"""A stand-in for the speech engines, which a test machine need not have."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from autoglm.train import dataset
from autoglm.train.world.labels import Language
from autoglm.train.world.split import Split


def hummed(text: str, language: Language, split: Split, rng: np.random.Generator) -> NDArray[np.float32]:
    """A stand-in for a speech engine: a tone a letter, in a drawn pitch."""
    pitch = rng.uniform(100, 200)
    tones = [np.sin(np.arange(800) * (pitch + ord(letter) % 97 * 10) * 2 * np.pi / 16000) for letter in text]
    return np.concatenate(tones).astype(np.float32)


@pytest.fixture
def hum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "say", hummed)
