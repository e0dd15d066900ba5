"""Where bytes come from: base64 checked before it is decoded, files only under the folder, nothing else by default."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest

from autoglm.errors import ConfigError, RequestError
from autoglm.media.content_parts import MediaPart
from autoglm.media.limits import MediaLimits
from autoglm.media.sources import MediaSources

CONTENT = bytes(range(256))
ENCODED = base64.b64encode(CONTENT).decode()


def picture(url: str) -> MediaPart:
    return MediaPart("picture", url, None, "field")


async def refusal(sources: MediaSources, *parts: MediaPart) -> str:
    with pytest.raises(RequestError) as caught:
        await sources.read(parts)
    assert caught.value.param == "field"
    return str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{ENCODED}",
        f"data:;base64,{ENCODED}",
        f"DATA:image/png;charset=x;BASE64,{ENCODED}",
        "data:audio/wav;base64," + "\r\n".join(ENCODED[i : i + 76] for i in range(0, len(ENCODED), 76)),
    ],
)
async def test_data_uris_are_read(url: str) -> None:
    assert await MediaSources(MediaLimits()).read([picture(url)]) == [CONTENT]


async def test_base64_of_input_audio_is_read_in_order() -> None:
    parts = [MediaPart("sound", None, ENCODED, "field"), picture("data:;base64,QUJD")]
    assert await MediaSources(MediaLimits()).read(parts) == [CONTENT, b"ABC"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png,abc", "must have the form"),
        ("data:image/png;base64", "must have the form"),
        ("data:" + "x" * 300 + ";base64,QUJD", "must have the form"),
        ("data:;base64,", "no bytes"),
        ("data:;base64,QUJ", "not base64"),
        ("data:;base64,QU-_", "not base64"),
        ("data:;base64,QUJDé", "not base64"),
        ("http://example.com/a.png", "--allow-remote-media"),
        ("HTTPS://example.com/a.png", "--allow-remote-media"),
        ("file:///etc/passwd", "--media-path"),
        ("FILE:/etc/passwd", "--media-path"),
        ("/etc/passwd", "must be a data: URI"),
        ("ftp://example.com/a.png", "must be a data: URI"),
        (" file:///etc/passwd", "must be a data: URI"),
        ("blob:abc", "must be a data: URI"),
        ("", "must be a data: URI"),
    ],
)
async def test_by_default_base64_and_nothing_else(url: str, words: str) -> None:
    text = await refusal(MediaSources(MediaLimits()), picture(url))
    assert words in text
    assert "passwd" not in text and "example" not in text


async def test_sizes_are_checked_to_the_byte_and_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = MediaLimits(max_picture_bytes=256, max_sound_bytes=255)
    assert await MediaSources(exact).read([picture(f"data:;base64,{ENCODED}")]) == [CONTENT]
    monkeypatch.setattr(base64, "b64decode", lambda *args, **options: pytest.fail("decoded"))
    assert "larger than 255" in await refusal(MediaSources(exact), MediaPart("sound", None, ENCODED, "field"))
    assert "larger than 256" in await refusal(MediaSources(exact), picture("data:;base64," + "A" * 5_000))


async def test_all_files_together_have_a_limit_too() -> None:
    sources = MediaSources(MediaLimits(max_total_bytes=600))
    part = picture(f"data:;base64,{ENCODED}")
    assert len(await sources.read([part, part])) == 2
    assert "all media together are larger than 600" in await refusal(sources, part, part, part)


async def test_too_many_are_refused_before_any_is_read() -> None:
    assert "at most 10" in await refusal(MediaSources(MediaLimits()), *[picture("data:,")] * 11)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A media folder with a file, one in a folder, a pipe, and links in and out; a secret beside it."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "media-2").mkdir()
    (tmp_path / "media-2" / "a.png").write_bytes(b"secret")
    media = tmp_path / "media"
    (media / "deep").mkdir(parents=True)
    (media / "a b.png").write_bytes(CONTENT)
    (media / "deep" / "c.png").write_bytes(CONTENT)
    (media / "in.png").symlink_to(media / "deep" / "c.png")
    (media / "out.png").symlink_to(tmp_path / "secret.png")
    (media / "out").symlink_to(tmp_path)
    os.mkfifo(media / "pipe.png")
    return media


@pytest.mark.parametrize("url", ["file://{0}/a%20b.png", "file:{0}/deep/c.png", "file://localhost{0}/deep/../in.png"])
async def test_files_under_the_folder_are_read(folder: Path, url: str) -> None:
    assert await MediaSources(MediaLimits(), folder=folder).read([picture(url.format(folder))]) == [CONTENT]


@pytest.mark.parametrize(
    "url",
    [
        "file://{0}/../secret.png",
        "file://{0}/%2e%2e/secret.png",
        "file://{0}/out.png",
        "file://{0}/out/secret.png",
        "file://{0}-2/a.png",
        "file://{0}",
        "file://{0}/deep",
        "file://{0}/pipe.png",
        "file://{0}/missing.png",
        "file://{0}/a%00b.png",
        "file://{0}/%ff.png",
        "file://{0}/deep/c.png?x=1",
        "file://{0}/deep/c.png#x",
        "file://example.com{0}/deep/c.png",
        "file:deep/c.png",
        "file:///etc/passwd",
        "file:////etc/passwd",
        "file://[::1]{0}/deep/c.png",
        "file:///dev/zero",
        "file:///proc/self/environ",
    ],
)
async def test_every_way_out_of_the_folder_is_refused_alike(folder: Path, url: str) -> None:
    text = await refusal(MediaSources(MediaLimits(), folder=folder), picture(url.format(folder)))
    assert text == "field: names no readable file under the server's --media-path"


async def test_a_file_over_its_limit_is_not_read(folder: Path) -> None:
    sources = MediaSources(MediaLimits(max_picture_bytes=255), folder=folder)
    assert "larger than 255" in await refusal(sources, picture(f"file://{folder}/deep/c.png"))


async def test_a_folder_reached_by_a_link_is_that_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    sources = MediaSources(MediaLimits(), folder=tmp_path / "link")
    assert await sources.read([picture(f"file://{tmp_path}/link/deep/c.png")]) == [CONTENT]


@pytest.mark.parametrize("name", ["missing", "media/a b.png"])
def test_a_media_path_that_is_no_folder_is_a_wrong_setting(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--media-path"):
        MediaSources(MediaLimits(), folder=folder.parent / name)


async def test_remote_addresses_go_to_the_fetcher_with_their_limit(folder: Path) -> None:
    class Remote:
        async def fetch(self, *args: Any, **options: Any) -> bytes:
            assert args == ("https://example.com/a",) and options == {"max_bytes": 99, "param": "field"}
            return b"far"

    sources = MediaSources(MediaLimits(max_picture_bytes=99), remote=Remote())  # type: ignore[arg-type]
    assert await sources.read([picture("https://example.com/a")]) == [b"far"]
