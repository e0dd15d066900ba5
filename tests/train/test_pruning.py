"""Pruning: what a layer's feed-forward part contributes is measured, not guessed, and what is cut is exactly that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from autoglm.train.dataset import Batch
from autoglm.train.model import AutoGLMPhone, preset
from autoglm.train.model.text import DecoderLayer
from autoglm.train.pruning import ffn_contributions, least_useful_ffn, without_ffn
from autoglm.train.rows import NO_TARGET
from tests.train.phones import make_phone, some_inputs

LAYERS = 3


def make_model() -> AutoGLMPhone:
    config = preset("smoke").with_text(num_layers=LAYERS)
    return make_phone(config)


def pruned_copy(model: AutoGLMPhone, layers: tuple[int, ...]) -> AutoGLMPhone:
    copy = AutoGLMPhone(model.config.with_text(pruned_ffn=layers)).eval()
    copy.load_state_dict(without_ffn(model.state_dict(), layers))
    return copy


def make_batches(model: AutoGLMPhone) -> list[Batch]:
    """Two batches with unequal numbers of targets, which are what the whole model would say: each part is of use."""
    batches = []
    for seed, count in ((3, 2), (4, 5)):
        inputs = some_inputs(seed)
        with torch.no_grad():
            said = model(inputs).argmax(-1)
        targets = torch.full_like(said, NO_TARGET)
        targets[:, -count:] = said[:, -count:]
        batches.append(Batch("typed", inputs, targets, torch.zeros_like(said, dtype=torch.bool)))
    return batches


def mean_loss(model: AutoGLMPhone, batches: list[Batch]) -> float:
    """Of all targets of all batches alike."""
    logits, targets = [], []
    with torch.no_grad():
        for batch in batches:
            wanted = batch.targets != NO_TARGET
            logits.append(model(batch.inputs)[wanted])
            targets.append(batch.targets[wanted])
    return float(F.cross_entropy(torch.cat(logits), torch.cat(targets)))


def test_contribution_is_the_rise_when_the_part_is_really_cut() -> None:
    model = make_model()
    batches = make_batches(model)
    rises = ffn_contributions(model, batches)
    whole = mean_loss(model, batches)
    wanted = [mean_loss(pruned_copy(model, (layer,)), batches) - whole for layer in range(LAYERS)]
    assert rises == pytest.approx(wanted, abs=1e-4)
    assert len({round(rise, 3) for rise in rises}) == LAYERS, "the layers are not alike"
    assert least_useful_ffn(model, batches) == wanted.index(min(wanted))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_part_that_adds_nothing_is_found(layer: int) -> None:
    model = make_model()
    with torch.no_grad():
        block = model.text.layers[layer]
        assert isinstance(block, DecoderLayer)
        block.post_mlp_layernorm.weight.zero_()
    batches = make_batches(model)
    rises = ffn_contributions(model, batches)
    assert rises[layer] == 0.0 and all(rise > 0 for place, rise in enumerate(rises) if place != layer)
    assert least_useful_ffn(model, batches) == layer


def test_measuring_leaves_the_model_whole() -> None:
    model = make_model()
    batches = make_batches(model)
    before = model(batches[0].inputs)
    ffn_contributions(model, batches)
    assert torch.equal(model(batches[0].inputs), before)
    broken = [replace(batches[0], targets=torch.zeros(1, 1, dtype=torch.long))]
    with pytest.raises(IndexError):
        ffn_contributions(model, broken)
    with pytest.raises(StopIteration):
        ffn_contributions(model, OneThenNone(batches[0]))  # type: ignore[arg-type]
    assert all(layer.has_ffn for layer in model.text.layers), "an error in the midst puts the part back"


class OneThenNone:
    """Batches that can be read once; the second reading, with a part left out, fails."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.readings = batch, 0

    def __iter__(self) -> OneThenNone:
        self.readings += 1
        if self.readings > 1:
            raise StopIteration("no more")
        self.left = [self.batch]
        return self

    def __next__(self) -> Batch:
        if not self.left:
            raise StopIteration
        return self.left.pop()


def test_only_the_named_layers_lose_their_tensors() -> None:
    model = make_model()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    left = without_ffn(state, (1,))
    gone = {name.removeprefix("model.text.layers.1.") for name in state if name not in left}
    assert gone == {
        "post_attention_layernorm.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
        "post_mlp_layernorm.weight",
    }
    assert all(left[name] is state[name] for name in left)
    names = {f"text.layers.{layer}.mlp.down_proj.weight": torch.zeros(1) for layer in (1, 11, 21)}
    assert set(without_ffn(names, (1,))) == set(names) - {"text.layers.1.mlp.down_proj.weight"}
    assert without_ffn(state, ()) == state


def test_a_pruned_model_has_no_such_weights_and_refuses_them() -> None:
    model = make_model()
    pruned = pruned_copy(model, (0, 2))
    per_layer = 3 * 256 * 256 + 2 * 256  # gate, up and down of 256 x 256, and the two norms around them
    assert model.num_parameters() - pruned.num_parameters() == 2 * per_layer
    with pytest.raises(RuntimeError, match="mlp.gate_up_proj"):
        pruned.load_state_dict(model.state_dict())
