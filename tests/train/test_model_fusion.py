"""Gated fusion: equal to its docstring's equations in plain NumPy, and blind to what is not there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoglm.train.model import AutoGLMPhone, preset
from autoglm.train.model.fusion import MODALITIES, Fused, GatedCrossModalFusion
from tests.train.random_weights import randomize

Array = NDArray[Any]
Tokens = dict[str, tuple[Tensor, Tensor]]
WIDTH, HEADS = 12, 3
# Tokens of each modality in each row; 0 is absent. Every combination that a turn can be.
ROWS = [
    {"vision": 4, "audio": 3, "text": 5},
    {"vision": 4, "audio": 2, "text": 0},
    {"vision": 4, "audio": 0, "text": 2},
    {"vision": 0, "audio": 3, "text": 1},
    {"vision": 4, "audio": 0, "text": 0},
    {"vision": 0, "audio": 2, "text": 0},
    {"vision": 0, "audio": 0, "text": 4},
]


def make_fusion(seed: int = 0) -> GatedCrossModalFusion:
    fusion = randomize(GatedCrossModalFusion(WIDTH, HEADS), seed=seed, scale=0.4)
    assert isinstance(fusion, GatedCrossModalFusion)
    return fusion


def make_tokens(rows: list[dict[str, int]] = ROWS, *, seed: int = 1) -> Tokens:
    """Padding behind a row's tokens is large: who reads it is caught."""
    generator = torch.Generator().manual_seed(seed)
    tokens: Tokens = {}
    for name in MODALITIES:
        sizes = torch.tensor([row[name] for row in rows])
        mask = torch.arange(5) < sizes[:, None]
        x = torch.randn(len(rows), 5, WIDTH, generator=generator)
        tokens[name] = (torch.where(mask[..., None], x, 50.0), mask)
    return tokens


def fuse(fusion: GatedCrossModalFusion, tokens: Tokens) -> Fused:
    with torch.no_grad():
        return fusion(tokens)  # type: ignore[no-any-return]


def row_of(tokens: Tokens, row: int, *, names: tuple[str, ...] = MODALITIES) -> Tokens:
    """One row alone, without its padding."""
    return {n: (tokens[n][0][row : row + 1][:, tokens[n][1][row]], tokens[n][1][row : row + 1][:, tokens[n][1][row]])
            for n in names}  # fmt: skip


# --- the equations, one token at a time -----------------------------------------------------------------------


