"""Files that say the same thing another way, as other converters and models write them; and ones that cannot be run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from autoglm.errors import FormatError
from tests.parity.native import NativeModel
from tests.tiny_models import (
    QType,
    Shape,
    StoredTensor,
    Tensors,
    TinyModel,
    uniform_plan,
    write_tiny_model,
)

TOKENS = np.random.default_rng(21).integers(0, 340, 60).tolist()
Rewrite = Callable[[Tensors, torch.nn.Module, gguf.GGUFWriter], None]


def assert_parity(model: TinyModel, bound: float = 1e-3) -> None:
    difference = np.abs(NativeModel(model.path).logits(TOKENS) - model.logits(TOKENS))
    assert difference.max() < bound, f"max {difference.max():.2e}, mean {difference.mean():.2e}"


def fuse_qkv(tensors: Tensors, model: torch.nn.Module, writer: gguf.GGUFWriter) -> None:
    """blk.N.attn_qkv: rows q, k, v."""
    for layer in range(2):
        for part in ("weight", "bias"):
            names = [f"blk.{layer}.attn_{x}.{part}" for x in "qkv"]
            if names[0] in tensors:
                pieces = [tensors.pop(name) for name in names]
                data = np.concatenate([piece.data for piece in pieces])
                tensors[f"blk.{layer}.attn_qkv.{part}"] = StoredTensor(data, pieces[0].qtype)


@pytest.mark.parametrize("qtype", [QType.F32, QType.Q8_0], ids=lambda t: t.name)
@pytest.mark.parametrize("kind", ["glm4", "glm4_mrope", "llama"])
def test_fused_qkv(tmp_path: Path, kind: str, qtype: QType) -> None:
    model = write_tiny_model(tmp_path, kind, plan=uniform_plan(qtype), rewrite=fuse_qkv)
    plain = write_tiny_model(tmp_path, kind, plan=uniform_plan(qtype), label="plain")
    np.testing.assert_array_equal(NativeModel(model.path).logits(TOKENS), NativeModel(plain.path).logits(TOKENS))
    assert_parity(model, 1e-3 if qtype == QType.F32 else 0.1)


def test_glm4_without_biases(tmp_path: Path) -> None:
    def drop(tensors: Tensors, model: torch.nn.Module, writer: gguf.GGUFWriter) -> None:
        for name in [name for name in tensors if name.endswith("bias")]:
            del tensors[name]
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()

    assert_parity(write_tiny_model(tmp_path, "glm4", rewrite=drop))


def test_llama_with_its_own_head(tmp_path: Path) -> None:
    assert_parity(write_tiny_model(tmp_path, "llama", untied=True))


def test_glm4_with_a_tied_head(tmp_path: Path) -> None:
    def tie(tensors: Tensors, model: torch.nn.Module, writer: gguf.GGUFWriter) -> None:
        del tensors["output.weight"]
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)

    assert_parity(write_tiny_model(tmp_path, "glm4", rewrite=tie))


def test_heads_wider_than_the_hidden_size(tmp_path: Path) -> None:
    """attention.key_length 32 with 6 heads over a hidden size of 96: q is twice as wide as x."""
    assert_parity(write_tiny_model(tmp_path, "llama", shape=Shape(96, 160, 6, 2, key_length=32)))


def test_rope_frequency_factors(tmp_path: Path) -> None:
    """rope_freqs.weight (Llama 3.x) divides the angles."""

    def scale(tensors: Tensors, model: torch.nn.Module, writer: gguf.GGUFWriter) -> None:
        factors = np.linspace(1, 8, 8, dtype=np.float32)
        tensors["rope_freqs.weight"] = StoredTensor(factors)
        model.model.rotary_emb.inv_freq.div_(torch.from_numpy(factors))

    model = write_tiny_model(tmp_path, "llama", rewrite=scale)
    assert_parity(model)
    plain = write_tiny_model(tmp_path, "llama", label="plain")
    assert np.abs(model.logits(TOKENS) - plain.logits(TOKENS)).max() > 0.01


def test_prediction_layers_are_left_out(tmp_path: Path) -> None:
    """glm4.nextn_predict_layers: the last blocks predict further tokens and are no part of the decoder."""

    def shorten(tensors: Tensors, model: torch.nn.Module, writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("glm4.nextn_predict_layers", 1)
        tensors["blk.1.nextn.eh_proj.weight"] = StoredTensor(np.zeros((64, 128), np.float32))
        del model.model.layers[1]
        model.model.config.num_hidden_layers = 1

    assert_parity(write_tiny_model(tmp_path, "glm4", rewrite=shorten))


def _drop(tensors: Tensors, model: torch.nn.Module, writer: gguf.GGUFWriter) -> None:
    del tensors["blk.1.attn_k.weight"]


def _widen(tensors: Tensors, model: torch.nn.Module, writer: gguf.GGUFWriter) -> None:
    tensors["blk.1.ffn_norm.weight"] = StoredTensor(np.ones(65, np.float32))


def _add(tensors: Tensors, model: torch.nn.Module, writer: gguf.GGUFWriter) -> None:
    tensors["blk.0.attn_q_norm.weight"] = StoredTensor(np.ones(16, np.float32))


def _scale_rope(tensors: Tensors, model: torch.nn.Module, writer: gguf.GGUFWriter) -> None:
    writer.add_string("glm4.rope.scaling.type", "yarn")


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        (_drop, r"blk\.1\.attn_k\.weight is missing"),
        (_widen, r"blk\.1\.ffn_norm\.weight has shape \[65\], expected \[64\]"),
        (_add, r"blk\.0\.attn_q_norm\.weight"),
        (_scale_rope, "yarn"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(tmp_path: Path, rewrite: Rewrite, message: str) -> None:
    model = write_tiny_model(tmp_path, "glm4", rewrite=rewrite)
    with pytest.raises(FormatError, match=message):
        NativeModel(model.path)
