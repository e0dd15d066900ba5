"""Write a random-weight GGUF with the layer shapes of the 9B glm4: eight layers, about 1.9 GB.

Blocks are drawn directly in their packed form (random codes, scales that keep the activations finite), so the
file takes seconds, not minutes. Types follow Q4_K_M's rule for an eight-layer file: more-bits layers are
0, 3, 6 and 7, half of them, as it is half of the real forty. The tokenizer has the real size: the 256 bytes,
merges of two and three of them, the GLM-4 specials, padding.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

QType = gguf.GGMLQuantizationType

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 13696, 32, 2, 128, 151552
NUM_LAYERS = 8
NUM_BPE_TOKENS = 151329
FIRST_SPECIALS = (
    "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> "
    "<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> <|image|> <|video|> "
    "<think> </think> <answer> </answer>"
).split()
CHUNK_ROWS = 4096  # rows drawn at once


@dataclass(frozen=True)
class Matrix:
    name: str
    rows: int
    width: int
    qtype: QType


def has_more_bits(layer: int, num_layers: int = NUM_LAYERS) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def matrices() -> Iterator[Matrix]:
    """Every matrix of the file with its type."""
    yield Matrix("token_embd.weight", VOCAB, HIDDEN, QType.Q4_K)
    for layer in range(NUM_LAYERS):
        more = has_more_bits(layer)
        prefix = f"blk.{layer}."
        yield Matrix(prefix + "attn_q.weight", HIDDEN, HIDDEN, QType.Q4_K)
        yield Matrix(prefix + "attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN, QType.Q4_K)
        yield Matrix(prefix + "attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN, QType.Q6_K if more else QType.Q4_K)
        yield Matrix(prefix + "attn_output.weight", HIDDEN, HIDDEN, QType.Q4_K)
        yield Matrix(prefix + "ffn_up.weight", 2 * FFN, HIDDEN, QType.Q4_K)
        yield Matrix(prefix + "ffn_down.weight", HIDDEN, FFN, QType.Q8_0 if more else QType.Q5_0)
    yield Matrix("output.weight", VOCAB, HIDDEN, QType.Q6_K)


def random_blocks(qtype: QType, num_blocks: int, std: float, rng: np.random.Generator) -> np.ndarray:
    """u8 [num_blocks, block bytes]: zero-mean weights of about the wanted standard deviation."""
    elements, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    data = np.frombuffer(rng.bytes(num_blocks * block_bytes), np.uint8).reshape(num_blocks, block_bytes).copy()
    spread = rng.uniform(0.8, 1.2, num_blocks)

    def put_half(offset: int, values: np.ndarray) -> None:
        data[:, offset : offset + 2] = values.astype("<f2").view(np.uint8).reshape(num_blocks, 2)

    if qtype in (QType.Q4_0, QType.Q4_1, QType.Q5_0, QType.Q5_1, QType.Q8_0):
        levels = {QType.Q4_0: 16, QType.Q4_1: 16, QType.Q5_0: 32, QType.Q5_1: 32, QType.Q8_0: 256}[qtype]
        d = (std * spread * np.sqrt(12) / levels).astype(np.float16).astype(np.float64)
        put_half(0, d)
        if qtype in (QType.Q4_1, QType.Q5_1):
            put_half(2, -d * (levels - 1) / 2)
    elif qtype in (QType.Q4_K, QType.Q5_K):
        levels = 16 if qtype == QType.Q4_K else 32
        d = (std * spread * np.sqrt(12) / levels / 48).astype(np.float16).astype(np.float64)
        put_half(0, d)
        put_half(2, d * (levels - 1) / 2)
        scales = rng.integers(33, 64, (num_blocks, 8), np.uint8)  # minimum = scale: every group is centred
        low = (scales[:, :4] & 63) | ((scales[:, 4:] >> 4) << 6)
        data[:, 4:8], data[:, 8:12] = low, low
        data[:, 12:16] = (scales[:, 4:] & 15) | ((scales[:, 4:] & 15) << 4)
    elif qtype == QType.Q6_K:
        d = std * spread * np.sqrt(12) / 64 / 96
        put_half(208, d)
        scales = rng.integers(64, 128, (num_blocks, 16)) * rng.choice([-1, 1], (num_blocks, 16))
        data[:, 192:208] = scales.astype(np.int8).view(np.uint8)
    else:
        raise ValueError(f"no random blocks for {qtype.name}")
    return data


def random_matrix(qtype: QType, rows: int, width: int, std: float, rng: np.random.Generator) -> np.ndarray:
    """u8 [rows, row bytes] of any supported type."""
    if qtype in (QType.F32, QType.F16, QType.BF16):
        values = rng.standard_normal((rows, width), np.float32) * np.float32(std)
        return np.ascontiguousarray(gguf.quants.quantize(values, qtype)).view(np.uint8).reshape(rows, -1)
    elements = gguf.GGML_QUANT_SIZES[qtype][0]
    return random_blocks(qtype, rows * width // elements, std, rng).reshape(rows, -1)


def byte_symbols() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges of the real sizes."""
    symbols = byte_symbols()
    pairs = [(a, b) for a in symbols for b in symbols]
    merges = [f"{a} {b}" for a, b in pairs]
    tokens = symbols + [a + b for a, b in pairs]
    for a, b in pairs:
        for c in symbols[:2]:
            if len(tokens) < NUM_BPE_TOKENS:
                merges.append(f"{a + b} {c}")
                tokens.append(a + b + c)
    types = [1] * len(tokens)
    tokens += FIRST_SPECIALS
    types += [4 if token in ("<think>", "</think>", "<answer>") else 3 for token in FIRST_SPECIALS]
    padding = [f"[PAD{i}]" for i in range(len(tokens), VOCAB)]
    return tokens + padding, types + [5] * len(padding), merges


