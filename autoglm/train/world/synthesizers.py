"""The speech engines that are programs: espeak-ng, flite and festival.

Each `synthesize` takes many utterances at once, since starting a program costs more than speaking:
it returns one (samples, sample rate) for each. No shell is involved, and the text reaches a program
as one argument or in a file of ours.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from autoglm.errors import ConfigError
from autoglm.train.world.mandarin import pinyin
from autoglm.train.world.voices import Voice

INSTALL_HINT = "run scripts/install_train_assets.sh"
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Utterance:
    """What is to be said: `text` by `voice`, `rate` times as fast as the engine speaks by itself."""

    text: str
    voice: Voice
    rate: float = 1.0


@dataclass(frozen=True)
class Sound:
    """What an engine gave: samples f32 [num_samples] in -1..1, and their rate."""

    samples: npt.NDArray[np.float32]
    sample_rate_hz: int


class Synthesizer(Protocol):
    """One engine. `revision` changes when its sound would, so that a cached sound is never stale."""

    @property
    def revision(self) -> str: ...

    def installed(self) -> bool:
        """Whether this machine has the engine; cheap, and nothing is started."""
        ...

    def synthesize(self, utterances: Sequence[Utterance]) -> list[Sound]:
        """One sound for each utterance, in order; the same utterance gives the same samples."""
        ...


def read_wav(data: bytes) -> Sound:
    """16-bit mono WAV bytes -> Sound. A size field of a streamed file (0 or 2**32-1) is not trusted."""
    with wave.open(io.BytesIO(data)) as file:
        if file.getsampwidth() != 2 or file.getnchannels() != 1:
            raise ConfigError("a speech engine wrote a WAV that is not 16-bit mono; " + INSTALL_HINT)
        pcm = file.readframes(file.getnframes())
        rate = file.getframerate()
    return Sound(np.frombuffer(pcm[: len(pcm) // 2 * 2], "<i2").astype(np.float32) / 32768.0, rate)


def run_program(arguments: list[str], *, stdin: bytes | None = None) -> None:
    """Run an engine's program quietly; ConfigError names it when it fails."""
    name = Path(arguments[0]).name
    try:
        done = subprocess.run(
            arguments,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"speech engine {name} did not run ({type(error).__name__}); {INSTALL_HINT}") from None
    if done.returncode != 0:
        raise ConfigError(f"speech engine {name} ended with code {done.returncode}; {INSTALL_HINT}")


# Speaks its first argument with the library of the wheel espeakng_loader: 16-bit samples into the file named last,
# the sample rate before them as four bytes. Numbers are espeak-ng's: 2 synchronous output, parameter 1 the speed.
_ESPEAK_PROGRAM = """
import ctypes, pathlib, sys
import espeakng_loader
text, voice, speed, path = sys.argv[1:]
# The library knows a voice by its file, the program also by its language: "en-us" is lang/gmw/en-US.
accent, plus, variant = voice.partition("+")
languages = pathlib.Path(espeakng_loader.get_data_path(), "lang")
found = [file for file in languages.rglob("*") if file.is_file() and file.name.lower() == accent.lower()]
voice = str(found[0].relative_to(languages)) + plus + variant if found else voice
library = ctypes.CDLL(espeakng_loader.get_library_path())
rate = library.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0)
chunks = []
@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
def receive(samples, count, events):
    if samples and count > 0:
        chunks.append(ctypes.string_at(samples, 2 * count))
    return 0
library.espeak_SetSynthCallback(receive)
if rate <= 0 or library.espeak_SetVoiceByName(voice.encode()) != 0:
    sys.exit(1)
library.espeak_SetParameter(1, int(speed), 0)
data = text.encode() + bytes(1)
library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, 1, None, None)
library.espeak_Synchronize()
with open(path, "wb") as file:
    file.write(rate.to_bytes(4, "little") + b"".join(chunks))
"""


