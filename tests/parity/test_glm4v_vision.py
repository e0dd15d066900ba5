"""The image encoder of a tiny GLM-4.1V written by the community's converter, against transformers.

Fixture: mmproj-*.gguf is the converter's output; vision.npz holds the patches of a 140 x 112 picture (one frame), its
grid (8 x 10, while positions were learned for 6 x 6) and the tokens transformers made of them in float32.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from autoglm.formats.gguf import GGUFFile
from autoglm.kernels import Matrix, Runtime
from autoglm.model.encoder import finish
from autoglm.model.glm4v_vision import Glm4vVision, read_glm4v_config
from autoglm.model.loader import WeightReader

FIXTURE = Path(__file__).parent.parent / "fixtures" / "glm4v-tiny"


def load(name: str) -> Glm4vVision:
    gguf = GGUFFile.open(FIXTURE / name)
    runtime = Runtime(2)
    reader = WeightReader(gguf, runtime)
    encoder = Glm4vVision(runtime, reader, read_glm4v_config(gguf))
    reader.finish()
    return encoder


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURE / "vision.npz"))


@pytest.mark.parametrize(("name", "bound"), [("mmproj-f32.gguf", 1e-4), ("mmproj-q8_0.gguf", 0.08)])
def test_tokens_equal_transformers(name: str, bound: float, expected: dict[str, np.ndarray]) -> None:
    """Relative to the largest token value; Q8_0 rounds weights and activations to 8 bits in every product."""
    rows, columns = expected["grid"].tolist()
    tokens = finish(load(name).encode(lambda: expected["pixel_values"], rows, columns))
    assert tokens.shape == expected["tokens"].shape == (rows * columns // 4, 64)
    assert np.abs(tokens - expected["tokens"]).max() < bound * np.abs(expected["tokens"]).max()


class Rewriting(WeightReader):
    """Gives matrices as if the file held them in another type, or that type's values in floats."""

    def __init__(self, gguf: GGUFFile, runtime: Runtime, weight_type: GGMLQuantizationType, floats: bool) -> None:
        super().__init__(gguf, runtime)
        self._type, self._floats = weight_type, floats

    def split_matrix(self, name: str, rows: list[int], cols: int) -> list[Matrix]:
        values = self.array(name, (sum(rows), cols))
        packed = quants.quantize(values, self._type)
        if self._floats:
            packed = quants.dequantize(packed, self._type)
        type_id = 0 if self._floats else int(self._type)
        parts = np.split(packed, np.cumsum(rows)[:-1])
        return [
            Matrix.pack(self.runtime, np.ascontiguousarray(part).reshape(-1).view(np.uint8), type_id, count, cols)
            for part, count in zip(parts, rows, strict=True)
        ]


@pytest.mark.parametrize("weight_type", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_matrices_of_every_type_give_what_their_values_give(weight_type: str, expected: dict[str, np.ndarray]) -> None:
    """K-quants come in spans of 256, wider than this tiny encoder; their products are the text engine's."""
    runtime, rows, columns = Runtime(2), *expected["grid"].tolist()
    tokens = []
    for floats in (False, True):
        file = GGUFFile.open(FIXTURE / "mmproj-f32.gguf")
        reader = Rewriting(file, runtime, GGMLQuantizationType[weight_type], floats)
        encoder = Glm4vVision(runtime, reader, read_glm4v_config(file))
        tokens.append(finish(encoder.encode(lambda: expected["pixel_values"], rows, columns)))
    bound = 1e-4 if weight_type in ("F16", "BF16") else 0.08
    assert np.abs(tokens[0] - tokens[1]).max() < bound * np.abs(tokens[1]).max()


def test_slices_change_nothing_but_when(expected: dict[str, np.ndarray]) -> None:
    encoder = load("mmproj-q8_0.gguf")
    rows, columns = expected["grid"].tolist()
    whole = finish(encoder.encode(lambda: expected["pixel_values"], rows, columns, math.inf))
    sliced, pauses = encoder.encode(lambda: expected["pixel_values"], rows, columns, 0.0), 0
    while True:
        try:
            next(sliced)
            pauses += 1
        except StopIteration as end:
            assert np.array_equal(end.value, whole)
            break
    assert pauses > 10
