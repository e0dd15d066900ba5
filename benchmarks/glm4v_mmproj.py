"""Write a random-weight mmproj with the layer shapes of GLM-4.1V's image tower, Q8_0, for the file of glm4_file.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from glm4_file import HIDDEN as TEXT
from glm4_file import random_matrix

QType = gguf.GGMLQuantizationType
WIDTH, HEADS, FFN, MERGER, PATCH, SIDE = 1536, 12, 4096, 13696, 14, 336
EPS = 1e-5


def matrices(num_layers: int) -> Iterator[tuple[str, int, int]]:
    """(name, rows, columns) of every quantized matrix."""
    for layer in range(num_layers):
        prefix = f"v.blk.{layer}."
        yield prefix + "attn_qkv.weight", 3 * WIDTH, WIDTH
        yield prefix + "attn_out.weight", WIDTH, WIDTH
        yield prefix + "ffn_gate.weight", FFN, WIDTH
        yield prefix + "ffn_up.weight", FFN, WIDTH
        yield prefix + "ffn_down.weight", WIDTH, FFN
    yield "mm.model.fc.weight", TEXT, TEXT
    yield "mm.gate.weight", MERGER, TEXT
    yield "mm.up.weight", MERGER, TEXT
    yield "mm.down.weight", TEXT, MERGER


def vectors(num_layers: int, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """What the file holds in floats."""

    def normal(*shape: int, std: float) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(std)

    yield "v.patch_embd.weight", normal(WIDTH, 3, PATCH, PATCH, std=0.03)
    yield "v.patch_embd.weight.1", normal(WIDTH, 3, PATCH, PATCH, std=0.03)
    yield "v.patch_embd.bias", normal(WIDTH, std=0.1)
    yield "v.position_embd.weight", normal((SIDE // PATCH) ** 2, WIDTH, std=0.1)
    for name in ("v.norm_embd", "v.post_ln"):
        yield f"{name}.weight", 1 + normal(WIDTH, std=0.1)
    for layer in range(num_layers):
        for name in ("ln1", "ln2"):
            yield f"v.blk.{layer}.{name}.weight", 1 + normal(WIDTH, std=0.1)
    yield "mm.patch_merger.weight", normal(TEXT, WIDTH, 2, 2, std=0.01)
    yield "mm.patch_merger.bias", normal(TEXT, std=0.1)
    yield "mm.post_norm.weight", 1 + normal(TEXT, std=0.1)
    yield "mm.post_norm.bias", normal(TEXT, std=0.1)


def write_glm4v_mmproj(path: Path, num_layers: int, seed: int = 0) -> None:
    """Write it under another name first, so that an interrupted run leaves nothing half made."""
    rng = np.random.default_rng(seed)
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(partial, "clip")
    writer.add_type("mmproj")
    writer.add_name(f"Random GLM-4.1V tower, {num_layers} layers")
    writer.add_file_type(7)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "glm4v")
    writer.add_bool("clip.use_silu", True)
    for key, value in (
        ("projection_dim", TEXT),
        ("image_size", SIDE),
        ("patch_size", PATCH),
        ("embedding_length", WIDTH),
        ("feed_forward_length", MERGER),
        ("block_count", num_layers),
        ("attention.head_count", HEADS),
    ):
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", EPS)
    for name, values in vectors(num_layers, rng):
        writer.add_tensor(name, values)
    for name, rows, columns in matrices(num_layers):
        writer.add_tensor(name, random_matrix(QType.Q8_0, rows, columns, 0.8 / columns**0.5, rng), raw_dtype=QType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


if __name__ == "__main__":
    write_glm4v_mmproj(Path(sys.argv[1]), int(sys.argv[2]))