def numbers(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def linear(x: Array, module: Any) -> Array:
    return x @ numbers(module.weight).T + numbers(module.bias)


def n(x: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def fused_by_hand(
    fusion: GatedCrossModalFusion, present: dict[str, Array]
) -> tuple[dict[str, Array], dict[str, float]]:
    """Y of vision and audio, and a; `present` holds only the modalities that are there: name -> X [n, d]."""
    e, w, b = numbers(fusion.modality), numbers(fusion.pool_weight), numbers(fusion.pool_bias)
    number = {name: i for i, name in enumerate(MODALITIES) if name in present}
    scores = {name: math.exp(w[i] @ n(present[name]).mean(0) + b[i]) for name, i in number.items()}
    weights = {name: score / sum(scores.values()) for name, score in scores.items()}
    results = {}
    for name in ("vision", "audio"):
        if name not in present:
            continue
        x, block = present[name], getattr(fusion, name)
        others = [n(present[m]) + e[MODALITIES.index(m)] for m in present if m != name]
        if not others:
            results[name] = x
            continue
        o, dim = np.concatenate(others), WIDTH // HEADS
        q, k, v = linear(n(x), block.q), linear(o, block.k), linear(o, block.v)
        attended = np.zeros_like(x)
        for head in range(HEADS):
            at = slice(head * dim, (head + 1) * dim)
            for i in range(len(x)):
                score = np.exp(k[:, at] @ q[i, at] / math.sqrt(dim))
                attended[i, at] = score / score.sum() @ v[:, at]
        c = linear(attended, block.out)
        g = 1 / (1 + np.exp(-linear(np.concatenate([n(x), c], axis=1), block.gate)))
        results[name] = len(present) * weights[name] * (g * x + (1 - g) * c)
    return results, weights


def test_fusion_equals_its_equations_in_every_combination() -> None:
    fusion, tokens = make_fusion(), make_tokens()
    found = fuse(fusion, tokens)
    for row, sizes in enumerate(ROWS):
        present = {name: numbers(tokens[name][0][row, :size]) for name, size in sizes.items() if size}
        wanted, weights = fused_by_hand(fusion, present)
        for name, values in wanted.items():
            np.testing.assert_allclose(getattr(found, name)[row, : sizes[name]].numpy(), values, atol=2e-5)
        for index, name in enumerate(MODALITIES):
            assert float(found.weights[row, index]) == pytest.approx(weights.get(name, 0.0), abs=1e-6)


# --- what must hold whatever the equations are ----------------------------------------------------------------


def test_a_modality_alone_passes_bit_for_bit() -> None:
    fusion, tokens = make_fusion(), make_tokens()
    found = fuse(fusion, tokens)
    for name, row in (("vision", 4), ("audio", 5)):
        mask = tokens[name][1][row]
        assert torch.equal(getattr(found, name)[row][mask], tokens[name][0][row][mask])
        assert torch.equal(found.gates[name][row][mask], torch.ones(int(mask.sum())))
        only = fuse(fusion, row_of(tokens, row, names=(name,)))
        assert torch.equal(getattr(only, name)[0], tokens[name][0][row][mask])
        assert float(only.weights[0, MODALITIES.index(name)]) == 1.0


def test_an_absent_modality_leaves_the_others_as_without_it() -> None:
    """Absent in a row of a batch that has it elsewhere, whatever lies in its padding, and not given at all."""
    fusion, tokens = make_fusion(), make_tokens()
    found = fuse(fusion, tokens)
    noisy = {name: (torch.where(mask[..., None], x, -77.0), mask) for name, (x, mask) in tokens.items()}
    with_noise = fuse(fusion, noisy)
    assert torch.equal(found.weights, with_noise.weights)
    for row, sizes in enumerate(ROWS):
        names = tuple(name for name in MODALITIES if sizes[name])
        alone = fuse(fusion, row_of(tokens, row, names=names))
        torch.testing.assert_close(alone.weights[0], found.weights[row], rtol=1e-6, atol=1e-6)
        for name in names:
            if name == "text":
                continue
            values, size = getattr(found, name)[row], sizes[name]
            assert torch.equal(values[:size], getattr(with_noise, name)[row, :size]), (row, name)
            torch.testing.assert_close(values[:size], getattr(alone, name)[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.gates[name][row, :size], alone.gates[name][0], rtol=1e-5, atol=1e-5)


def test_a_modality_that_is_there_is_read() -> None:
    """The counterpart: one other token changes what the row's other modalities become."""
    fusion, tokens = make_fusion(), make_tokens()
    before = fuse(fusion, tokens)
    for source, target in (("audio", "vision"), ("text", "vision"), ("vision", "audio"), ("text", "audio")):
        x, mask = tokens[source]
        changed = x.clone()
        changed[0, 0] = -changed[0, 0]
        after = fuse(fusion, {**tokens, source: (changed, mask)})
        size = ROWS[0][target]
        moved = (getattr(after, target) - getattr(before, target))[:, :size].abs().amax((1, 2))
        assert float(moved[0]) > 1e-3 and float(moved[1:].max()) == 0.0, (source, target)


def test_weights_and_gates_are_shares() -> None:
    found = fuse(make_fusion(), make_tokens())
    present = torch.tensor([[row[name] > 0 for name in MODALITIES] for row in ROWS])
    torch.testing.assert_close(found.weights.sum(1), torch.ones(len(ROWS)))
    assert torch.equal(found.weights > 0, present)
    for gate in found.gates.values():
        assert gate.shape == (len(ROWS), 5) and bool(((gate >= 0) & (gate <= 1)).all())
    assert float(found.gates["vision"][0, :4].std()) > 0, "each token has its own gate"


def test_a_row_of_nothing_has_no_weights() -> None:
    found = fuse(make_fusion(), make_tokens([{"vision": 0, "audio": 0, "text": 0}]))
    assert torch.equal(found.weights, torch.zeros(1, 3))


def test_the_fusion_of_a_new_model_only_scales() -> None:
    fusion = AutoGLMPhone(preset("smoke")).fusion
    tokens = {name: (torch.randn(2, 5, 256), torch.ones(2, 5, dtype=torch.bool)) for name in MODALITIES}
    found = fuse(fusion, tokens)
    for name in ("vision", "audio"):
        torch.testing.assert_close(getattr(found, name), tokens[name][0] * torch.sigmoid(torch.tensor(2.0)))


def test_fusion_starts_near_identity_and_all_of_it_is_trained() -> None:
    torch.manual_seed(0)
    fusion, tokens = GatedCrossModalFusion(WIDTH, HEADS), make_tokens()
    found = fusion(tokens)
    torch.testing.assert_close(found.weights[0], torch.full((3,), 1 / 3))
    start = found.gates["vision"][0, :4].detach()
    assert float(start.min()) > 0.6, "a bias of +2 keeps most of a token"
    trained = make_fusion().train()
    found = trained(tokens)
    real = {name: tokens[name][1][..., None] for name in ("vision", "audio")}
    loss = sum((getattr(found, name) * mask).pow(2).sum() for name, mask in real.items())
    loss.backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        # A bias of the keys shifts all scores of a query alike, so softmax does not notice it.
        assert name.endswith(".k.bias") or bool((parameter.grad != 0).any()), name
