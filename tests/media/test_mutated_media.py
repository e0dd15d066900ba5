"""5,000 mutated pictures and sounds: each is decoded or refused with a 400, nothing crashes, memory stays in bounds."""

from __future__ import annotations

import io
import resource
import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import soundfile

from autoglm.errors import RequestError
from autoglm.media.limits import MediaLimits
from autoglm.media.pictures import decode_picture
from autoglm.media.sounds import decode_sound
from tests.media.picture_files import encoded, exif, noise

NUM_PICTURES = 3_000
NUM_SOUNDS = 2_000
# Small, so that a header that lies inside the limits is cheap too.
LIMITS = MediaLimits(max_picture_pixels=1 << 18, max_sound_s=2.0)
MEMORY_BYTES = 48 << 20


def picture_seeds() -> list[bytes]:
    image, second = noise(24, 18), noise(24, 18, seed=1)
    return [
        encoded(image, "PNG", exif=exif(6)),
        encoded(image.quantize(16), "PNG", transparency=3),
        encoded(image, "JPEG", exif=b"Exif\0\0" + exif(8)),
        encoded(image, "JPEG", progressive=True, comment=b"words"),
        encoded(image, "WEBP"),
        encoded(noise(24, 18, 4), "WEBP", lossless=True, exif=exif(3)),
        encoded(image, "WEBP", save_all=True, append_images=[second]),
        encoded(image.quantize(16), "GIF", save_all=True, append_images=[second.quantize(16)], comment=b"words"),
    ]


def sound_seeds() -> list[bytes]:
    samples = (np.random.default_rng(0).standard_normal(1200) * 0.1).astype(np.float32)
    seeds = []
    for format, subtype in (
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("WAV", "MS_ADPCM"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", None),
    ):
        file = io.BytesIO()
        soundfile.write(file, samples, 8_000 if format != "MP3" else 16_000, format=format, subtype=subtype)
        seeds.append(file.getvalue())
    return seeds


def mutated(seeds: list[bytes], count: int) -> Iterator[bytes]:
    """Flipped bits, extreme bytes and numbers, cut ends, holes, repeats, and one file's start before another's rest."""
    rng = np.random.default_rng(20260)
    for i in range(count):
        data = bytearray(seeds[i % len(seeds)])
        for _ in range(int(rng.integers(1, 4))):
            # Most of what a decoder trusts stands at the start.
            at = int(rng.integers(0, len(data) if rng.random() < 0.5 else min(len(data), 64)))
            match int(rng.integers(0, 8)):
                case 0 | 1:
                    data[at] ^= 1 << int(rng.integers(0, 8))
                case 2:
                    data[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
                case 3:
                    data[at : at + 4] = int(rng.choice([0, 1, 255, 65_535, 1 << 31, (1 << 32) - 1])).to_bytes(
                        4, "big" if rng.random() < 0.5 else "little"
                    )
                case 4:
                    del data[max(at, 4) :]
                case 5:
                    del data[at : at + int(rng.integers(1, 40))]
                case 6:
                    data[at:at] = data[at : at + int(rng.integers(1, 400))]
                case _:
                    data[max(at, 12) :] = seeds[int(rng.integers(0, len(seeds)))][max(at, 12) :]
            if len(data) < 8:
                break
        yield bytes(data)


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