class Espeak:
    """espeak-ng, one process an utterance: its library keeps the phase of its voicing, a fresh process does not.

    The program (Debian) is used where there is one, else the library of the wheel espeakng_loader.
    Chinese is given as pinyin (see `mandarin`), so the voice is one that reads pinyin.
    """

    _DEFAULT_WORDS_A_MINUTE = 175

    @property
    def revision(self) -> str:
        return "program" if self._has_program() else "wheel"

    @staticmethod
    @cache
    def _has_program() -> bool:
        return shutil.which("espeak-ng") is not None

    def installed(self) -> bool:
        return self._has_program() or importlib.util.find_spec("espeakng_loader") is not None

    def synthesize(self, utterances: Sequence[Utterance]) -> list[Sound]:
        return [self._speak(utterance) for utterance in utterances]

    def _speak(self, utterance: Utterance) -> Sound:
        voice, speed = utterance.voice.name, str(round(self._DEFAULT_WORDS_A_MINUTE * utterance.rate))
        text = " ".join(pinyin(utterance.text)) if utterance.voice.language == "zh" else utterance.text
        with tempfile.TemporaryDirectory(prefix="autoglm-speech-") as folder:
            out = Path(folder, "out.wav")
            if self._has_program():
                # The text comes last after "--" so that one that begins with a hyphen is not an option.
                run_program(["espeak-ng", "-v", voice, "-s", speed, "-b", "1", "-w", str(out), "--", text])
                return read_wav(out.read_bytes())
            run_program([sys.executable, "-c", _ESPEAK_PROGRAM, text, voice, speed, str(out)])
            data = out.read_bytes()
            return Sound(
                np.frombuffer(data[4:], "<i2").astype(np.float32) / 32768.0, int.from_bytes(data[:4], "little")
            )


class Flite:
    """flite, one process an utterance: it starts in a few milliseconds."""

    revision = "2.2"

    def installed(self) -> bool:
        return shutil.which("flite") is not None

    def synthesize(self, utterances: Sequence[Utterance]) -> list[Sound]:
        return [self._speak(utterance) for utterance in utterances]

    def _speak(self, utterance: Utterance) -> Sound:
        with tempfile.TemporaryDirectory(prefix="autoglm-speech-") as folder:
            out = Path(folder, "out.wav")
            stretch = f"duration_stretch={1 / utterance.rate:.4f}"
            run_program(
                ["flite", "-voice", utterance.voice.name, "--setf", stretch, "-t", utterance.text, "-o", str(out)]
            )
            return read_wav(out.read_bytes())


class Festival:
    """festival in batch mode: one process for all utterances, since loading its lexicon takes a third of a second."""

    revision = "2.5"
    _VOICES = Path("/usr/share/festival/voices")

    def installed(self) -> bool:
        return shutil.which("festival") is not None and all(
            any(self._VOICES.glob(f"*/{name}")) for name in ("kal_diphone", "ked_diphone", "cmu_us_slt_arctic_hts")
        )

    def synthesize(self, utterances: Sequence[Utterance]) -> list[Sound]:
        with tempfile.TemporaryDirectory(prefix="autoglm-speech-") as folder:
            script = Path(folder, "speak.scm")
            script.write_text("\n".join(self._command(folder, i, u) for i, u in enumerate(utterances)))
            run_program(["festival", "--batch", str(script)])
            return [read_wav(Path(folder, f"{i}.wav").read_bytes()) for i in range(len(utterances))]

    @staticmethod
    def _command(folder: str, index: int, utterance: Utterance) -> str:
        quoted = utterance.text.replace("\\", " ").replace('"', " ")
        return "\n".join(
            (
                f"(voice_{utterance.voice.name})",
                f"(Parameter.set 'Duration_Stretch {1 / utterance.rate:.4f})",
                # The HTS voice ignores Duration_Stretch and reads its own speed from here.
                f"(if (boundp 'hts_engine_params) (set! hts_engine_params "
                f'(append (list (list "-r" {utterance.rate:.4f})) hts_engine_params)))'
                if utterance.voice.name.endswith("_hts")
                else "",
                f'(set! said (SynthText "{quoted}"))',
                f'(utt.save.wave said "{folder}/{index}.wav" \'riff)',
            )
        )
