"""Sounds decode to mono at 16 kHz, whole, and what cannot be read is refused by name at low cost."""

from __future__ import annotations

import io
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
import soxr

from autoglm.errors import RequestError
from autoglm.media.limits import MediaLimits
from autoglm.media.sounds import Sound, decode_sound

LIMITS = MediaLimits()


def tone(seconds: float, rate: int, frequency_hz: float = 440.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * frequency_hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def hiss(seconds: float, rate: int) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(round(seconds * rate)) * 0.1).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, format: str, subtype: str | None = None, **options: float | str) -> bytes:
    num_channels = 1 if samples.ndim == 1 else samples.shape[1]
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, num_channels, subtype, None, format, **options) as sound:
        # libsndfile's Vorbis writer keeps a whole call's samples on the stack.
        for start in range(0, len(samples), 1 << 14):
            sound.write(samples[start : start + (1 << 14)])
    return file.getvalue()


def decode(data: bytes, limits: MediaLimits = LIMITS) -> Sound:
    return decode_sound(data, limits=limits, param="messages[0].content[1]")


def refusal(data: bytes, limits: MediaLimits = LIMITS) -> str:
    with pytest.raises(RequestError) as caught:
        decode(data, limits)
    assert caught.value.param == "messages[0].content[1]"
    return str(caught.value)


@pytest.mark.parametrize(
    ("format", "subtype", "name", "tolerance"),
    [
        ("WAV", "PCM_16", "wav", 2e-3),
        ("WAV", "PCM_U8", "wav", 1e-2),
        ("WAV", "PCM_24", "wav", 2e-3),
        ("WAV", "FLOAT", "wav", 2e-3),
        ("WAV", "ULAW", "wav", 2e-2),
        ("WAVEX", "PCM_16", "wav", 2e-3),
        ("FLAC", "PCM_16", "flac", 2e-3),
        ("OGG", "VORBIS", "ogg", 3e-2),
        ("OGG", "OPUS", "ogg", 3e-2),
        ("MP3", "MPEG_LAYER_III", "mp3", 3e-2),
    ],
)
def test_a_tone_arrives_as_the_same_tone_at_16_khz(format: str, subtype: str, name: str, tolerance: float) -> None:
    """Against the tone computed at 16 kHz, away from the ends, where codecs and the resampler fade."""
    rate = 48_000
    sound = decode(encoded(tone(0.5, rate), rate, format, subtype))
    assert sound.format == name and sound.samples.dtype == np.float32 and not sound.samples.flags.writeable
    assert sound.duration_s == pytest.approx(0.5, abs=0.06)
    np.testing.assert_allclose(sound.samples[1600:6400], tone(0.5, 16_000)[1600:6400], atol=tolerance)


def test_16_khz_is_left_as_it_is() -> None:
    samples = hiss(0.1, 16_000)
    np.testing.assert_array_equal(decode(encoded(samples, 16_000, "WAV", "FLOAT")).samples, samples)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 96_000])
def test_blocks_resample_as_one_piece(rate: int) -> None:
    """3 s are several blocks at 96 kHz; soxr over the whole is the reference."""
    samples = hiss(3.0, rate)
    ours = decode(encoded(samples, rate, "WAV", "FLOAT")).samples
    expected = soxr.resample(samples, rate, 16_000)
    assert abs(len(ours) - len(expected)) <= 1
    common = min(len(ours), len(expected))
    np.testing.assert_allclose(ours[:common], expected[:common], atol=2e-5)


def test_channels_are_averaged() -> None:
    samples = np.stack([hiss(0.1, 16_000), tone(0.1, 16_000), np.zeros(1600, np.float32)], axis=1)
    np.testing.assert_allclose(
        decode(encoded(samples, 16_000, "WAV", "FLOAT")).samples, samples.mean(axis=1), atol=1e-7
    )


def test_content_hash_is_of_the_samples() -> None:
    samples = (tone(0.1, 16_000) * 32767).astype(np.int16)
    first = decode(encoded(samples, 16_000, "WAV", "PCM_16")).content_hash
    assert decode(encoded(samples, 16_000, "FLAC", "PCM_16")).content_hash == first
    assert decode(encoded(samples // 2, 16_000, "FLAC", "PCM_16")).content_hash != first


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x00\x00\x00\x20ftypM4A " + bytes(40), "m4a or mp4"),
        (b"\x1aE\xdf\xa3" + bytes(40), "webm"),
        (b"#!AMR-WB\n" + bytes(40), "amr"),
        (b"\x02#!SILK_V3" + bytes(40), "silk"),
        (b"\xff\xf1\x50\x80" + bytes(40), "aac"),
        (b"0&\xb2u\x8ef\xcf\x11" + bytes(40), "wma"),
        (b"OggS" + bytes(24) + b"Speex   1.2", "ogg with speex"),
        (b"OggS" + bytes(24) + b"\x80theora", "ogg with theora"),
        (encoded(tone(0.1, 8000), 8000, "AIFF"), "aiff"),
        (encoded(tone(0.1, 8000), 8000, "AU"), "au"),
        (encoded(tone(0.1, 8000), 8000, "CAF"), "caf"),
        (encoded(tone(0.1, 8000), 8000, "MAT5"), "unknown format"),
        (b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + encoded(tone(0.1, 8000), 8000, "AU"), "au"),
        (encoded(tone(0.1, 8000), 8000, "WAV", "GSM610"), "wav with gsm610"),
        (b"\x89PNG\r\n\x1a\n", "unknown format"),
        (b"", "empty"),
    ],
)
def test_other_containers_and_codecs_are_named_with_those_that_work(data: bytes, words: str) -> None:
    text = refusal(data)
    assert words in text and "wav, mp3, flac or ogg" in text


