"""OpenAI's media parts: the spellings that are taken, and a clear error for every other."""

from __future__ import annotations

from typing import Any

import pytest

from autoglm.errors import RequestError
from autoglm.media.content_parts import MediaPart, check_counts, media_part
from autoglm.media.limits import MediaLimits

PATH = "messages[2].content[1]"


@pytest.mark.parametrize(
    ("part", "kind", "url", "base64", "param"),
    [
        ({"type": "image_url", "image_url": {"url": "data:a"}}, "picture", "data:a", None, "image_url.url"),
        ({"type": "image_url", "image_url": "http://a/b"}, "picture", "http://a/b", None, "image_url.url"),
        (
            {"type": "image_url", "image_url": {"url": "data:a", "detail": "high"}, "cache_control": {}},
            "picture",
            "data:a",
            None,
            "image_url.url",
        ),
        ({"type": "audio_url", "audio_url": {"url": "data:a"}}, "sound", "data:a", None, "audio_url.url"),
        ({"type": "audio_url", "audio_url": "data:a"}, "sound", "data:a", None, "audio_url.url"),
        (
            {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}},
            "sound",
            None,
            "QUJD",
            "input_audio.data",
        ),
        ({"type": "input_audio", "input_audio": {"data": "Data:a"}}, "sound", "Data:a", None, "input_audio.data"),
    ],
)
def test_forms_that_are_taken(part: Any, kind: Any, url: str | None, base64: str | None, param: str) -> None:
    assert media_part(part, PATH) == MediaPart(kind, url, base64, f"{PATH}.{param}")


@pytest.mark.parametrize("part", [{"type": "text", "text": "a"}, {"type": "video_url"}, {}, {"type": 3}])
def test_other_parts_are_none_of_ours(part: Any) -> None:
    assert media_part(part, PATH) is None


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url"}, "image_url"),
        ({"type": "image_url", "image_url": 3}, "image_url"),
        ({"type": "image_url", "image_url": {}}, "image_url.url"),
        ({"type": "image_url", "image_url": {"url": 3}}, "image_url.url"),
        ({"type": "image_url", "image_url": ""}, "image_url.url"),
        ({"type": "image_url", "image_url": {"url": "data:a", "detail": "low"}}, "image_url.detail"),
        ({"type": "image_url", "image_url": {"url": "data:a", "max_pixels": 9}}, "image_url.max_pixels"),
        ({"type": "image_url", "image_url": {"url": "data:a"}, "min_pixels": 9}, "min_pixels"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "input_audio.data"),
        ({"type": "audio_url", "audio_url": {"url": "data:a", "format": "wav"}}, "audio_url.format"),
    ],
)
def test_a_wrong_field_is_named(part: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        media_part(part, PATH)
    assert caught.value.param == f"{PATH}.{param}"


def test_pictures_and_sounds_are_counted_apart() -> None:
    limits = MediaLimits(max_pictures=2, max_sounds=1)
    pictures = [MediaPart("picture", "data:a", None, f"picture {i}") for i in range(3)]
    sounds = [MediaPart("sound", "data:a", None, f"sound {i}") for i in range(2)]
    check_counts(pictures[:2] + sounds[:1], limits)
    for parts, param in ((pictures, "picture 2"), (sounds + pictures[:1], "sound 1")):
        with pytest.raises(RequestError, match="leave out those of earlier turns") as caught:
            check_counts(parts, limits)
        assert caught.value.param == param
    assert MediaLimits().max_pictures == 10
