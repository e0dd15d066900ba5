"""Folded norms change where numbers stand, not what comes out."""

from __future__ import annotations

import torch

from autoglm.train.folding import fold_stem, merge_norms
from autoglm.train.model import AutoGLMPhone
from tests.train.phones import make_phone, some_inputs


def test_folded_stem_sees_the_same() -> None:
    model, inputs = make_phone(), some_inputs()
    norm = model.get_submodule("vision.stem.3.norm")
    assert not torch.allclose(norm.running_mean, torch.zeros(()))  # else nothing would have been folded
    state, config = fold_stem(model.state_dict(), model.config)
    folded = AutoGLMPhone(config).eval()
    folded.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(folded(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    again, same = fold_stem(state, config)
    assert same == config and all(again[name] is value for name, value in state.items())


def test_merged_norms_change_nothing_but_their_place() -> None:
    model, inputs = make_phone(), some_inputs()
    with torch.no_grad():
        before = model(inputs)
        merged = merge_norms(model)
        after = model(inputs)
    # Decoder: 2 a layer and the last; vision: 2 a block and the projector's; audio: 4 a block and the projector's.
    assert merged == (2 * 2 + 1) + (2 * 2 + 1) + (4 * 2 + 1)
    assert bool((model.text.layers[0].input_layernorm.weight == 1).all())
    assert bool((model.vision.blocks[1].norm2.bias == 0).all())
    assert not bool((model.text.layers[0].post_self_attn_layernorm.weight == 1).any())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
