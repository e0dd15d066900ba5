"""Spectrograms changed for training: bins move to where they should, little is hidden, and the original stays."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from autoglm.train.augment import augment, hide, stretch_bins


def make_mel(frames: int = 200, bins: int = 80) -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((frames, bins)).astype(np.float32) + 9.0


@pytest.mark.parametrize("factor", [0.88, 1.0, 1.12])
def test_a_tone_moves_by_the_factor(factor: float) -> None:
    mel = np.zeros((4, 80), np.float32)
    mel[:, 49:52] = (0.5, 1.0, 0.5)
    found = stretch_bins(mel, factor)
    assert found.shape == mel.shape and found.dtype == np.float32
    assert (found.argmax(axis=1) == round(50 * factor)).all()
    np.testing.assert_allclose(found.sum(), mel.sum() * factor, rtol=0.1)


def test_above_the_last_bin_the_last_is_repeated() -> None:
    mel = np.arange(80, dtype=np.float32)[None]
    np.testing.assert_allclose(stretch_bins(mel, 1.1)[0], np.arange(80) / 1.1, atol=1e-4)
    assert (stretch_bins(mel, 0.9)[0, 72:] == 79).all()


@pytest.mark.parametrize("frames", [1, 20, 90, 400])
def test_hiding_sets_bands_and_moments_to_the_mean(frames: int) -> None:
    mel = make_mel(frames)
    for seed in range(40):
        found = hide(mel, np.random.default_rng(seed))
        bins, moments = (found == 0).all(axis=0), (found == 0).all(axis=1)
        assert bins.sum() <= 24 or moments.all()
        assert moments.sum() <= 12 * (frames // 80) or bins.all()
        rest = found[~moments][:, ~bins]
        np.testing.assert_array_equal(rest, mel[~moments][:, ~bins])
    assert (mel != 0).all(), "the original is not touched"


def test_equal_generators_change_alike_and_some_stay_as_they_are() -> None:
    mel = make_mel()
    changed = [augment(mel, np.random.default_rng(seed)) for seed in range(60)]
    again = [augment(mel, np.random.default_rng(seed)) for seed in range(60)]
    assert all(np.array_equal(one, other) for one, other in zip(changed, again, strict=True))
    assert 3 < sum(np.array_equal(one, mel) for one in changed) < 25
