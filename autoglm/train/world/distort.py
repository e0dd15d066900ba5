"""What a room and a cheap microphone do to a clean sound: speed, echo, noise, band, gain and clipping."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

Wave = npt.NDArray[np.float32]
SAMPLE_RATE_HZ = 16_000
# Noise is cut out of a long loop at a drawn place: drawing it anew would cost half the time budget.
_LOOP = 1 << 18
_MAX_GAIN_DB = 10.0


def distort(wave: Wave, rng: np.random.Generator, *, snr_db: float | None = None, clean: bool = False) -> Wave:
    """A new recording of `wave` f32 [num_samples] at 16 kHz; another length, peak at most 1.

    snr_db  the signal-to-noise ratio to use, over the loud part of the speech; None draws 5 to 40 dB,
            and leaves the noise out in one case of five
    clean   only silence around it and gain: for a test without noise
    Everything else is drawn from `rng`, so equal generators give equal recordings. The order is that
    of the world: the speaker's speed, the pause around it, the room, the noise in it, then the
    microphone's band, gain and clipping.
    """
    wave = np.asarray(wave, np.float32)
    if not clean and rng.random() < 0.7:
        wave = change_speed(wave, rng.uniform(0.92, 1.08))
    before, after = (int(rng.uniform(0.0, 0.3) * SAMPLE_RATE_HZ) for _ in range(2))
    wave = np.pad(wave, (before, after))
    if not clean and rng.random() < 0.4:
        wave = add_room(wave, rng)
    if snr_db is not None or (not clean and rng.random() < 0.8):
        wave = add_noise(wave, rng, rng.uniform(5.0, 40.0) if snr_db is None else snr_db)
    if not clean and rng.random() < 0.25:
        wave = limit_band(wave, rng)
    return _set_gain(wave, rng, clip=not clean)


def change_speed(wave: Wave, factor: float) -> Wave:
    """Play `factor` times as fast, by linear interpolation: speed and pitch move together."""
    size = max(1, int(len(wave) / factor))
    faster: Wave = np.interp(np.arange(size) * factor, np.arange(len(wave)), wave).astype(np.float32)
    return faster


def add_room(wave: Wave, rng: np.random.Generator) -> Wave:
    """Convolve with the direct sound and a tail of noise that decays 60 dB in 0.1 to 0.5 s; same length.

    Source: Polack's statistical model of late reverberation (1988), white noise times exp(-6.9 t / T60).
    """
    decay_s = rng.uniform(0.1, 0.5)
    length = int(min(decay_s, 0.25) * SAMPLE_RATE_HZ)
    time_s = np.arange(length, dtype=np.float32) / SAMPLE_RATE_HZ
    tail = _piece(_loops()[0], length, rng) * np.exp(np.float32(-6.9 / decay_s) * time_s)
    tail *= np.float32(rng.uniform(0.1, 0.6)) / np.sqrt(np.sum(tail**2) + np.float32(1e-9))
    tail[: int(rng.uniform(0.001, 0.006) * SAMPLE_RATE_HZ)] = 0.0
    tail[0] = 1.0
    size = _fft_size(len(wave) + length)
    spectrum = np.fft.rfft(wave, size) * np.fft.rfft(tail.astype(np.float32), size)
    echoed: Wave = np.fft.irfft(spectrum, size)[: len(wave)].astype(np.float32)
    return echoed


def add_noise(wave: Wave, rng: np.random.Generator, snr_db: float) -> Wave:
    """Add white, pink or babble-like noise `snr_db` under the power of the speech (its samples above 1/10 of peak)."""
    loud = wave[np.abs(wave) > 0.1 * np.abs(wave).max(initial=0.0)]
    if loud.size == 0:
        return wave
    noise = _piece(_loops()[int(rng.integers(3))], len(wave), rng)
    power = float(np.mean(loud**2)) / max(float(np.mean(noise**2)), 1e-12)
    noise *= np.float32((power * 10.0 ** (-snr_db / 10.0)) ** 0.5)
    noise += wave
    return noise


def limit_band(wave: Wave, rng: np.random.Generator) -> Wave:
    """Keep a telephone-like band only: 50 to 350 Hz up to 3.2 to 7 kHz, edges a quarter octave wide."""
    size = _fft_size(len(wave))
    frequencies = np.fft.rfftfreq(size, 1 / SAMPLE_RATE_HZ) + 1e-3
    low, high = rng.uniform(50.0, 350.0), rng.uniform(3200.0, 7000.0)
    mask = np.clip(0.5 + 4 * np.log2(frequencies / low), 0, 1) * np.clip(0.5 + 4 * np.log2(high / frequencies), 0, 1)
    limited: Wave = np.fft.irfft(np.fft.rfft(wave, size) * mask.astype(np.float32), size)[: len(wave)].astype(
        np.float32
    )
    return limited


def _set_gain(wave: Wave, rng: np.random.Generator, *, clip: bool) -> Wave:
    """Peak to between -30 dB and full scale; one recording in ten is driven up to 10 dB into clipping."""
    peak = float(np.abs(wave).max(initial=0.0))
    if peak == 0.0:
        return wave
    over = clip and rng.random() < 0.1
    level_db = rng.uniform(0.0, _MAX_GAIN_DB) if over else rng.uniform(-30.0, 0.0)
    louder = wave * np.float32(10.0 ** (level_db / 20.0) / peak)
    return np.asarray(np.clip(louder, -1.0, 1.0), np.float32)


def _piece(loop: Wave, length: int, rng: np.random.Generator) -> Wave:
    """`length` samples of a noise loop from a drawn start, going round."""
    start = int(rng.integers(_LOOP))
    pieces = [loop[start : start + length]]
    while (missing := length - sum(map(len, pieces))) > 0:
        pieces.append(loop[:missing])
    return np.concatenate(pieces)


def _fft_size(length: int) -> int:
    """The next multiple of 2048 upwards: few large prime factors, little waste."""
    return -(-length // 2048) * 2048


@cache
def _loops() -> tuple[Wave, Wave, Wave]:
    """White, pink and babble-like noise, 16 s each, mean square 1, read only.

    Pink falls 3 dB an octave. Babble is noise with the long-term spectrum of speech (flat to 500 Hz,
    then 9 dB an octave down, Byrne 1994) whose loudness follows six talkers' syllables at 3 to 5 Hz.
    """
    rng = np.random.Generator(np.random.PCG64(20_260_101))
    white = rng.standard_normal(_LOOP)
    frequencies = np.maximum(np.fft.rfftfreq(_LOOP, 1 / SAMPLE_RATE_HZ), 20.0)
    pink = np.fft.irfft(np.fft.rfft(rng.standard_normal(_LOOP)) / np.sqrt(frequencies), _LOOP)
    time_s = np.arange(_LOOP) / SAMPLE_RATE_HZ
    shape = np.minimum(1.0, (frequencies / 500.0) ** -1.5)
    babble = np.zeros(_LOOP)
    for _ in range(6):
        # A whole number of syllables fits in the loop, so that it goes round without a step.
        rate_hz = round(rng.uniform(3.0, 5.0) * _LOOP / SAMPLE_RATE_HZ) * SAMPLE_RATE_HZ / _LOOP
        syllables = np.maximum(0.1, np.sin(2 * np.pi * (rate_hz * time_s + rng.random()))) ** 2
        babble += syllables * np.fft.irfft(np.fft.rfft(rng.standard_normal(_LOOP)) * shape, _LOOP)
    loops = tuple((noise / np.sqrt(np.mean(noise**2))).astype(np.float32) for noise in (white, pink, babble))
    for loop in loops:
        loop.setflags(write=False)
    return loops[0], loops[1], loops[2]
