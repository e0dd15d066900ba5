"""Write a random-weight mmproj with the sizes of AutoGLM-Phone-9B's image encoder: 24 layers, about 0.95 GB.

Names, keys and types are those of the community's Q8_0 files: matrices Q8_0; both convolutions, the learned positions
and everything of one dimension F32. Queries and keys are drawn half as large again as the rest, so that a patch looks
at some ten others rather than at all alike: an error in attention then shows in the features.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from glm4_file import QType, random_matrix, write_header

WIDTH, HEADS, MLP, PATCH, POSITIONS, TEXT, MERGER = 1536, 12, 4096, 14, 24, 4096, 13696
NUM_LAYERS = 24

Tensor = tuple[str, np.ndarray, QType]


def _tensors(num_layers: int, rng: np.random.Generator) -> Iterator[Tensor]:
    def matrix(name: str, rows: int, width: int, scale: float = 0.8) -> Tensor:
        return name, random_matrix(QType.Q8_0, rows, width, scale / width**0.5, rng), QType.Q8_0

    def floats(name: str, *shape: int, mean: float = 0.0, std: float = 0.2) -> Tensor:
        return name, (mean + std * rng.standard_normal(shape, np.float32)).astype(np.float32), QType.F32

    for name in ("v.patch_embd.weight", "v.patch_embd.weight.1"):
        yield floats(name, WIDTH, 3, PATCH, PATCH, std=0.6 / (3 * PATCH * PATCH) ** 0.5)
    yield floats("v.patch_embd.bias", WIDTH)
    yield floats("v.norm_embd.weight", WIDTH, mean=1)
    yield floats("v.position_embd.weight", POSITIONS * POSITIONS, WIDTH)
    for layer in range(num_layers):
        prefix = f"v.blk.{layer}."
        yield floats(prefix + "ln1.weight", WIDTH, mean=1)
        looks = matrix("", 2 * WIDTH, WIDTH, 1.5)[1]
        values = matrix("", WIDTH, WIDTH)[1]
        yield prefix + "attn_qkv.weight", np.concatenate([looks, values]), QType.Q8_0
        yield matrix(prefix + "attn_out.weight", WIDTH, WIDTH)
        yield floats(prefix + "ln2.weight", WIDTH, mean=1)
        yield matrix(prefix + "ffn_gate.weight", MLP, WIDTH)
        yield matrix(prefix + "ffn_up.weight", MLP, WIDTH)
        yield matrix(prefix + "ffn_down.weight", WIDTH, MLP)
    yield floats("v.post_ln.weight", WIDTH, mean=1)
    yield floats("mm.patch_merger.weight", TEXT, WIDTH, 2, 2, std=0.8 / (4 * WIDTH) ** 0.5)
    yield floats("mm.patch_merger.bias", TEXT)
    yield matrix("mm.model.fc.weight", TEXT, TEXT)
    yield floats("mm.post_norm.weight", TEXT, mean=1)
    yield floats("mm.post_norm.bias", TEXT)
    yield matrix("mm.gate.weight", MERGER, TEXT)
    yield matrix("mm.up.weight", MERGER, TEXT)
    yield matrix("mm.down.weight", TEXT, MERGER)


def write_tower_file(path: Path, num_layers: int = NUM_LAYERS, seed: int = 0) -> None:
    """Write the mmproj; under another name first, so that an interrupted run leaves nothing half made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "clip")
    writer.add_type("mmproj")
    writer.add_name(f"Random glm4v image encoder, full width, {num_layers} layers")
    writer.add_file_type(7)
    writer.add_string("clip.projector_type", "glm4v")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_silu", True)
    for key, value in {
        "image_size": POSITIONS * PATCH,
        "patch_size": PATCH,
        "embedding_length": WIDTH,
        "block_count": num_layers,
        "attention.head_count": HEADS,
        "feed_forward_length": MERGER,
        "projection_dim": TEXT,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.48145466, 0.4578275, 0.40821073])
    writer.add_array("clip.vision.image_std", [0.26862954, 0.26130258, 0.27577711])
    for name, values, qtype in _tensors(num_layers, np.random.default_rng(seed)):
        writer.add_tensor(name, values, raw_dtype=qtype)
    _finish(writer, partial, path)


def write_vocabulary_file(path: Path) -> None:
    """A glm4 GGUF of keys and tokens alone: all that llama.cpp's encoder asks of the language model beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "glm4")
    write_header(writer)
    _finish(writer, partial, path)


def _finish(writer: gguf.GGUFWriter, partial: Path, path: Path) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


if __name__ == "__main__":
    write_tower_file(Path(sys.argv[1]))
