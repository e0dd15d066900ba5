"""autoglm data preview: what training sees and hears, as a contact sheet of screens and a few sounds to play."""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from autoglm.cli.console import CountBar
from autoglm.errors import ConfigError
from autoglm.train.world.assets import missing_assets
from autoglm.train.world.distort import distort
from autoglm.train.world.labels import LANGUAGES, Language
from autoglm.train.world.preview import contact_sheet
from autoglm.train.world.speech import SAMPLE_RATE_HZ, missing_engines, speak, voices
from autoglm.train.world.split import SPLITS, Split, rng_for
from autoglm.train.world.tasks import transcribe


@dataclass(frozen=True)
class PreviewOptions:
    """What to show: how many screens and sounds of which split and language, drawn from `seed` on."""

    folder: Path
    screens: int = 12
    sounds: int = 6
    split: str = "train"
    language: str | None = None
    seed: int = 0


def preview(options: PreviewOptions) -> None:
    """Write screens.png and the sounds into the folder, and list them.

    Red boxes are where a tap counts, blue ones are only named, green ones hold ink. Each sound is written as the
    engine speaks it and as training hears it, through a room, noise and gain. Raises ConfigError.
    """
    split, languages = _split(options.split), _languages(options.language)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out '{options.folder}' is no folder to write to: {error.strerror}") from None
    table = Table(title=f"The {split} world, seed {options.seed}", title_justify="left")
    table.add_column("file", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    if options.screens:
        path = options.folder / "screens.png"
        contact_sheet(
            path,
            split,
            count=options.screens,
            first_seed=options.seed * 1000,
            language=languages[0] if len(languages) == 1 else None,
        )
        table.add_row(path.name, f"{options.screens} screens: tap boxes red, named things blue, ink green")
    with CountBar("speaking") as bar:
        for number in range(options.sounds):
            bar.report(number, options.sounds)
            table.add_row(*_write_sound(options, split, languages[number % len(languages)], number))
    console = Console()
    console.print(table, highlight=False)
    told = f"Written to '{options.folder}'. Each sound is there twice: clean, and -heard as training hears it."
    console.print(told, highlight=False, soft_wrap=True, markup=False)
    lacking = [*missing_assets(), *missing_engines()]
    if lacking:
        told = f"Not installed here: {', '.join(lacking)}. All of them: sh scripts/install_train_assets.sh"
        console.print(told, highlight=False, soft_wrap=True)


def _write_sound(options: PreviewOptions, split: Split, language: Language, number: int) -> tuple[str, str]:
    rng = rng_for(split, "preview", options.seed, number)
    choices = voices(language, split)
    # Engines in turn: a plain draw would mostly give the one with the most voices.
    engines = sorted({voice.engine for voice in choices})
    engine = engines[(options.seed + number // len(LANGUAGES)) % len(engines)]
    of_engine = [voice for voice in choices if voice.engine == engine]
    voice = of_engine[int(rng.integers(len(of_engine)))]
    text = transcribe(rng, split, language).spoken or ""
    sound = speak(text, voice)
    path = options.folder / f"sound-{number + 1:02}-{language}.wav"
    _write_wav(path, sound)
    _write_wav(path.with_stem(path.stem + "-heard"), distort(sound, rng))
    return path.name, f"{voice.engine} {voice.name}: {text}"


def _write_wav(path: Path, sound: npt.NDArray[np.float32]) -> None:
    """16-bit mono; sound f32 [num_samples] in -1..1."""
    samples = np.round(np.clip(sound, -1, 1) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes(samples.tobytes())


def _split(name: str) -> Split:
    for split in SPLITS:
        if name == split:
            return split
    raise ConfigError(f"--split is {name!r}, expected {' or '.join(SPLITS)}")


def _languages(name: str | None) -> tuple[Language, ...]:
    if name is None:
        return LANGUAGES
    for language in LANGUAGES:
        if name == language:
            return (language,)
    raise ConfigError(f"--language is {name!r}, expected {' or '.join(LANGUAGES)}")
