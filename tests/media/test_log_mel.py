"""The audio front end: frames, mel filters against transformers' own, normalization, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from autoglm.errors import RequestError
from autoglm.media import log_mel as front
from autoglm.media.log_mel import log_mel, mel_filters, num_frames

RATE = 16_000


def tone(frequency_hz: float, seconds: float = 0.5, peak: float = 0.5) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * frequency_hz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


@pytest.mark.parametrize("samples", [1, 399, 400, 401, 559, 560, 16_000, 31_999])
def test_one_frame_every_ten_milliseconds_once_a_window_is_full(samples: int) -> None:
    mel = log_mel(np.random.default_rng(0).standard_normal(samples).astype(np.float32) * 0.1)
    assert mel.shape == (num_frames(samples), 80)
    assert mel.dtype == np.float32 and mel.flags.c_contiguous
    assert num_frames(samples) == 1 + max(0, samples - 400) // 160


def test_filters_are_htk_triangles() -> None:
    audio_utils = pytest.importorskip("transformers.audio_utils")
    expected = audio_utils.mel_filter_bank(
        num_frequency_bins=257,
        num_mel_filters=80,
        min_frequency=20.0,
        max_frequency=7600.0,
        sampling_rate=RATE,
        norm=None,
        mel_scale="htk",
    )
    np.testing.assert_allclose(mel_filters(), expected, atol=2e-6)


def test_frame_equals_the_definition_written_out() -> None:
    """One frame in float64 by the sums of the docstring: window, discrete Fourier transform, filters, logarithm."""
    wave = np.random.default_rng(1).standard_normal(400 + 160 * 7).astype(np.float32) * 0.1
    rows = []
    for start in range(0, 160 * 8, 160):
        frame = wave[start : start + 400] * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400))
        turns = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512)
        rows.append(np.log(np.abs(turns @ frame) ** 2 @ mel_filters().astype(np.float64) + 1e-7))
    mel = np.array(rows)
    expected = (mel - mel.mean(axis=0)) / np.maximum(mel.std(axis=0), 0.1)
    np.testing.assert_allclose(log_mel(wave), expected, atol=2e-3)


def test_each_bin_has_mean_zero_and_variance_one() -> None:
    mel = log_mel(np.random.default_rng(2).standard_normal(RATE).astype(np.float32) * 0.2)
    np.testing.assert_allclose(mel.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(mel.std(axis=0), 1, atol=1e-3)


def test_loudness_of_the_recording_does_not_matter() -> None:
    wave = np.random.default_rng(3).standard_normal(RATE).astype(np.float32) * 0.2
    np.testing.assert_allclose(log_mel(wave), log_mel(wave * np.float32(0.1)), atol=0.02)


def test_a_tone_lights_its_own_bin() -> None:
    """Half a second of silence, then 1 kHz: the bin that rises most is the one whose triangle peaks there."""
    wave = np.concatenate((np.zeros(RATE // 2, np.float32), tone(1000.0)))
    mel = front.mel_filters()
    loud = int(np.argmax(np.abs(np.fft.rfft(tone(1000.0, 0.032), 512)) ** 2 @ mel))
    centre_hz = 700 * (10 ** (np.interp(loud + 1, [0, 81], [31.75, 2785.4]) / 2595) - 1)
    assert centre_hz == pytest.approx(1000, abs=45)
    # After normalization every bin jumps by the same two deviations, so the unnormalized order is what counts.
    assert log_mel(wave)[-10:, loud].mean() > 0.9


def test_silence_is_zeros_not_noise() -> None:
    mel = log_mel(np.zeros(RATE, np.float32))
    assert np.all(np.isfinite(mel)) and np.abs(mel).max() < 1e-3


@pytest.mark.parametrize(
    ("wave", "words"),
    [
        (np.zeros(0, np.float32), "one channel"),
        (np.zeros((2, 800), np.float32), "one channel"),
        (np.full(800, np.nan, np.float32), "finite"),
        (np.zeros(60 * RATE + 1, np.float32), "at most 60 s"),
    ],
)
def test_refused_with_one_clear_error(wave: np.ndarray, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        log_mel(wave)
    assert caught.value.param == "audio"
