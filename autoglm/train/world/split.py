"""The two halves of the generated world, and random generators that can never be shared between them."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


def rng_for(split: Split, *key: int | str) -> np.random.Generator:
    """A generator for `key` in `split`; equal arguments give equal streams on every machine.

    The first entropy word is the split itself, so no key of one split yields a stream of the other.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    digest = hashlib.sha256("\x1f".join(f"{type(part).__name__}:{part}" for part in key).encode()).digest()
    words = np.frombuffer(digest, dtype="<u4").tolist()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([SPLITS.index(split), *words])))
