"""Native logits against transformers in float32, on the weights as the file holds them.

Metrics, each over 200 random tokens and the whole vocabulary:
    difference   max |ours - theirs|
    cosine       the lowest over positions, between the two logit rows
    noise        what int8 activations alone do: max |theirs with every linear input rounded to int8 - theirs|,
                 computed in torch, so it owes nothing to our kernels
    rounded      theirs with keys and values rounded to the cache's type: what is left against it is our arithmetic
Where theirs leads by more than twice the noise, ours must choose the same token.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from autoglm.config import EngineConfig
from tests.kernels.conftest import ISAS, make_runtime
from tests.parity.native import NativeModel
from tests.tiny_models import (
    K_TYPES,
    KINDS,
    SIMPLE_TYPES,
    WIDE,
    QType,
    TinyModel,
    medium_plan,
    uniform_plan,
)

Make = Callable[..., TinyModel]
TOKENS = np.random.default_rng(11).integers(0, 340, 200).tolist()
FLOAT_TYPES = (QType.F32, QType.F16, QType.BF16)
kinds = pytest.mark.parametrize("kind", KINDS)


def make(tiny_model: Make, kind: str, label: str) -> TinyModel:
    """A tiny model whose matrices all have one type, or a Q4_K_M / Q5_K_M mix with its fallback types."""
    if label in ("Q4_K_M", "Q5_K_M"):
        plan = medium_plan(QType[label[:4]], WIDE.num_hidden_layers)
        return tiny_model(kind, label=label, shape=WIDE, plan=plan)
    qtype = QType[label]
    return tiny_model(kind, label=label, shape=WIDE if qtype in K_TYPES else None, plan=uniform_plan(qtype))


def lowest_cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def assert_same_choice(ours: np.ndarray, theirs: np.ndarray, noise: float) -> None:
    ranked = np.sort(theirs, axis=1)
    sure = ranked[:, -1] - ranked[:, -2] > 2 * noise
    assert sure.mean() > 0.2, f"only {sure.mean():.0%} of positions can be judged: the test proves nothing"
    wrong = np.flatnonzero(sure & (ours.argmax(1) != theirs.argmax(1)))
    assert not len(wrong), f"another token at positions {wrong[:8].tolist()} of {len(theirs)}"


@kinds
@pytest.mark.parametrize("label", [t.name for t in FLOAT_TYPES])
def test_float_weights(tiny_model: Make, kind: str, label: str) -> None:
    model = make(tiny_model, kind, label)
    ours, theirs = NativeModel(model.path).logits(TOKENS), model.logits(TOKENS)
    difference = np.abs(ours - theirs)
    assert difference.max() < 1e-3, f"max {difference.max():.2e}, mean {difference.mean():.2e}"
    assert_same_choice(ours, theirs, float(difference.max()))
    rounded = np.abs(ours - model.logits(TOKENS, cache_type="f16"))
    assert rounded.max() < 1e-4, f"max {rounded.max():.2e}, mean {rounded.mean():.2e}"


@kinds
@pytest.mark.parametrize(
    "label", [t.name for t in (*SIMPLE_TYPES, *K_TYPES) if t not in FLOAT_TYPES] + ["Q4_K_M", "Q5_K_M"]
)
def test_quantized_weights(tiny_model: Make, kind: str, label: str) -> None:
    model = make(tiny_model, kind, label)
    ours, theirs = NativeModel(model.path).logits(TOKENS), model.logits(TOKENS)
    rounded = model.logits(TOKENS, activation_block=256 if "_K" in label else 32)
    noise = float(np.abs(rounded - theirs).max())
    assert lowest_cosine(ours, theirs) > 0.999
    assert np.abs(ours - theirs).max() < 2 * noise
    assert_same_choice(ours, theirs, noise)


@kinds
@pytest.mark.parametrize("cache_type", ["f16", "i16", "q8_0"])
def test_chunks_decode_and_batch_give_the_same_bits(tiny_model: Make, kind: str, cache_type: str) -> None:
    model = make(tiny_model, kind, "Q4_K_M")
    native = NativeModel(model.path, cache_type=cache_type)
    whole = native.logits(TOKENS[:100])
    for chunk in (16, 33, 1):
        np.testing.assert_array_equal(native.logits(TOKENS[:100], chunk=chunk), whole, err_msg=f"chunk {chunk}")
    np.testing.assert_array_equal(native.logits(TOKENS[:100], first_block=60), whole)
    # Among 32 others of several lengths, in scattered blocks, half of them mid-way.
    rng = np.random.default_rng(12)
    blocks = rng.permutation(160)
    mine, blocks = blocks[:7], blocks[7:]
    pieces = [(TOKENS[:100], 0, mine)]
    for i in range(32):
        count = int(rng.integers(1, 13))
        ids = rng.integers(0, 340, count).tolist()
        if i % 2:
            native.step([(rng.integers(0, 340, 16).tolist(), 0, blocks[2 * i : 2 * i + 2])])
        pieces.append((ids, 16 * (i % 2), blocks[2 * i : 2 * i + 2]))
    order = rng.permutation(len(pieces))
    results = native.step([pieces[i] for i in order])
    np.testing.assert_array_equal(results[int(np.flatnonzero(order == 0)[0])], whole)


@kinds
def test_whole_number_cache(tiny_model: Make, kind: str) -> None:
    """The default type keeps the bounds of f16, and is nearer to float32 than f16 is."""
    model = make(tiny_model, kind, "F32")
    theirs = model.logits(TOKENS)
    ours = NativeModel(model.path, cache_type=EngineConfig().cache_type_k).logits(TOKENS)
    difference, half = np.abs(ours - theirs), np.abs(NativeModel(model.path, cache_type="f16").logits(TOKENS) - theirs)
    assert difference.max() < min(1e-3, half.max()) and difference.mean() < half.mean()
    assert_same_choice(ours, theirs, float(difference.max()))
    rounded = np.abs(ours - model.logits(TOKENS, cache_type="i16"))
    assert rounded.max() < 2e-4 and rounded.mean() < 2e-5, f"max {rounded.max():.2e}, mean {rounded.mean():.2e}"


@kinds
def test_int8_cache(tiny_model: Make, kind: str) -> None:
    """q8_0 rounds keys and values to one part in 127 of the largest of a group: about ten times f16's error here.
    Against an oracle that rounds them alike, what is left is one code that fell the other way."""
    model = make(tiny_model, kind, "F32")
    ours, theirs = NativeModel(model.path, cache_type="q8_0").logits(TOKENS), model.logits(TOKENS)
    assert np.abs(ours - theirs).max() < 0.02
    assert lowest_cosine(ours, theirs) > 0.9995
    rounded = np.abs(ours - model.logits(TOKENS, cache_type="q8_0"))
    assert rounded.max() < 2e-3 and rounded.mean() < 1e-4, f"max {rounded.max():.2e}, mean {rounded.mean():.2e}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("label", ["F32", "Q4_K_M", "Q4_1"])
def test_every_instruction_set(tiny_model: Make, isa: str, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_runtime(isa, 1)  # skips where this machine lacks it
    monkeypatch.setenv("AUTOGLM_ISA", isa)
    model = make(tiny_model, "glm4_mrope", label)
    native = NativeModel(model.path)
    assert native.runner.runtime.isa.replace("-", "").startswith(isa)
    ours, theirs = native.logits(TOKENS[:64]), model.logits(TOKENS[:64])
    assert np.abs(ours - theirs).max() < (1e-3 if label == "F32" else 0.1)
    assert lowest_cosine(ours, theirs) > 0.999


def test_three_position_axes(tiny_model: Make) -> None:
    """Positions as a picture gives them: rows and columns that differ from the token's index."""
    model = make(tiny_model, "glm4_mrope", "F32")
    index = np.arange(60)
    positions = np.stack([np.minimum(index, 10), index // 6 + 10, index % 6 + 10]).astype(np.int32)
    ours = NativeModel(model.path).logits(TOKENS[:60], positions=positions)
    theirs = model.logits(TOKENS[:60], positions)
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(ours - model.logits(TOKENS[:60])).max() > 0.02


@kinds
def test_greedy_tokens(tiny_model: Make, kind: str) -> None:
    """Decoding from the cache, 24 tokens, against transformers recomputing every prefix."""
    model = make(tiny_model, kind, "F32")
    assert NativeModel(model.path).greedy(TOKENS[:20], 24) == model.greedy(TOKENS[:20], 24)


@pytest.mark.parametrize("label", ["F32", "Q4_K_M"])
def test_thread_count_changes_nothing(tiny_model: Make, label: str) -> None:
    """Attention is cut into more pieces for more threads; the bits stay. Whole prefill and single decode steps."""
    model = make(tiny_model, "glm4_mrope", label)
    whole = [NativeModel(model.path, num_threads=n) for n in (1, 2, 5)]
    results = [np.concatenate([m.logits(TOKENS[:40]), m.logits(TOKENS[:40], chunk=1)]) for m in whole]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
