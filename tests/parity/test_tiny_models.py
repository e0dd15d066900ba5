"""The test models themselves: an oracle that cannot notice a mistake proves nothing."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest

from tests.tiny_models import KINDS, QType, TinyModel, has_more_bits, medium_plan

Make = Callable[..., TinyModel]
TOKENS = np.random.default_rng(7).integers(0, 340, 48).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_file_is_readable_and_complete(tiny_model: Make, kind: str) -> None:
    model = tiny_model(kind)
    reader = gguf.GGUFReader(model.path)
    num_torch = len(dict(model.torch_model.named_parameters()))
    assert len(reader.tensors) == num_torch
    tokens = reader.get_field("tokenizer.ggml.tokens")
    assert tokens is not None and len(tokens.contents()) == 384


def test_permuted_and_plain_rotation_give_the_same_answer(tiny_glm4: TinyModel, tiny_glm4_mrope: TinyModel) -> None:
    """Same seed, same weights: for text, three equal axes are plain RoPE."""
    np.testing.assert_allclose(tiny_glm4.logits(TOKENS), tiny_glm4_mrope.logits(TOKENS), atol=1e-5)


def test_oracle_sees_each_position_axis(tiny_glm4_mrope: TinyModel) -> None:
    """Swapping two axes, or stretching one, must move logits far more than the parity tolerance of 1e-3."""
    positions = np.stack([np.arange(48), np.arange(48) // 4, np.arange(48) % 4]).astype(np.int32)
    base = tiny_glm4_mrope.logits(TOKENS, positions)
    for order in ([1, 0, 2], [0, 2, 1], [2, 1, 0]):
        assert np.abs(tiny_glm4_mrope.logits(TOKENS, positions[order]) - base).max() > 0.02


def test_oracle_sees_token_order(tiny_llama: TinyModel) -> None:
    swapped = [TOKENS[1], TOKENS[0], *TOKENS[2:]]
    assert np.abs(tiny_llama.logits(swapped) - tiny_llama.logits(TOKENS))[-1].max() > 0.005


def test_more_bits_layers_of_forty() -> None:
    expected = {0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 35, 36, 37, 38, 39}
    assert {i for i in range(40) if has_more_bits(i, 40)} == expected


def test_medium_plan_of_the_real_shapes() -> None:
    plan = medium_plan(QType.Q4_K, 40)
    assert plan("output.weight", 4096) == QType.Q6_K
    assert plan("blk.0.attn_v.weight", 4096) == QType.Q6_K
    assert plan("blk.5.attn_v.weight", 4096) == QType.Q4_K
    assert plan("blk.0.ffn_down.weight", 13696) == QType.Q8_0
    assert plan("blk.5.ffn_down.weight", 13696) == QType.Q5_0
    assert medium_plan(QType.Q5_K, 40)("blk.5.ffn_down.weight", 13696) == QType.Q5_1
