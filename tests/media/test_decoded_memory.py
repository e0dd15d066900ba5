"""Decoded media are counted from before they are decoded until nobody holds them, and refused where they do not fit."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from autoglm.errors import CapacityError, RequestError
from autoglm.media.content_parts import MediaPart
from autoglm.media.decoded_memory import DEFAULT_BYTES, DecodedMemory
from autoglm.media.limits import MediaLimits
from autoglm.media.pixel_budget import PixelBudget
from autoglm.media.sources import MediaSources
from autoglm.server.media import MediaDoor, decode
from autoglm.server.schemas import ChatRequest
from tests.hostile.media_bodies import flat_png
from tests.media.parts import sound_file

REQUEST = ChatRequest(messages=[{"role": "user", "content": "x"}])  # type: ignore[list-item]
PICTURE, SOUND = (MediaPart(kind, None, "", "field") for kind in ("picture", "sound"))


def test_arrays_count_while_they_live() -> None:
    memory = DecodedMemory(1000)
    with memory.reserve(900) as keep:
        array = np.zeros(300, np.uint8)
        keep(array)
        assert memory.num_bytes == 900
        with pytest.raises(CapacityError, match="try again in a moment"), memory.reserve(200):
            pytest.fail("it does not fit")
    assert memory.num_bytes == 300
    view = array[:10]
    del array
    gc.collect()
    assert memory.num_bytes == 300, "a view holds the whole"
    del view
    gc.collect()
    assert memory.num_bytes == 0


def door(max_bytes: int, **limits: int) -> MediaDoor:
    """A door whose model takes any picture."""
    model = SimpleNamespace(picture_size=lambda w, h: None, pixel_budget=lambda default: PixelBudget(1, 99, 99))
    checked = MediaLimits(**limits)  # type: ignore[arg-type]
    return MediaDoor(cast(Any, model), MediaSources(checked), checked, memory=DecodedMemory(max_bytes))


def test_requests_hold_what_they_decoded_and_nothing_more() -> None:
    holder = door(3_860_000)
    png, wav = flat_png(100, 50), sound_file(np.zeros(1600, np.float32))
    media = decode(holder, [PICTURE, SOUND], [png, wav], REQUEST)
    assert holder.memory.num_bytes == 100 * 50 * 3 + 1600 * 4
    with pytest.raises(CapacityError) as refused:
        decode(holder, [SOUND], [wav], REQUEST)  # might have 60 s, of which nothing is known before
    assert refused.value.status == 429
    del media
    gc.collect()
    assert holder.memory.num_bytes == 0
    with pytest.raises(RequestError):
        decode(holder, [PICTURE, PICTURE], [png, png[:60] + png[80:]], REQUEST)
    gc.collect()
    assert holder.memory.num_bytes == 0


def test_all_pictures_together_have_a_limit_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = door(DEFAULT_BYTES, max_total_pixels=10_000)
    png = flat_png(100, 50)
    assert len(decode(limited, [PICTURE] * 2, [png] * 2, REQUEST).pictures) == 2
    monkeypatch.setattr("autoglm.server.media.decode_checked", lambda *a, **o: pytest.fail("decoded"))
    with pytest.raises(RequestError, match="more than 10000 pixels") as refused:
        decode(limited, [PICTURE] * 3, [png] * 3, REQUEST)
    assert refused.value.code == "image_too_large"


def test_the_largest_request_fits_the_default() -> None:
    limits = MediaLimits()
    assert 2 * (3 * limits.max_total_pixels + limits.max_sounds * 4 * 16_000 * limits.max_sound_s) < DEFAULT_BYTES
