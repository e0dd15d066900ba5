"""The type plan, quantized layers that swap in and out without a trace, merged norms, gathered input power."""

from __future__ import annotations

import pytest
import torch

from autoglm.errors import ConfigError
from autoglm.formats.quant_types import GGMLType
from autoglm.pack.type_plan import weight_type
from autoglm.train import quantization as quant
from autoglm.train.grids import dequantize, round_activations
from autoglm.train.model import AutoGLMPhone, preset
from tests.tiny_models import QType, medium_plan
from tests.train.phones import make_phone, some_inputs

Q6_K = GGMLType.Q6_K


@pytest.mark.parametrize("num_layers", [2, 4, 6, 40])
def test_plan_of_the_decoder_is_what_llama_cpp_gives(num_layers: int) -> None:
    """tests/tiny_models.py holds a second copy of the rule, checked against the real files' table."""
    theirs = medium_plan(QType.Q4_K, num_layers)
    parts = {"self_attn.v_proj": "attn_v", "mlp.down_proj": "ffn_down", "self_attn.q_proj": "attn_q"}
    for layer in range(num_layers):
        for ours, part in parts.items():
            found = weight_type(f"text.layers.{layer}.{ours}.weight", (256, 768), num_layers)
            assert int(found) == int(theirs(f"blk.{layer}.{part}.weight", 768))


def test_attached_model_computes_with_what_the_file_will_hold() -> None:
    model, inputs = make_phone(), some_inputs()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quant.attach_qat(model)
    layer = model.get_submodule("text.layers.1.self_attn.v_proj")
    assert isinstance(layer, quant.QuantLinear) and layer.type_ == Q6_K
    grid = layer.grid()
    assert grid is not None
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    packed = dequantize(grid.pack(layer.weight.detach()), Q6_K)
    assert torch.equal(layer.rounded(), packed)
    expected = torch.nn.functional.linear(round_activations(x, 256), packed, layer.bias)
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        whole = model(inputs)
        quant.set_activation_rounding(model, False)
        assert not torch.equal(model(inputs), whole)
        unrounded = model(inputs)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]), name
        quant.detach_qat(model)
        assert torch.equal(model(inputs), unrounded)
    assert set(model.state_dict()) == set(make_phone().state_dict())
    assert not any(isinstance(m, quant.QuantLinear | quant.QuantEmbedding) for m in model.modules())


def test_gradients_reach_every_weight_through_the_grids() -> None:
    model = quant.attach_qat(make_phone(), "fast")
    model(some_inputs()).square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    # A key's bias moves all scores of a row alike, so softmax has no use for it.
    assert [name for name in missing if not name.endswith(("k.bias", "k_proj.bias"))] == []


def test_grids_are_part_of_the_checkpoint_and_stand_still() -> None:
    model = quant.attach_qat(make_phone())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.01)
    state = model.state_dict()
    other = quant.attach_qat(AutoGLMPhone(preset("smoke")).eval(), "fast")
    other.load_state_dict(state)
    inputs = some_inputs()
    with torch.no_grad():
        assert torch.equal(other(inputs), model(inputs))
        before = model(inputs)
        quant.refit(model)
        assert not torch.equal(model(inputs), before)
    with pytest.raises(ConfigError, match="attached already"):
        quant.attach_qat(model)


def test_input_power_is_the_mean_square_of_what_a_layer_read() -> None:
    model, inputs = make_phone(), some_inputs()
    seen: list[torch.Tensor] = []
    layer = model.get_submodule("text.layers.1.mlp.down_proj")
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 256)))
    with torch.no_grad(), quant.input_power(model) as means:
        model(inputs)
        model(inputs)
    handle.remove()
    torch.testing.assert_close(means["text.layers.1.mlp.down_proj"], torch.cat(seen).pow(2).mean(0))
    plain = quant.attach_qat(make_phone()).get_submodule("text.layers.1.mlp.down_proj")
    weighed = quant.attach_qat(make_phone(), importance=means).get_submodule("text.layers.1.mlp.down_proj")
    power = means["text.layers.1.mlp.down_proj"]

    def error(m: torch.nn.Module) -> float:
        assert isinstance(m, quant.QuantLinear)
        return float(((m.rounded() - m.weight).detach().pow(2) * power).sum())

    assert error(weighed) < error(plain)
