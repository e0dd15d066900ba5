"""Media of a request against what the server has for them: memory for decoding and encoding, ears, places."""

from __future__ import annotations

import base64
import gc
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from autoglm.engine.fit import MediaMemory
from autoglm.errors import CapacityError, RequestError
from autoglm.formats.gguf import GGUFFile
from autoglm.kernels import Runtime
from autoglm.media.limits import MediaLimits
from autoglm.media.pictures import DECODING_BYTES_PER_PIXEL, Picture, decode_picture
from autoglm.media.recently_used import RecentlyUsed
from autoglm.media.room import MediaRoom
from autoglm.media.sources import MediaSources
from autoglm.model.encoder_memory import picture_bytes
from autoglm.model.loader import read_model_config
from autoglm.model.multimodal import Multimodal
from autoglm.model.projector import MediaTokens
from autoglm.server import media as media_module
from autoglm.server.body import validate
from autoglm.server.media import MediaDoor, RequestMedia, check_kinds, check_settings, decode, find_parts
from autoglm.server.schemas import ChatRequest

FIXTURE = Path(__file__).parent.parent / "fixtures" / "glm4v-tiny"
PIXELS = 300 * 200
MMPROJ = GGUFFile.open(FIXTURE / "mmproj-q8_0.gguf")


@pytest.fixture(scope="module")
def eyes() -> Multimodal:
    backbone = read_model_config(GGUFFile.open(FIXTURE / "main-f32.gguf"))
    tokens = MediaTokens(7, None, frozenset({5}), 5, frozenset())
    return Multimodal(MMPROJ, Runtime(1), backbone, tokens, lambda ids: np.zeros((len(ids), 64), np.float32))


def door(eyes: Multimodal, max_bytes: int = 1 << 30, **options: Any) -> MediaDoor:
    return MediaDoor(eyes, MediaSources(MediaLimits()), room=MediaRoom(max_bytes), **options)


def png(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (300, 200), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def request(count: int = 1, kind: str = "image_url", **fields: Any) -> ChatRequest:
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    parts = [{"type": kind, kind: {"url": url}} for _ in range(count)]
    return validate(ChatRequest, {"messages": [{"role": "user", "content": parts}], **fields})


def read(door: MediaDoor, body: ChatRequest, files: list[bytes] | None = None, first_shade: int = 0) -> RequestMedia:
    parts = find_parts(body.messages)
    check_settings(door, parts, body)
    check_kinds(door, parts)
    return decode(door, parts, files or [png(first_shade + i) for i in range(len(parts))], body)


def test_decoded_pictures_are_counted_until_nobody_holds_them(eyes: Multimodal) -> None:
    server = door(eyes)
    media, again = read(server, request(2)), read(server, request(1), first_shade=2)
    assert server.room.used_bytes == 3 * 3 * PIXELS
    kept = media.pictures[0]
    del media, again
    assert server.room.used_bytes == 3 * 3 * PIXELS, "for the next turn"
    server.recent.clear()
    assert server.room.used_bytes == 3 * PIXELS
    del kept
    assert server.room.used_bytes == 0


def test_what_a_chat_sends_again_is_not_decoded_again(eyes: Multimodal, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []

    def spied(data: bytes, **options: Any) -> Picture:
        decoded.append(data)
        return decode_picture(data, **options)

    monkeypatch.setattr(media_module, "decode_picture", spied)
    server = door(eyes)
    first, second = read(server, request(2)), read(server, request(3))
    assert decoded == [png(0), png(1), png(2)]
    assert second.pictures[:2] == first.pictures
    np.testing.assert_array_equal(second.pictures[2].rgb[0, 0], (2, 0, 0))
    assert server.room.used_bytes == 3 * 3 * PIXELS
    small = door(eyes, recent=RecentlyUsed(3 * PIXELS))  # the last alone
    read(small, request(2))
    read(small, request(2))
    assert decoded[3:] == [png(0), png(1), png(0)]


def test_what_was_decoded_last_makes_room(eyes: Multimodal) -> None:
    server = door(eyes, (DECODING_BYTES_PER_PIXEL + 3) * PIXELS)
    read(server, request(2))
    assert server.room.used_bytes == 2 * 3 * PIXELS
    assert len(read(server, request(2), first_shade=2).pictures) == 2
    assert server.room.used_bytes == 2 * 3 * PIXELS
    with pytest.raises(RequestError, match="send smaller ones"):
        read(server, request(3), first_shade=2)


def test_pictures_over_the_servers_memory_are_a_400_with_the_numbers(eyes: Multimodal) -> None:
    needed = (DECODING_BYTES_PER_PIXEL + 3) * PIXELS
    server = door(eyes, needed)
    read(server, request(2))
    with pytest.raises(RequestError, match=r"takes 1\.9 MB, and this server has 1\.7 MB .* send smaller ones"):
        read(server, request(3))
    assert server.room.used_bytes == 0


def test_pictures_that_others_leave_no_room_for_are_a_429(eyes: Multimodal) -> None:
    server = door(eyes, (DECODING_BYTES_PER_PIXEL + 3) * PIXELS)
    media = read(server, request(2))
    with pytest.raises(CapacityError, match=r"hold 0\.4 MB of 1\.7 MB, and this request needs 1\.7 MB") as caught:
        read(server, request(2), first_shade=2)
    assert caught.value.status == 429
    del media
    read(server, request(2), first_shade=2)


def test_a_damaged_picture_gives_its_room_back(eyes: Multimodal) -> None:
    server = door(eyes)
    with pytest.raises(RequestError, match="cannot be decoded"):
        read(server, request(2), [png(), png()[: len(png()) // 2]])
    gc.collect()
    server.recent.clear()  # the whole one before it
    assert server.room.used_bytes == 0


def test_max_pixels_over_the_servers_memory_is_a_400_with_the_numbers(eyes: Multimodal) -> None:
    memory = MediaMemory(12_544, 100_000, lambda pixels: picture_bytes(MMPROJ, pixels), 0, 1 << 20, 1 << 20)
    server = door(eyes, max_pixels=100_000, most_pixels=400_000, memory=memory)
    assert read(server, request()).max_pixels == 100_000
    assert read(server, request(max_pixels=400_000)).max_pixels == 400_000
    with pytest.raises(RequestError, match=r"take [\d.]+ MB to encode, and this server has [\d.]+ .* at most 400000"):
        read(server, request(max_pixels=400_001))
    with pytest.raises(RequestError, match="must lie between 12544 and 11760000"):
        read(server, request(max_pixels=20_000_000))


def test_a_sound_to_a_model_without_ears_is_a_400(eyes: Multimodal) -> None:
    with pytest.raises(RequestError, match="has no ears, its mmproj holds no audio encoder; send the words as text"):
        read(door(eyes), request(kind="audio_url"))


def test_fusion_of_a_model_that_fuses_nothing_is_a_400(eyes: Multimodal) -> None:
    with pytest.raises(RequestError, match="return_fusion: has no effect, projector type glm4v .* fuses no modalities"):
        read(door(eyes), request(return_fusion=True))
    read(door(eyes), request(return_fusion=False))


@pytest.mark.parametrize("fields", [{"return_fusion": "gates"}, {"max_pixels": 50_000}])
def test_settings_for_media_without_an_mmproj_are_a_400(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="has no effect, this model was loaded without an mmproj"):
        check_settings(None, [], request(**fields))
