"""The speech engines that are programs or C libraries: espeak-ng, flite, festival and pico.

Each `synthesize` takes many utterances at once, since starting a program costs more than speaking:
it returns one (samples, sample rate) for each. No shell is involved, and the text reaches a program
as one argument or in a file of ours.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import platformdirs

from autoglm.errors import ConfigError
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

    revision: str

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
    """Run an engine's program quietly at low priority; ConfigError names it when it fails."""
    name = Path(arguments[0]).name
    try:
        done = subprocess.run(
            ["nice", "-n", "15", *arguments] if shutil.which("nice") else arguments,
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


class Espeak:
    """espeak-ng, one process an utterance: its library keeps the phase of its voicing, a fresh process does not."""

    revision = "1.51"
    _DEFAULT_WORDS_A_MINUTE = 175

    def installed(self) -> bool:
        return shutil.which("espeak-ng") is not None

    def synthesize(self, utterances: Sequence[Utterance]) -> list[Sound]:
        return [self._speak(utterance) for utterance in utterances]

    def _speak(self, utterance: Utterance) -> Sound:
        with tempfile.TemporaryDirectory(prefix="autoglm-speech-") as folder:
            out = Path(folder, "out.wav")
            speed = str(round(self._DEFAULT_WORDS_A_MINUTE * utterance.rate))
            # The text comes last after "--" so that one that begins with a hyphen is not an option.
            run_program(
                ["espeak-ng", "-v", utterance.voice.name, "-s", speed, "-b", "1", "-w", str(out), "--", utterance.text]
            )
            return read_wav(out.read_bytes())


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


class Pico:
    """SVOX Pico compiled to WebAssembly (npm), run by Node: one process for all utterances."""

    revision = "0.2"

    def installed(self) -> bool:
        return shutil.which("node") is not None and self._package().is_dir()

    @staticmethod
    def _package() -> Path:
        return assets_folder() / "node_modules" / "@echogarden" / "svoxpico-wasm"

    def synthesize(self, utterances: Sequence[Utterance]) -> list[Sound]:
        raise ConfigError(f"speech engine pico is not installed; {INSTALL_HINT}")


def assets_folder() -> Path:
    """Where scripts/install_train_assets.sh puts its npm packages."""
    return Path(platformdirs.user_cache_dir("autoglm", appauthor=False)) / "train-assets"
