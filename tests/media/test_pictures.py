"""Pictures decode to what transformers' load_image gives, and what is not a sound picture is refused at low cost."""

from __future__ import annotations

import io
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from autoglm.errors import ConfigError, RequestError
from autoglm.media.limits import MediaLimits
from autoglm.media.picture_header import MAX_PIECES, read_picture_header
from autoglm.media.pictures import Picture, decode_picture
from tests.media.picture_files import encoded, exif, jpeg_segment, noise, png, png_chunk

LIMITS = MediaLimits()


def decode(data: bytes, limits: MediaLimits = LIMITS) -> Picture:
    return decode_picture(data, limits=limits, param="messages[0].content[1]")


def refusal(data: bytes, limits: MediaLimits = LIMITS) -> str:
    with pytest.raises(RequestError) as caught:
        decode(data, limits)
    assert caught.value.param == "messages[0].content[1]"
    return str(caught.value)


def palette(transparency: int | bytes | None = None) -> Image.Image:
    image = noise(20, 12).quantize(16)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def jpeg_with_exif(table: bytes) -> bytes:
    plain = encoded(noise(24, 16), "JPEG")
    return plain[:2] + jpeg_segment(0xE1, b"Exif\0\0" + table) + plain[2:]


FILES = {
    "png rgb": encoded(noise(21, 13), "PNG"),
    "png rgba": encoded(noise(21, 13, 4), "PNG"),
    "png grey": encoded(noise(21, 13, 1), "PNG"),
    "png grey and alpha": encoded(noise(21, 13, 4).convert("LA"), "PNG"),
    "png one bit": encoded(noise(21, 13, 1).convert("1"), "PNG"),
    "png 16 bit": encoded(Image.fromarray(np.arange(0, 65536, 237, dtype=np.uint16)[:260].reshape(13, 20)), "PNG"),
    "png palette": encoded(palette(), "PNG"),
    "png palette, transparent colour": encoded(palette(3), "PNG"),
    "png palette, alpha table": encoded(palette(bytes(range(0, 160, 10))), "PNG", transparency=bytes(range(16))),
    "png animated": encoded(noise(20, 12), "PNG", save_all=True, append_images=[noise(20, 12, seed=1)]),
    "png text and profile": encoded(noise(9, 9), "PNG", icc_profile=bytes(200)),
    "jpeg": encoded(noise(33, 17), "JPEG"),
    "jpeg progressive": encoded(noise(33, 17), "JPEG", progressive=True, quality=95, subsampling=0),
    "jpeg grey": encoded(noise(33, 17, 1), "JPEG"),
    "jpeg cmyk": encoded(noise(33, 17, 4).convert("CMYK"), "JPEG"),
    "jpeg with comment and profile": encoded(noise(9, 9), "JPEG", comment=b"hello", icc_profile=bytes(70_000)),
    "jpeg of two pictures": encoded(noise(16, 16), "MPO", save_all=True, append_images=[noise(16, 16, seed=1)]),
    "jpeg with a video behind": encoded(noise(9, 9), "JPEG") + b"\0\0\0\x18ftypmp42\xff\xda\xff\xd9" * 9,
    "webp": encoded(noise(33, 17), "WEBP"),
    "webp lossless": encoded(noise(33, 17), "WEBP", lossless=True),
    "webp rgba": encoded(noise(33, 17, 4), "WEBP", lossless=True),
    "webp animated": encoded(noise(20, 12), "WEBP", save_all=True, append_images=[noise(20, 12, seed=1)]),
    "gif": encoded(palette(), "GIF"),
    "gif transparent": encoded(palette(), "GIF", transparency=2, comment=b"x" * 900),
    "gif animated": encoded(palette(), "GIF", save_all=True, append_images=[noise(20, 12, seed=1)], loop=0),
    "gif interlaced": encoded(palette(), "GIF", interlace=1),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")  # load_image's own
@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_load_image(name: str) -> None:
    load_image = pytest.importorskip("transformers.image_utils").load_image
    with Image.open(io.BytesIO(FILES[name])) as image:
        expected = np.asarray(load_image(image))
    picture = decode(FILES[name])
    np.testing.assert_array_equal(picture.rgb, expected)
    assert (picture.width, picture.height) == expected.shape[1::-1]
    assert picture.format == name.split()[0].upper()
    assert picture.rgb.dtype == np.uint8 and not picture.rgb.flags.writeable


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_exif_turns_the_picture_as_load_image_does(form: str, orientation: int) -> None:
    load_image = pytest.importorskip("transformers.image_utils").load_image
    table = exif(orientation, ">" if orientation % 2 else "<", 4 if orientation == 6 else 3, num_tags=3)
    if form == "jpeg":
        data = jpeg_with_exif(table)
    elif form == "png":
        plain = encoded(noise(24, 16), "PNG")
        data = plain[:-12] + png_chunk(b"eXIf", table) + plain[-12:]
    else:
        data = encoded(noise(24, 16), "WEBP", lossless=True, exif=table)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(load_image(image))
    np.testing.assert_array_equal(decode(data).rgb, expected)
    assert expected.shape[:2] == ((24, 16) if 5 <= orientation <= 8 else (16, 24))


@pytest.mark.parametrize(
    "table", [b"", b"II*\0", exif(6)[:14], b"MM\0*" + bytes(4), b"II*\0\xff\xff\xff\xff", b"x" * 40]
)
def test_a_broken_exif_table_turns_nothing(table: bytes) -> None:
    assert decode(jpeg_with_exif(table)).rgb.shape == (16, 24, 3)


def test_content_hash_is_of_pixels_and_size() -> None:
    image = noise(20, 12)
    first = decode(encoded(image, "PNG"))
    assert decode(encoded(image, "WEBP", lossless=True)).content_hash == first.content_hash
    assert decode(encoded(noise(20, 12, seed=1), "PNG")).content_hash != first.content_hash
    turned = Image.fromarray(np.asarray(image).reshape(20, 12, 3))
    assert decode(encoded(turned, "PNG")).content_hash != first.content_hash


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"BM" + bytes(60), "BMP"),
        (b"II*\0" + bytes(60), "TIFF"),
        (b"<svg xmlns=''/>", "SVG"),
        (b"\0\0\0\x18ftypheic" + bytes(60), "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF", "unknown format"),
        (b"hello", "unknown format"),
    ],
)
def test_other_formats_are_named_with_those_that_work(data: bytes, words: str) -> None:
    text = refusal(data)
    assert words in text and "PNG, JPEG, WebP or GIF" in text


