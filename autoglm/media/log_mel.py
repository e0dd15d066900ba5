"""Sound -> log-mel spectrogram, the audio encoder's input; the same code for training and serving.

25 ms Hann windows every 10 ms, 512-point FFT, 80 triangular filters equally wide on the HTK mel
scale from 20 to 7600 Hz, natural logarithm, then mean 0 and variance 1 over the whole utterance, for
each bin. Source of the mel scale: HTK Book (Young 2006) 5.4, mel = 2595 log10(1 + f / 700).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from autoglm.errors import RequestError

SAMPLE_RATE_HZ = 16_000
NUM_MELS = 80
WINDOW = 400
HOP = 160
FFT_SIZE = 512
LOW_HZ, HIGH_HZ = 20.0, 7600.0
MAX_S = 60
# The power of a 16-bit sample's last bit, so that digital silence does not become minus infinity.
_FLOOR = 1e-7
# Keeps a bin that hardly moves (silence, band-limited sound) from being blown up into noise.
_MIN_DEVIATION = 0.1


def log_mel(wave: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Normalized log-mel spectrogram.

    wave  f32 [num_samples], mono, 16 kHz, -1..1
    Returns f32 [num_frames, 80], num_frames = 1 + (num_samples - 400) // 160, one frame at least
    (shorter sound is padded with zeros). Raises RequestError when it is not one-dimensional, empty,
    longer than 60 s or not finite.
    """
    wave = np.asarray(wave, np.float32)
    if wave.ndim != 1 or wave.size == 0:
        raise RequestError(f"audio must be one channel with samples in it, got shape {list(wave.shape)}", param="audio")
    if wave.size > MAX_S * SAMPLE_RATE_HZ:
        raise RequestError(
            f"audio is {wave.size / SAMPLE_RATE_HZ:.1f} s long, at most {MAX_S} s are heard; send a shorter clip",
            param="audio",
        )
    if not np.isfinite(wave).all():
        raise RequestError("audio has samples that are not finite numbers", param="audio")
    if wave.size < WINDOW:
        wave = np.pad(wave, (0, WINDOW - wave.size))
    frames = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP]
    spectrum = np.fft.rfft(frames * _window(), FFT_SIZE, axis=1)
    power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
    mel = np.log(power @ mel_filters() + np.float32(_FLOOR))
    deviation = np.maximum(mel.std(axis=0), np.float32(_MIN_DEVIATION))
    return np.ascontiguousarray((mel - mel.mean(axis=0)) / deviation, dtype=np.float32)


def num_frames(num_samples: int) -> int:
    """How many frames `log_mel` gives for a clip of `num_samples`."""
    return 1 + max(0, num_samples - WINDOW) // HOP


@cache
def _window() -> npt.NDArray[np.float32]:
    """Periodic Hann window, f32 [400]."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)


@cache
def mel_filters() -> npt.NDArray[np.float32]:
    """Triangles of height 1 over the FFT bins, f32 [257, 80]; corners equally spaced in mel."""
    low, high = (2595.0 * np.log10(1.0 + f / 700.0) for f in (LOW_HZ, HIGH_HZ))
    corners = 700.0 * (10.0 ** (np.linspace(low, high, NUM_MELS + 2) / 2595.0) - 1.0)
    bins = np.arange(FFT_SIZE // 2 + 1)[:, None] * (SAMPLE_RATE_HZ / FFT_SIZE)
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    filters: npt.NDArray[np.float32] = np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)
    filters.setflags(write=False)
    return filters
