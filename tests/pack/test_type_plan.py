"""The plan against the rule of real Q4_K_M files."""

from __future__ import annotations

import pytest

from autoglm.formats.quant_types import GGMLType
from autoglm.pack.type_plan import FileType, community_type, has_more_bits, weight_type

Q4_K, Q5_0, Q6_K = GGMLType.Q4_K, GGMLType.Q5_0, GGMLType.Q6_K
Q8_0, F16, F32 = GGMLType.Q8_0, GGMLType.F16, GGMLType.F32


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


def test_types_of_the_9b() -> None:
    """Every matrix of a 40-layer decoder with a feed-forward width of 13696, as its Q4_K_M file has them."""
    for layer in range(40):
        more = layer in {0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 35, 36, 37, 38, 39}
        expected = {
            ("attn_q", 4096, 4096): Q4_K,
            ("attn_k", 256, 4096): Q4_K,
            ("attn_v", 256, 4096): Q6_K if more else Q4_K,
            ("attn_output", 4096, 4096): Q4_K,
            ("ffn_up", 27392, 4096): Q4_K,
            ("ffn_down", 4096, 13696): Q8_0 if more else Q5_0,
        }
        for (part, *shape), type_ in expected.items():
            name = f"blk.{layer}.{part}.weight"
            assert community_type(name, tuple(shape), FileType.Q4_K_M, 40) == type_, name


@pytest.mark.parametrize(
    ("name", "shape", "file_type", "type_"),
    [
        ("token_embd.weight", (151552, 4096), FileType.Q4_K_M, Q4_K),
        ("output.weight", (151552, 4096), FileType.Q4_K_M, Q6_K),
        ("output.weight", (151552, 4096), FileType.Q8_0, Q8_0),
        ("output_norm.weight", (4096,), FileType.F16, F32),
        ("blk.0.attn_q.bias", (4096,), FileType.Q4_K_M, F32),
        ("blk.0.ffn_down.weight", (64, 80), FileType.Q4_K_M, F16),  # 80 is no whole number of 32 either
        ("blk.0.ffn_down.weight", (64, 80), FileType.Q8_0, F16),
        ("v.patch_embd.weight.1", (1536, 3, 14, 14), FileType.F16, F16),
        ("v.patch_embd.weight", (1536, 3, 14, 14), FileType.Q8_0, F32),
        ("mm.patch_merger.weight", (4096, 1536, 2, 2), FileType.Q8_0, F32),
        ("v.position_embd.weight", (576, 1536), FileType.Q8_0, F32),
        ("v.blk.0.ffn_down.weight", (1536, 4096), FileType.Q8_0, Q8_0),
        ("mm.down.weight", (4096, 13696), FileType.F32, F32),
    ],
)
def test_types_of_shared_files(name: str, shape: tuple[int, ...], file_type: FileType, type_: GGMLType) -> None:
    assert community_type(name, shape, file_type, 40) == type_


def test_a_tied_table_is_typed_as_the_output() -> None:
    assert community_type("token_embd.weight", (512, 256), FileType.Q4_K_M, 40, is_tied=True) == Q6_K
