"""5,000 mutated pictures and sounds: each is decoded or refused with a 400, nothing crashes, memory stays in bounds."""

from __future__ import annotations

import resource
import sys
from collections import Counter

import numpy as np
import pytest

from autoglm.errors import RequestError
from autoglm.media.limits import MediaLimits
from autoglm.media.pictures import decode_picture
from autoglm.media.sounds import decode_sound
from tests.media.mutations import mutated, picture_seeds, sound_seeds

NUM_PICTURES = 3_000
NUM_SOUNDS = 2_000
# Small, so that a header that lies inside the limits is cheap too.
LIMITS = MediaLimits(max_picture_pixels=1 << 18, max_sound_s=2.0)
MEMORY_BYTES = 48 << 20


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Pillow says so of some broken files it reads all the same.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_mutated_pictures_are_decoded_or_refused() -> None:
    seeds = picture_seeds()
    for seed in seeds:
        decode_picture(seed, limits=LIMITS, param="image")
    outcomes: Counter[str] = Counter()
    before_bytes = peak_bytes()
    for data in mutated(seeds, NUM_PICTURES):
        try:
            picture = decode_picture(data, limits=LIMITS, param="image")
            assert picture.rgb.dtype == np.uint8 and 0 < picture.rgb.size <= 3 * LIMITS.max_picture_pixels
            outcomes["decoded"] += 1
        except RequestError as error:
            assert error.status == 400 and len(str(error)) < 300
            outcomes["refused"] += 1
    assert sum(outcomes.values()) == NUM_PICTURES
    # Both ways must have been gone often, or the mutations are too weak or too strong to show anything.
    assert min(outcomes["decoded"], outcomes["refused"]) > NUM_PICTURES // 20, outcomes
    assert peak_bytes() - before_bytes < MEMORY_BYTES


def test_mutated_sounds_are_decoded_or_refused() -> None:
    seeds = sound_seeds()
    for seed in seeds:
        decode_sound(seed, limits=LIMITS, param="audio")
    outcomes: Counter[str] = Counter()
    before_bytes = peak_bytes()
    for data in mutated(seeds, NUM_SOUNDS):
        try:
            sound = decode_sound(data, limits=LIMITS, param="audio")
            assert np.isfinite(sound.samples).all() and 0 < sound.samples.size <= 2 * 16_000
            outcomes["decoded"] += 1
        except RequestError as error:
            assert error.status == 400 and len(str(error)) < 300
            outcomes["refused"] += 1
    assert sum(outcomes.values()) == NUM_SOUNDS
    assert min(outcomes["decoded"], outcomes["refused"]) > NUM_SOUNDS // 20, outcomes
    assert peak_bytes() - before_bytes < MEMORY_BYTES
