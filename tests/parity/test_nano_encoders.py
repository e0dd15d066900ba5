"""Native eyes, ears and fusion of the shipped Nano against its PyTorch twin on the dequantized weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.formats.gguf import GGUFFile
from autoglm.kernels import Runtime
from autoglm.model.encoder import finish
from autoglm.model.gcmf_audio import GcmfAudio, read_gcmf_audio_config
from autoglm.model.gcmf_fusion import GcmfFusion
from autoglm.model.gcmf_vision import GcmfVision, read_gcmf_vision_config
from autoglm.model.loader import WeightReader
from autoglm.train.model import AutoGLMPhone

NANO = SHIPPED_MODELS["nano"]
RNG = np.random.default_rng(5)


class Native:
    """The three parts read from the shipped mmproj."""

    def __init__(self) -> None:
        gguf = GGUFFile.open(NANO.mmproj)
        reader = WeightReader(gguf, Runtime(2))
        self.vision = GcmfVision(reader, read_gcmf_vision_config(gguf))
        self.audio = GcmfAudio(reader, read_gcmf_audio_config(gguf))
        self.fusion = GcmfFusion(reader, gguf, self.vision.config.text_size)
        reader.finish()


@pytest.fixture(scope="module")
def native() -> Native:
    return Native()


def assert_close(ours: np.ndarray, theirs: Tensor, bound: float = 2e-3) -> None:
    """Relative to the largest value. A value on the edge between two of 255 steps may fall either way."""
    wanted = theirs.numpy()
    assert ours.shape == wanted.shape
    assert np.abs(ours - wanted).max() < bound * np.abs(wanted).max()


@pytest.mark.parametrize("size", [(480, 224), (224, 480), (96, 160)])
def test_eyes(size: tuple[int, int], native: Native, twin: AutoGLMPhone) -> None:
    """Portrait, landscape (positions resampled) and small."""
    pixels = RNG.uniform(-1, 1, (3, *size)).astype(np.float32)
    _, wanted = twin.see(torch.from_numpy(pixels)[None])
    assert_close(finish(native.vision.encode(pixels)), wanted[0], 0.02)


@pytest.mark.parametrize("frames", [1, 2, 37, 298, 1201])
def test_ears(frames: int, native: Native, twin: AutoGLMPhone) -> None:
    mel = RNG.standard_normal((frames, 80)).astype(np.float32)
    sound, _ = twin.audio(torch.from_numpy(mel)[None], torch.tensor([frames]))
    assert_close(finish(native.audio.encode(mel)), twin.audio_projector(sound)[0], 0.02)


@pytest.mark.parametrize(
    "present", [("vision", "audio", "text"), ("vision", "audio"), ("vision", "text"), ("audio", "text")]
)
def test_fusion(present: tuple[str, ...], native: Native, twin: AutoGLMPhone) -> None:
    counts = {"vision": 105, "audio": 40, "text": 9}
    tokens = {name: RNG.standard_normal((counts[name], 256)).astype(np.float32) for name in present}
    wanted = twin.fusion({
        name: (torch.from_numpy(x)[None], torch.ones(1, len(x), dtype=torch.bool)) for name, x in tokens.items()
    })  # fmt: skip
    fused = native.fusion.fuse(tokens)
    assert list(fused.weights.values()) == pytest.approx(wanted.weights[0].tolist(), abs=1e-5)
    for name in set(present) - {"text"}:
        assert_close(fused.tokens[name], getattr(wanted, name)[0], 0.01)
        assert fused.gates[name] == pytest.approx(wanted.gates[name][0].numpy(), abs=2e-3)


def test_a_medium_alone_passes_through(native: Native) -> None:
    alone = RNG.standard_normal((7, 256)).astype(np.float32)
    fused = native.fusion.fuse({"audio": alone})
    assert np.array_equal(fused.tokens["audio"], alone)
    assert fused.weights == {"vision": 0.0, "audio": 1.0, "text": 0.0} and np.all(fused.gates["audio"] == 1)
