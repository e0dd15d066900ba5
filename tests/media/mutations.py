"""Small real files of every format, and endless damaged ones made from them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.media.parts import sound_file
from tests.media.picture_files import encoded, exif, noise


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
    return [
        sound_file(samples, name, 16_000 if name == "mp3" else 8_000, **options)
        for name, options in (
            ("wav", {}),
            ("wav", {"subtype": "FLOAT"}),
            ("wav", {"subtype": "MS_ADPCM"}),
            ("flac", {}),
            ("ogg", {}),
            ("ogg", {"subtype": "OPUS"}),
            ("mp3", {}),
        )
    ]


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
