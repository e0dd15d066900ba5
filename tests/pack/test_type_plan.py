"""The plan against the rule of real Q4_K_M files."""

from __future__ import annotations

import pytest

from autoglm.formats.quant_types import GGMLType
from autoglm.pack.type_plan import has_more_bits, weight_type

Q4_K, Q6_K, Q8_0, F16, F32 = GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.F16, GGMLType.F32


def test_more_bits_layers() -> None:
    expected = {0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 35, 36, 37, 38, 39}
    assert {layer for layer in range(40) if has_more_bits(layer, 40)} == expected
    assert {layer for layer in range(4) if has_more_bits(layer, 4)} == {2, 3}


@pytest.mark.parametrize(
    ("name", "shape", "type_"),
    [
        ("text.embed_tokens.weight", (2048, 256), Q4_K),
        ("text.lm_head.weight", (2048, 256), Q6_K),
        ("text.layers.1.self_attn.v_proj.weight", (128, 256), Q4_K),
        ("text.layers.2.self_attn.v_proj.weight", (128, 256), Q6_K),
        ("text.layers.3.mlp.down_proj.weight", (256, 768), Q6_K),
        ("text.layers.3.mlp.gate_up_proj.weight", (1536, 256), Q4_K),
        ("text.layers.0.mlp.down_proj.weight", (256, 13696), Q8_0),  # 13696 is no whole number of 256
        ("text.layers.0.self_attn.q_proj.bias", (256,), F32),
        ("text.norm.weight", (256,), F32),
        ("vision.patch_embed.weight", (192, 768), F16),
        ("vision.position_embedding", (420, 192), F32),
        ("vision.blocks.0.attn_qkv.weight", (576, 192), Q8_0),
        ("audio.blocks.0.attn.q.weight", (144, 144), F16),  # nor is 144 one of 32
        ("audio.blocks.0.conv.depthwise.weight", (160, 1, 15), F32),
        ("audio.subsample.conv2.weight", (32, 32, 3, 3), F32),
        ("fusion.audio.gate.weight", (256, 512), Q8_0),
        ("fusion.modality", (3, 256), F32),
    ],
)
def test_types(name: str, shape: tuple[int, ...], type_: GGMLType) -> None:
    assert weight_type(name, shape, 4) == type_