def write_header(writer: gguf.GGUFWriter) -> None:
    """Every key of the file, the tokenizer's among them."""
    writer.add_name("Random glm4, 9B layer shapes, 8 layers")
    writer.add_block_count(NUM_LAYERS)
    writer.add_context_length(65536)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM // 2)
    writer.add_array("glm4.rope.dimension_sections", [8, 12, 12, 0])
    writer.add_file_type(15)
    tokens, types, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("glm4")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for key, token in (("eos", "<|endoftext|>"), ("eot", "<|user|>"), ("unknown", "<|endoftext|>")):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", tokens.index(token))
    writer.add_chat_template(
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>\n"
    )


def _vectors(rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    def norm() -> np.ndarray:
        return (1 + rng.normal(0, 0.2, HIDDEN)).astype(np.float32)

    yield "output_norm.weight", norm()
    for layer in range(NUM_LAYERS):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            yield f"blk.{layer}.{name}.weight", norm()
        for name, width in (("attn_q", HIDDEN), ("attn_k", KV_HEADS * HEAD_DIM), ("attn_v", KV_HEADS * HEAD_DIM)):
            yield f"blk.{layer}.{name}.bias", rng.normal(0, 0.2, width).astype(np.float32)


def write_glm4_file(path: Path, seed: int = 0) -> None:
    """Write the whole file under another name first, so that an interrupted run leaves nothing half made."""
    rng = np.random.default_rng(seed)
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(partial, "glm4")
    write_header(writer)
    vectors = list(_vectors(rng))
    for name, values in vectors:
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    plan = list(matrices())
    for m in plan:
        elements, block_bytes = gguf.GGML_QUANT_SIZES[m.qtype]
        row_bytes = m.width // elements * block_bytes
        writer.add_tensor_info(m.name, (m.rows, row_bytes), np.dtype(np.uint8), m.rows * row_bytes, m.qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, values in vectors:
        writer.write_tensor_data(values)
    for m in plan:
        # 0.8 / sqrt(K): attention stays soft and every activation of order one, as in the parity tests.
        std = (0.4 if m.name in ("token_embd.weight", "output.weight") else 0.8) / m.width**0.5
        pieces = [
            random_matrix(m.qtype, min(CHUNK_ROWS, m.rows - begin), m.width, std, rng)
            for begin in range(0, m.rows, CHUNK_ROWS)
        ]
        writer.write_tensor_data(np.concatenate(pieces))
        print(f"\r{m.name:32}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    writer.close()
    os.replace(partial, path)


if __name__ == "__main__":
    write_glm4_file(Path(sys.argv[1]))
