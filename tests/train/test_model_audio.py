"""The Conformer: attention against a slow loop over its equation, token counts, and sounds that do not mix."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autoglm.train.model.audio import AudioEncoder, ConvolutionModule, RelativeAttention, by_key, token_count
from autoglm.train.model.presets import AudioConfig
from tests.train.random_weights import randomize

PAPER = AudioConfig(hidden_size=24, num_layers=2, num_heads=3, mlp_size=32, kernel_size=5, subsample_channels=6)
STEM = replace(PAPER, stem_residuals=2)
BOTH = pytest.mark.parametrize("config", [PAPER, STEM], ids=["two convolutions", "stem"])


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_by_hand(module: RelativeAttention, x: Tensor, length: int) -> Tensor:
    """score(i, j) = (q_i + u)·k_j + (q_i + v)·(R_{i-j} W_r), over the first `length` tokens of x [T, D], in float64."""
    width, heads = x.shape[1], module.num_heads
    dim = width // heads
    normed = module.norm(x[:length])
    result = torch.zeros(length, width, dtype=torch.float64)
    for head in range(heads):
        at = slice(head * dim, (head + 1) * dim)
        q, k, v = (part(normed)[:, at] for part in (module.q, module.k, module.v))
        for i in range(length):
            scores = []
            for j in range(length):
                angles = [(i - j) * 10000.0 ** (-2 * pair / width) for pair in range(width // 2)]
                distance = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
                r = (module.pos.weight @ distance)[at]
                u, w = module.pos_bias_u[head], module.pos_bias_v[head]
                scores.append(((q[i] + u) @ k[j] + (q[i] + w) @ r) / math.sqrt(dim))
            result[i, at] = torch.softmax(torch.stack(scores), 0) @ v
    return module.out(result)  # type: ignore[no-any-return]


def test_relative_attention_equals_its_equation() -> None:
    module = randomize(RelativeAttention(PAPER), scale=0.4).double()
    assert isinstance(module, RelativeAttention)
    x, lengths = normal(2, 7, 24).double(), (7, 4)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        found = module(x, mask)
        for row, length in enumerate(lengths):
            wanted = attention_by_hand(module, x[row], length)
            # The sinusoids are made in float32.
            torch.testing.assert_close(found[row, :length], wanted, rtol=1e-5, atol=1e-5)
        for name in ("pos_bias_u", "pos_bias_v", "pos.weight"):
            changed = randomize(RelativeAttention(PAPER), scale=0.4).double()
            changed.get_parameter(name).zero_()
            assert not torch.allclose(changed(x, mask), found, atol=1e-3), name


def test_scores_by_distance_come_to_their_keys() -> None:
    length = 5
    scores = normal(2, 3, length, 2 * length - 1)
    found = by_key(scores)
    for i in range(length):
        for j in range(length):
            assert torch.equal(found[..., i, j], scores[..., i, length - 1 - i + j])


def test_convolution_module_keeps_its_distance() -> None:
    """A depthwise kernel of 5 reads two tokens to each side, and zeros where a sound has ended."""
    module = randomize(ConvolutionModule(PAPER))
    x, mask = normal(1, 9, 24), torch.arange(9)[None] < 6
    other = x.clone()
    other[0, 4] += 1
    with torch.no_grad():
        changed = torch.nonzero((module(x, mask) != module(other, mask)).any(-1)[0])[:, 0]
        assert changed.tolist() == [2, 3, 4, 5, 6]
        torch.testing.assert_close(module(x, mask)[:, :6], module(x[:, :6], mask[:, :6]), rtol=1e-5, atol=1e-6)


@BOTH
def test_token_count_is_what_comes_out(config: AudioConfig) -> None:
    encoder = randomize(AudioEncoder(config))
    for frames in (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 40):
        sizes = torch.tensor([frames])
        with torch.no_grad():
            features, mask = encoder(normal(1, frames, 80), sizes)
        assert features.shape == (1, int(token_count(sizes)), 24)
        assert bool(mask.all()) and mask.shape[1] == math.ceil(frames / 4)


@BOTH
def test_a_sound_does_not_depend_on_batch_mates_or_padding(config: AudioConfig) -> None:
    """Every length modulo 4, since each leaves another rest at the two strides."""
    encoder = randomize(AudioEncoder(config))
    frames = torch.tensor([31, 9, 22, 16, 1])
    mel = torch.zeros(5, 31, 80)
    for row, size in enumerate(frames.tolist()):
        mel[row, :size] = normal(size, 80, seed=row)
    with torch.no_grad():
        together, mask = encoder(mel, frames)
        louder = mel.clone()
        louder[0] *= 3
        with_another, _ = encoder(louder, frames)
        for row, size in enumerate(frames.tolist()):
            alone, all_real = encoder(mel[row : row + 1, :size], frames[row : row + 1])
            count = alone.shape[1]
            assert mask[row].tolist() == [True] * count + [False] * (mask.shape[1] - count) and bool(all_real.all())
            torch.testing.assert_close(together[row, :count], alone[0], rtol=1e-4, atol=1e-4)
            if row:
                torch.testing.assert_close(together[row, :count], with_another[row, :count], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(together[0], with_another[0], atol=1e-2)


@BOTH
def test_everything_in_the_ears_is_trained(config: AudioConfig) -> None:
    encoder = randomize(AudioEncoder(config)).train()
    features, mask = encoder(normal(2, 20, 80), torch.tensor([20, 13]))
    (features * mask[..., None] * normal(*features.shape)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