def wav(rate: int, channels: int, num_frames: int, kind: int = 1, bits: int = 16, body: bytes = b"") -> bytes:
    """A wav whose header says `num_frames`, with `body` or zeros for what it says."""
    align = channels * bits // 8
    body = body or bytes(align * num_frames)
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, channels, rate, rate * align, align, bits)
    chunks = b"WAVE" + head + struct.pack("<4sI", b"data", align * num_frames) + body
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


@pytest.mark.parametrize(
    ("rate", "channels", "words"), [(3999, 1, "3999 Hz"), (200_000, 1, "Hz"), (16_000, 9, "9 channels")]
)
def test_odd_rates_and_channels_are_refused(rate: int, channels: int, words: str) -> None:
    assert words in refusal(wav(rate, channels, 4000))


@pytest.mark.parametrize(("rate", "channels"), [(4000, 1), (192_000, 8)])
def test_rates_and_channels_at_the_limit_are_read(rate: int, channels: int) -> None:
    assert decode(wav(rate, channels, rate // 10)).duration_s == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 12_000.0])
def test_samples_that_are_no_sound_are_refused(value: float) -> None:
    samples = np.array([0.1, value, 0.2] * 100, "<f4")
    assert "-1..1" in refusal(wav(16_000, 1, 300, kind=3, bits=32, body=samples.tobytes()))


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_the_limit_is_of_seconds_in_every_container(format: str) -> None:
    """At the limit, codec padding included, a clip is whole; a quarter of a second more is refused."""
    limits = MediaLimits(max_sound_s=1.0)
    assert decode(encoded(tone(1.0, 24_000), 24_000, format), limits).samples.size == 16_000
    assert "longer than 1 s" in refusal(encoded(tone(1.25, 24_000), 24_000, format), limits)


def flac_of_length(num_frames: int) -> bytes:
    """Half a second of flac whose header says another length; 0 is "unknown"."""
    data = bytearray(encoded(tone(0.5, 16_000), 16_000, "FLAC"))
    data[21] = data[21] & 0xF0 | num_frames >> 32
    data[22:26] = (num_frames & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


def test_a_length_in_the_header_is_not_believed() -> None:
    assert decode(flac_of_length(0)).duration_s == 0.5
    assert "longer than 60 s" in refusal(flac_of_length(1 << 34))
    assert "before the length" in refusal(flac_of_length(16_000))
    assert "longer than 0.2 s" in refusal(flac_of_length(0), MediaLimits(max_sound_s=0.2))


def test_a_streamed_wav_whose_writer_did_not_know_the_length_is_whole() -> None:
    data = bytearray(encoded(tone(0.5, 16_000), 16_000, "WAV"))
    at = data.index(b"data") + 4
    data[4:8] = data[at : at + 4] = b"\xff\xff\xff\xff"
    assert decode(bytes(data)).duration_s == 0.5


def test_an_mp3_is_heard_whole_or_refused() -> None:
    """Its length is a guess from the first frame: too high must not refuse it, too low must not cut it short."""
    low = encoded(hiss(2.0, 24_000), 24_000, "MP3", bitrate_mode="CONSTANT", compression_level=0.99)
    high = encoded(hiss(2.0, 24_000), 24_000, "MP3", bitrate_mode="CONSTANT", compression_level=0.0)
    assert decode(low + high, MediaLimits(max_sound_s=5.0)).duration_s == pytest.approx(4.0, abs=0.2)
    assert "shorter length than it has" in refusal(high + low)
    # Tags behind the sound are no frames.
    assert decode(high + b"TAG" + bytes(125)).duration_s == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("format", ["FLAC", "OGG", "MP3"])
def test_long_silence_costs_little(format: str) -> None:
    """Silence packs small: 100 s at 8 kHz, refused without holding it all."""
    data = encoded(np.zeros(100 * 8_000, np.float32), 8_000, format)
    tracemalloc.start()
    assert "longer than 60 s" in refusal(data)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 6 << 20


def test_eight_channels_at_192_khz_are_mixed_block_by_block() -> None:
    data = wav(192_000, 8, 192_000)
    tracemalloc.start()
    assert decode(data).duration_s == pytest.approx(1.0)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2 << 20


def test_limits_are_of_bytes_too() -> None:
    data = wav(16_000, 1, 100)
    assert "send a shorter clip" in refusal(data, MediaLimits(max_sound_bytes=len(data) - 1))
    assert decode(data, MediaLimits(max_sound_bytes=len(data))).samples.size == 100


@pytest.mark.parametrize(
    "data", [wav(16_000, 1, 0), b"fLaC" + bytes(60), b"ID3" + bytes(60), b"\xff\xfb", b"RIFF....WAVE"]
)
def test_nothing_to_hear_is_an_error(data: bytes) -> None:
    assert "damaged" in refusal(data)
