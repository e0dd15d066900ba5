"""Text to Mandarin speech with ttskit's weights: Mellotron (Tacotron 2 told the speaker) and MelGAN, inference only.

The two files are whole pickled modules. They are read with `weights_only` and every class they name
stands for an empty holder of tensors, so no code of theirs runs; the forward pass below is ours.
Equations: Tacotron 2 (Shen 2018) 2.2; location-sensitive attention (Chorowski 2015) eq. 9; the speaker
joined to each encoder state (Valle 2020, Mellotron) 2; MelGAN's generator (Kumar 2019) 2.1.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from autoglm.errors import FormatError

# A symbol lasts 5 frames on average (four a syllable); twice that is an attention that lost its way.
_MAX_FRAMES_A_SYMBOL = 10
_ATTEMPTS = 5
# Two symbols, one of them a link, are passed over in a natural reading; more is a sound left out.
_LONGEST_STEP = 3
# The author's threshold on the stop gate's probability.
_STOP = 0.8
_LOG_SILENCE = -11.5129
_VOCODER_TAIL = 10
_HOP = 256


# The author's symbol table, by position; the letters and marks after the tones are never needed here.
_SYMBOLS = (
    "_ ~ - aa b c ch d ee f g h ii j k l m n oo p q r s sh t uu vv x z zh a ai an ang ao e ei en eng er i ia ian iang "
    "iao ie in ing iong iu ix iy iz o ong ou u ua uai uan uang ueng ui un uo v van ve vn ng uong 1 2 3 4 5"
).split()
_SYMBOL_IDS = {symbol: index for index, symbol in enumerate(_SYMBOLS)}
_NO_INITIAL = {"y": "ii", "w": "uu", "a": "aa", "e": "ee", "o": "oo"}
# Finals that pinyin spells differently after y and w, and the three sounds that it all writes i.
_AFTER_GLIDE = {"iou": "iu", "uei": "ui", "uen": "un"}
_BUZZED = {"zh": "ix", "ch": "ix", "sh": "ix", "z": "iy", "c": "iy", "s": "iy", "r": "iz"}


class _Holder:
    """Stands for any module class of a pickle: its attributes are kept, nothing is called."""


def read_pickled_module(path: Path) -> dict[str, Tensor]:
    """A pickled torch module -> its tensors by dotted name. Raises FormatError naming a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickle_name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            operations = pickletools.genops(archive.read(pickle_name))
            names = {str(arg).replace(" ", ".") for op, arg, _ in operations if op.name == "GLOBAL"}
        modules = [name for name in sorted(names) if name.startswith(("mellotron.", "melgan.", "torch.nn."))]
        holders: list[Any] = [(type("Holder", (_Holder,), {}), name) for name in modules]
        with torch.serialization.safe_globals([*holders, (set, "__builtin__.set")]):
            root = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader raise about anything
        raise FormatError(f"{path.name} of ttskit cannot be read ({type(error).__name__}); reinstall ttskit") from None
    tensors: dict[str, Tensor] = {}
    _collect(root, "", tensors)
    return tensors


def _collect(module: Any, prefix: str, tensors: dict[str, Tensor]) -> None:
    attributes = module.__dict__
    for name, value in {**attributes["_parameters"], **attributes["_buffers"]}.items():
        if value is not None:
            tensors[prefix + name] = value.detach()
    for name, child in attributes["_modules"].items():
        _collect(child, f"{prefix}{name}.", tensors)