@pytest.mark.parametrize("name", ["png rgb", "jpeg", "jpeg progressive", "webp", "webp lossless", "gif"])
def test_a_file_cut_short_is_refused(name: str) -> None:
    data = FILES[name]
    for keep in (0.05, 0.3, 0.6, 0.8):
        assert "damaged" in refusal(data[: int(len(data) * keep)] or b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    "data",
    [
        png(0, 10),
        png(8, 8, pixels=b"\0" * 10),
        png_chunk(b"IHDR", bytes(13)),
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"gAMA", bytes(4)) + encoded(noise(5, 5), "PNG")[8:],
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8" + jpeg_segment(0xC0, b"\x08\0\x08\0\x08\x01\x01\x11\0") * 2 + FILES["jpeg"][2:],
        b"GIF89a\x05\0\x05\0\0\0\0;",
        b"RIFF\x20\0\0\0WEBPVP9 " + bytes(30),
        FILES["webp"][:26] + b"\x40\x40\x40\x40" + FILES["webp"][30:],
    ],
)
def test_lying_headers_are_refused(data: bytes) -> None:
    assert refusal(data)


BOMBS = {
    "png of 3.6 gigapixels": png(60_000, 60_000),
    "png of 16 terapixels": png(4_000_000, 4_000_000),
    "jpeg of 4 gigapixels": FILES["jpeg"].replace(b"\0\x11\0\x21", b"\xff\xff\xff\xff"),
    "gif of 4 gigapixels": FILES["gif"][:6] + b"\xff\xff\xff\xff" + FILES["gif"][10:],
    "gif frame larger than its screen": FILES["gif"].replace(
        b",\0\0\0\0\x14\0\x0c\0", b",\xff\xff\xff\xff\xff\xff\xff\xff"
    ),
    "webp of 268 megapixels": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2,
    "webp lossless of 268 megapixels": b"RIFF\x16\0\0\0WEBPVP8L\x0a\0\0\0\x2f\xff\xff\xff\x0f" + bytes(9),
    "png in a million pieces": png(8, 8, png_chunk(b"tEXt", b"") * (LIMITS.max_picture_bytes // 12 - 50)),
    "jpeg in a million pieces": b"\xff\xd8\xff" + b"\xfe\0\x02\xff" * (LIMITS.max_picture_bytes // 4 - 50) + b"\xda",
    "jpeg of padding": b"\xff\xd8" + b"\xff" * (LIMITS.max_picture_bytes - 9) + b"\0\xff\xd9",
    "gif in a million pieces": FILES["gif"][:13] + b"!\xfe" + b"\x01x" * (LIMITS.max_picture_bytes // 2 - 60) + b"\0;",
    "jpeg of ten thousand scans": b"\xff\xd8"
    + jpeg_segment(0xC2, b"\x08\x10\0\x10\0\x01\x01\x11\0")
    + jpeg_segment(0xDA, b"\x01\x01\0\0\0\0") * 10_000
    + b"\xff\xd9",
    "one byte too many": bytes(LIMITS.max_picture_bytes + 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_milliseconds(name: str) -> None:
    data = BOMBS[name]
    started_s = time.process_time()
    refusal(data)
    took_s = time.process_time() - started_s
    tracemalloc.start()
    refusal(data)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took_s < 0.1, f"{name} took {took_s:.3f} s of processor time"
    assert peak_bytes < len(data) + (4 << 20), f"{name} held {peak_bytes} bytes"


@pytest.mark.parametrize("chunk", [b"zTXt", b"iTXt", b"iCCP"])
def test_png_text_bombs_are_not_unpacked(chunk: bytes) -> None:
    """Sixteen chunks of 1 MB of zeros: Pillow would unpack them, here they are left out and the picture is read."""
    zeros = zlib.compress(bytes(1 << 20))
    body = b"x\0\x01\0\0\0" + zeros if chunk == b"iTXt" else b"x\0\0" + zeros
    data = png(4, 4, *[png_chunk(chunk, body)] * 16, pixels=bytes(4 * 13))
    tracemalloc.start()
    assert decode(data).rgb.shape == (4, 4, 3)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_an_exif_table_that_points_at_itself_is_not_loaded() -> None:
    """5,000 tags, each of all the table's 60 kB: 300 MB for whoever loads the table to find one number."""
    num_tags = 5_000
    tag = b"".join(
        i.to_bytes(2, "little") + b"\x07\0" + (60_000).to_bytes(4, "little") + b"\x08\0\0\0" for i in range(num_tags)
    )
    data = jpeg_with_exif(b"II*\0\x08\0\0\0" + num_tags.to_bytes(2, "little") + tag)
    tracemalloc.start()
    assert decode(data).width == 24
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_pieces_up_to_the_limit_are_read() -> None:
    data = png(4, 4, *[png_chunk(b"tEXt", b"a\0b")] * (MAX_PIECES - 10), pixels=bytes(4 * 13))
    assert decode(data).rgb.shape == (4, 4, 3)
    assert read_picture_header(data, param="image").file == png(4, 4, pixels=bytes(4 * 13))


def test_limits_are_of_bytes_and_pixels() -> None:
    data = encoded(noise(20, 12), "PNG")
    assert decode(data, MediaLimits(max_picture_pixels=240, max_picture_bytes=len(data))).width == 20
    assert "at most 239 in all" in refusal(data, MediaLimits(max_picture_pixels=239))
    assert "send a smaller file" in refusal(data, MediaLimits(max_picture_bytes=len(data) - 1))


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_must_be_above_zero(value: float) -> None:
    with pytest.raises(ConfigError, match="max_sound_s"):
        MediaLimits(max_sound_s=value)
