"""The text part of a tiny GLM-4.1V written by the community's converter, against transformers.

Fixture: main-f32.gguf is the converter's output, text.safetensors the language model's tensors of the checkpoint
it was made from, image_prompt.npz token ids and the three position axes of a prompt with a picture in it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Glm4vTextConfig

from tests.parity.native import NativeModel
from tests.tiny_models import Glm4vText, rounded_cache

FIXTURE = Path(__file__).parent.parent / "fixtures" / "glm4v-tiny"
PROMPT = [302, 304, 306, 198, 33, 68, 260, 81, 72, 68, 69, 13, 307, 198, 263, 264, 292, 287]


@pytest.fixture(scope="module")
def oracle() -> Glm4vText:
    model = Glm4vText(Glm4vTextConfig(**json.loads((FIXTURE / "text_config.json").read_text()))).float().eval()
    tensors = load_file(FIXTURE / "text.safetensors")
    model.load_state_dict({name.replace("model.language_model.", "model."): t for name, t in tensors.items()})
    return model


def oracle_logits(
    oracle: Glm4vText, ids: list[int], positions: np.ndarray, cache_type: str | None = None
) -> np.ndarray:
    with torch.no_grad(), rounded_cache(oracle.model, cache_type):
        where = torch.from_numpy(positions).long()[:, None]
        hidden = oracle.model(input_ids=torch.tensor([ids]), position_ids=where, use_cache=False).last_hidden_state
        return oracle.lm_head(hidden)[0].numpy()


@pytest.fixture(scope="module")
def native() -> NativeModel:
    return NativeModel(FIXTURE / "main-f32.gguf", num_blocks=32)


def text_positions(length: int) -> np.ndarray:
    return np.tile(np.arange(length, dtype=np.int32), (3, 1))


def test_header_is_read_as_mrope(native: NativeModel) -> None:
    config = native.runner.model_config
    assert config.mrope_section == (1, 1, 2) and not config.rope_interleaved
    assert (config.rotary_dim, config.head_dim, config.vocab_size) == (8, 16, 384)


def assert_logits(native: NativeModel, oracle: Glm4vText, ids: list[int], positions: np.ndarray) -> None:
    """0.15-wide matrices make this model's attention sharp: an f16 KV cache alone moves a logit by 3e-3. So two
    bounds: that against plain float32, and 1e-4 against float32 with keys and values rounded to f16."""
    ours = native.logits(ids, positions=positions)
    difference = np.abs(ours - oracle_logits(oracle, ids, positions))
    assert difference.max() < 5e-3 and difference.mean() < 1e-3, f"{difference.max():.2e} {difference.mean():.2e}"
    rounded = np.abs(ours - oracle_logits(oracle, ids, positions, "f16"))
    assert rounded.max() < 1e-4, f"{rounded.max():.2e}"


def test_text_logits(native: NativeModel, oracle: Glm4vText) -> None:
    assert_logits(native, oracle, PROMPT, text_positions(len(PROMPT)))


def test_greedy_tokens(native: NativeModel, oracle: Glm4vText) -> None:
    ids = list(PROMPT)
    for _ in range(24):
        ids.append(int(oracle_logits(oracle, ids, text_positions(len(ids)))[-1].argmax()))
    assert native.greedy(PROMPT, 24) == ids[len(PROMPT) :]


def test_picture_positions(native: NativeModel, oracle: Glm4vText) -> None:
    """The token ids of a picture prompt at their real (t, h, w) positions, placeholders left as plain tokens."""
    prompt = np.load(FIXTURE / "image_prompt.npz")
    ids, positions = prompt["ids"].tolist(), prompt["positions"]
    assert (positions[1] != positions[2]).any()
    assert_logits(native, oracle, ids, positions)
