"""Layers without a feed-forward part: skipped by the engine, exactly as if their matrices were zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from autoglm.chat.tokenizer import Tokenizer
from autoglm.config import EngineConfig
from autoglm.engine.engine import Engine
from autoglm.engine.model_runner import CpuModelRunner
from autoglm.errors import FormatError
from autoglm.formats.gguf import GGUFFile
from tests.engine.harness import make_sequence, serve
from tests.parity.native import NativeModel
from tests.tiny_models import (
    KINDS,
    WIDE,
    QType,
    Shape,
    StoredTensor,
    Tensors,
    TinyModel,
    medium_plan,
    uniform_plan,
    write_tiny_model,
)

TOKENS = np.random.default_rng(31).integers(0, 340, 60).tolist()
FOUR_LAYERS = Shape(64, 96, 4, 2, num_hidden_layers=4)
Rewrite = Callable[[Tensors, torch.nn.Module, gguf.GGUFWriter], None]


def silence(model: torch.nn.Module, layers: tuple[int, ...]) -> None:
    """The oracle: a down projection of zeros makes the whole branch zero."""
    for layer in layers:
        model.model.layers[layer].mlp.down_proj.weight.zero_()


def leave_out(*layers: int) -> Rewrite:
    def rewrite(tensors: Tensors, model: torch.nn.Module, writer: gguf.GGUFWriter) -> None:
        for name in list(tensors):
            if any(name.startswith((f"blk.{n}.ffn_", f"blk.{n}.post_ffw_norm")) for n in layers):
                del tensors[name]
        writer.add_array("autoglm.pruned_ffn_layers", list(layers))
        silence(model, layers)

    return rewrite


def zeros(*layers: int) -> Rewrite:
    def rewrite(tensors: Tensors, model: torch.nn.Module, writer: gguf.GGUFWriter) -> None:
        for layer in layers:
            down = tensors[f"blk.{layer}.ffn_down.weight"]
            tensors[f"blk.{layer}.ffn_down.weight"] = StoredTensor(np.zeros_like(down.data), down.qtype)
        silence(model, layers)

    return rewrite


@pytest.mark.parametrize("layers", [(0,), (3,), (1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_layers(tmp_path: Path, kind: str, layers: tuple[int, ...]) -> None:
    shape = Shape(96, 160, 6, 2, num_hidden_layers=4) if kind == "llama" else FOUR_LAYERS
    model = write_tiny_model(tmp_path, kind, shape=shape, rewrite=leave_out(*layers))
    ours, theirs = NativeModel(model.path).logits(TOKENS), model.logits(TOKENS)
    difference = np.abs(ours - theirs)
    assert difference.max() < 1e-3, f"max {difference.max():.2e}, mean {difference.mean():.2e}"
    whole = write_tiny_model(tmp_path, kind, shape=shape, label="whole")
    assert np.abs(whole.logits(TOKENS) - theirs).max() > 0.05  # the branch had something to say


@pytest.mark.parametrize("plan", ["F32", "Q4_K_M"])
def test_left_out_is_the_same_as_zero(tmp_path: Path, plan: str) -> None:
    """What other tools make of the compatibility export is what our engine makes of the short file, to the bit."""
    types = uniform_plan(QType.F32) if plan == "F32" else medium_plan(QType.Q4_K, 4)
    short = write_tiny_model(tmp_path, "glm4_mrope", shape=WIDE, plan=types, rewrite=leave_out(1, 3))
    filled = write_tiny_model(tmp_path, "glm4_mrope", shape=WIDE, plan=types, label="zero", rewrite=zeros(1, 3))
    np.testing.assert_array_equal(NativeModel(short.path).logits(TOKENS), NativeModel(filled.path).logits(TOKENS))


def test_the_engine_generates_with_pruned_layers(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path, "glm4_mrope", shape=FOUR_LAYERS, rewrite=leave_out(0, 2))
    file = GGUFFile.open(model.path)
    config = EngineConfig(num_kv_blocks=32, num_threads=1)
    engine = Engine(CpuModelRunner(file, config), Tokenizer.from_gguf(file), config)
    answer = serve(engine, [make_sequence("one", TOKENS[:20], max_tokens=12)])["one"]
    assert answer.token_ids == model.greedy(TOKENS[:20], 12)


def misuse(change: Callable[[Tensors, gguf.GGUFWriter], None]) -> Rewrite:
    return lambda tensors, model, writer: change(tensors, writer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, w: w.add_array("autoglm.pruned_ffn_layers", [2]), r"layers 0 to 1, each once"),
        (lambda t, w: w.add_array("autoglm.pruned_ffn_layers", [1, 1]), r"each once"),
        (lambda t, w: w.add_array("autoglm.pruned_ffn_layers", ["1"]), r"must hold layer numbers"),
        (lambda t, w: w.add_array("autoglm.pruned_ffn_layers", [1]), r"no known part of the model.*blk\.1\.ffn_down"),
        (lambda t, w: t.pop("blk.1.ffn_up.weight"), r"blk\.1\.ffn_up\.weight is missing"),
        (lambda t, w: w.add_string("autoglm.attention_mode", "turn"), r"'turn' is not supported.*causal and media"),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path, change: Callable[[Tensors, gguf.GGUFWriter], None], message: str
) -> None:
    model: TinyModel = write_tiny_model(tmp_path, "glm4", rewrite=misuse(change))
    with pytest.raises(FormatError, match=message):
        NativeModel(model.path)