class Mellotron:
    """Both networks, on the CPU. Not safe for two threads at once."""

    def __init__(self, acoustic: Path, vocoder: Path) -> None:
        self._w = read_pickled_module(acoustic)
        self._v = _without_weight_norm(read_pickled_module(vocoder))
        self._lstm = torch.nn.LSTM(256, 128, batch_first=True, bidirectional=True)
        self._lstm.load_state_dict(_below(self._w, "encoder.lstm."))
        self._attention_rnn = torch.nn.LSTMCell(416, 512)
        self._attention_rnn.load_state_dict(_below(self._w, "decoder.attention_rnn."))
        self._decoder_rnn = torch.nn.LSTMCell(800, 512)
        self._decoder_rnn.load_state_dict(_below(self._w, "decoder.decoder_rnn."))

    @torch.inference_mode()
    def speak(self, ids: list[int], speaker: list[float], *, rate: float, seed: int) -> npt.NDArray[np.float32]:
        """Symbols and a speaker vector of 32 numbers -> f32 [num_samples] at 22.05 kHz, -1..1, `rate` times as fast.

        The decoder's dropout stays on, as in training: without it its attention gets stuck. Its mask
        comes from `seed`, so the same arguments give the same samples. A reading whose attention
        skipped, went back or did not finish is read again with another mask, four times at most.
        """
        memory = self._encode(torch.tensor([ids]), torch.tensor([speaker]))
        mel, flaws = self._decode(memory, torch.Generator().manual_seed(seed))
        for attempt in range(1, _ATTEMPTS):
            if flaws == 0:
                break
            again, fewer = self._decode(memory, torch.Generator().manual_seed(seed + attempt))
            mel, flaws = (again, fewer) if fewer < flaws else (mel, flaws)
        mel = mel + self._post(mel)
        # Speed is changed between the networks, where stretching the frames keeps the pitch.
        mel = F.interpolate(mel, size=max(8, round(mel.shape[2] / rate)), mode="linear", align_corners=True)
        samples: npt.NDArray[np.float32] = self._vocode(mel).numpy().astype(np.float32)
        return samples

    def _encode(self, ids: Tensor, speaker: Tensor) -> Tensor:
        """[1, T] symbols -> [1, T, 288]: 256 of text, 32 of the speaker."""
        w = self._w
        x = F.embedding(ids, w["embedding.weight"]).transpose(1, 2)
        for layer in range(3):
            x = F.relu(self._convolution(x, f"encoder.convolutions.{layer}"))
        text, _ = self._lstm(x.transpose(1, 2))
        voice = F.linear(speaker, w["speaker_embedding.weight"], w["speaker_embedding.bias"])
        return torch.cat((text, voice[:, None].expand(-1, text.shape[1], -1)), dim=2)

    def _decode(self, memory: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        """[1, T, 288] -> mel [1, 80, num_frames], one frame a step until the stop gate opens, and its flaws."""
        w = {name: self._w[f"decoder.{name}.linear_layer.weight"] for name in ("linear_projection", "gate_layer")}
        bias = {name: self._w[f"decoder.{name}.linear_layer.bias"] for name in w}
        keys = F.linear(memory, self._w["decoder.attention_layer.memory_layer.linear_layer.weight"])
        frame, context = memory.new_zeros(1, 80), memory.new_zeros(1, 288)
        attention_state = (memory.new_zeros(1, 512), memory.new_zeros(1, 512))
        decoder_state = (memory.new_zeros(1, 512), memory.new_zeros(1, 512))
        weights = memory.new_zeros(1, 2, memory.shape[1])  # the last step's attention, and the sum of all so far
        frames: list[Tensor] = []
        path: list[int] = []
        limit = _MAX_FRAMES_A_SYMBOL * memory.shape[1]
        while len(frames) < limit:
            cell_input = torch.cat((self._prenet(frame, generator), context), dim=1)
            attention_state = self._attention_rnn(cell_input, attention_state)
            attention = self._attend(attention_state[0], keys, weights)
            path.append(int(attention.argmax()))
            context = (attention[:, None] @ memory)[:, 0]
            weights = torch.stack((attention, weights[:, 1] + attention), dim=1)
            decoder_state = self._decoder_rnn(torch.cat((attention_state[0], context), dim=1), decoder_state)
            out = torch.cat((decoder_state[0], context), dim=1)
            frame = F.linear(out, w["linear_projection"], bias["linear_projection"])
            frames.append(frame)
            if torch.sigmoid(F.linear(out, w["gate_layer"], bias["gate_layer"])).item() > _STOP:
                break
        return torch.stack(frames, dim=2), _count_flaws(path, memory.shape[1]) + (len(frames) == limit)

    def _prenet(self, frame: Tensor, generator: torch.Generator) -> Tensor:
        for layer in range(2):
            frame = F.relu(F.linear(frame, self._w[f"decoder.prenet.layers.{layer}.linear_layer.weight"]))
            frame = frame * torch.randint(0, 2, frame.shape, generator=generator) * 2.0
        return frame

    def _attend(self, query: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        prefix = "decoder.attention_layer."
        located = F.conv1d(weights, self._w[prefix + "location_layer.location_conv.conv.weight"], padding=15)
        located = F.linear(
            located.transpose(1, 2), self._w[prefix + "location_layer.location_dense.linear_layer.weight"]
        )
        asked = F.linear(query, self._w[prefix + "query_layer.linear_layer.weight"])[:, None]
        energy = F.linear(torch.tanh(asked + located + keys), self._w[prefix + "v.linear_layer.weight"])
        return torch.softmax(energy[:, :, 0], dim=1)

    def _post(self, mel: Tensor) -> Tensor:
        for layer in range(5):
            mel = self._convolution(mel, f"postnet.convolutions.{layer}")
            mel = torch.tanh(mel) if layer < 4 else mel
        return mel

    def _convolution(self, x: Tensor, name: str) -> Tensor:
        w = self._w
        x = F.conv1d(x, w[f"{name}.0.conv.weight"], w[f"{name}.0.conv.bias"], padding=2)
        mean, variance = w[f"{name}.1.running_mean"], w[f"{name}.1.running_var"]
        return F.batch_norm(x, mean, variance, w[f"{name}.1.weight"], w[f"{name}.1.bias"])

    def _vocode(self, mel: Tensor) -> Tensor:
        """Log-mel [1, 80, num_frames] -> samples [num_frames * 256]; silence behind it keeps its end from clicking."""
        v = self._v
        mel = F.pad(mel, (0, _VOCODER_TAIL), value=_LOG_SILENCE) / 5.0 + 1.0
        x = F.conv1d(F.pad(mel, (3, 3), mode="reflect"), v["generator.1.weight"], v["generator.1.bias"])
        for index, stride in ((3, 8), (6, 8), (9, 2), (12, 2)):
            w, b = v[f"generator.{index}.weight"], v[f"generator.{index}.bias"]
            x = F.conv_transpose1d(F.leaky_relu(x, 0.2), w, b, stride=stride, padding=stride // 2)
            x = self._residual(x, f"generator.{index + 1}.")
        x = F.pad(F.leaky_relu(x, 0.2), (3, 3), mode="reflect")
        wave = torch.tanh(F.conv1d(x, v["generator.16.weight"], v["generator.16.bias"]))[0, 0]
        return wave[: -_VOCODER_TAIL * _HOP]

    def _residual(self, x: Tensor, prefix: str) -> Tensor:
        v = self._v
        for block, reach in enumerate((1, 3, 9)):
            name = f"{prefix}blocks.{block}."
            inner = F.pad(F.leaky_relu(x, 0.2), (reach, reach), mode="reflect")
            inner = F.conv1d(inner, v[name + "2.weight"], v[name + "2.bias"], dilation=reach)
            inner = F.conv1d(F.leaky_relu(inner, 0.2), v[name + "4.weight"], v[name + "4.bias"])
            short = f"{prefix}shortcuts.{block}."
            x = F.conv1d(x, v[short + "weight"], v[short + "bias"]) + inner
        return x


def _count_flaws(path: list[int], num_symbols: int) -> int:
    """How often the attention (the symbol looked at in each frame) skipped or went back, and whether it fell short."""
    steps = np.diff(path)
    short = path[-1] < num_symbols - 1 - _LONGEST_STEP
    return int(np.sum(steps > _LONGEST_STEP) + np.sum(steps < -1) + short)


def mellotron_symbols(syllables: list[str]) -> list[int]:
    """Pinyin with tone digits -> the ids that `Mellotron.speak` takes: initial, final, tone and a link for each."""
    symbols: list[str] = []
    for syllable in syllables:
        initial, final = _split(syllable[:-1])
        symbols += [initial, final, syllable[-1], "-"]
    return [_SYMBOL_IDS[symbol] for symbol in (*symbols, "~", "_") if symbol in _SYMBOL_IDS]


def _split(syllable: str) -> tuple[str, str]:
    """A toneless syllable -> initial and final in the author's spelling: every syllable has both."""
    size = 2 if syllable.startswith(("zh", "ch", "sh")) else 1
    initial, final = syllable[:size], syllable[size:]
    if initial in ("a", "e", "o"):
        return _NO_INITIAL[initial], syllable
    if initial == "y" and final.startswith("u"):
        return "vv", "v" + final[1:]
    if initial in ("y", "w"):
        glide = "i" if initial == "y" else "u"
        whole = final if final.startswith(glide) else glide + final
        return _NO_INITIAL[initial], _AFTER_GLIDE.get(whole, whole)
    if initial in ("j", "q", "x") and final.startswith("u"):
        return initial, "v" + final[1:]
    return initial, _BUZZED.get(initial, final) if final == "i" else final


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _without_weight_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """w = g v / |v|, the norm over all but the first axis (Salimans 2016, eq. 2)."""
    merged = {}
    for name, value in tensors.items():
        if name.endswith("weight_v"):
            length = value.flatten(1).norm(dim=1).view(-1, *[1] * (value.dim() - 1))
            merged[name[:-2]] = tensors[name[:-1] + "g"] * value / length
        elif not name.endswith("weight_g"):
            merged[name] = value
    return merged
