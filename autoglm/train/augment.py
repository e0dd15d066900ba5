"""What training does to a spectrogram, so that ears do not hang on one voice: bins stretched, bands and moments hidden.

Sources: vocal tract length perturbation, Jaitly and Hinton 2013; SpecAugment, Park et al. 2019 (arXiv:1904.08779).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Mel = npt.NDArray[np.float32]
_STRETCH = 0.12  # vocal tracts up to an eighth longer or shorter than the voice's own
_STRETCHED_SHARE, _MASKED_SHARE = 0.6, 0.6
_MAX_BINS, _MAX_FRAMES = 12, 12
_FRAMES_A_MASK = 80  # one mask in time for every 0.8 s at most, so that words are damaged and not lost


def augment(mel: Mel, rng: np.random.Generator) -> Mel:
    """A normalized log-mel spectrogram f32 [frames, bins], changed more often than not; what is hidden is 0, its mean.

    The one given is not touched.
    """
    if rng.random() < _STRETCHED_SHARE:
        mel = stretch_bins(mel, 1 + rng.uniform(-_STRETCH, _STRETCH))
    if rng.random() < _MASKED_SHARE:
        mel = hide(mel, rng)
    return mel


def stretch_bins(mel: Mel, factor: float) -> Mel:
    """Bin b becomes what lay at b / factor, between two bins by their mix, above the last one the last."""
    bins = mel.shape[1]
    source = np.minimum(np.arange(bins) / factor, bins - 1)
    below = source.astype(np.int64)
    above = np.minimum(below + 1, bins - 1)
    share = (source - below).astype(np.float32)
    stretched: Mel = mel[:, below] * (1 - share) + mel[:, above] * share
    return stretched


def hide(mel: Mel, rng: np.random.Generator) -> Mel:
    """Two bands of up to 12 bins and, by length, some moments of up to 0.12 s set to 0."""
    frames, bins = mel.shape
    hidden: Mel = mel.copy()
    for _ in range(2):
        width = int(rng.integers(_MAX_BINS + 1))
        low = int(rng.integers(bins - width + 1))
        hidden[:, low : low + width] = 0
    for _ in range(frames // _FRAMES_A_MASK):
        width = int(rng.integers(_MAX_FRAMES + 1))
        start = int(rng.integers(frames - width + 1))
        hidden[start : start + width] = 0
    return hidden
