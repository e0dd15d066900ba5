"""The text decoder: token ids -> hidden rows -> logits, written as a program of native operations.

One block, x the residual stream, RMS(x, w) = x / sqrt(mean(x^2) + eps) * w:

    llama   x += Wo Attn(RMS(x, attn_norm));            x += Wd (silu(Wg y) * Wu y),  y = RMS(x, ffn_norm)
    glm4    x += RMS(Wo Attn(RMS(x, attn_norm)), post_attention_norm)
            x += RMS(Wd (silu(Wg y) * Wu y), post_ffw_norm)

Attn is grouped-query attention over the paged KV cache, causal by position in the sequence, with rotary
embedding on the first rotary_dim dims of each head. Source: Touvron 2023 (llama), GLM-4 technical report and
the facts of its GGUF form (norm names, fused gate-up with the gate first, bias on q, k, v). A layer named in
pruned_ffn_layers has no second line: its feed-forward part was found to add little and left out (docs/format.md).
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from autoglm.config import ModelConfig
from autoglm.formats.quant_types import BLOCK, GGMLType
from autoglm.kernels import KvCache, Matrix, Program, Runtime
from autoglm.model.loader import Vector, WeightReader


class FeedForwardWeights(Struct, frozen=True):
    """The second half of a block. The post norm is None where the architecture has none (llama)."""

    norm: Vector
    gate: Matrix
    up: Matrix
    down: Matrix
    post_norm: Vector | None


class LayerWeights(Struct, frozen=True):
    """One block. The post norm is None where the architecture has none (llama), ffn where it was pruned."""

    attn_norm: Vector
    qkv: list[Matrix]
    qkv_bias: list[Vector | None]
    attn_output: Matrix
    post_attention_norm: Vector | None
    ffn: FeedForwardWeights | None


def read_layer(reader: WeightReader, config: ModelConfig, index: int) -> LayerWeights:
    """The tensors blk.{index}.* of a llama or glm4 file."""
    hidden = config.hidden_size
    q_width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    is_glm4 = config.architecture == "glm4"

    def name(part: str) -> str:
        return f"blk.{index}.{part}"

    widths = [q_width, kv_width, kv_width]
    if reader.has(name("attn_qkv.weight")):
        qkv = reader.split_matrix(name("attn_qkv.weight"), widths, hidden)
        fused = reader.optional_vector(name("attn_qkv.bias"), sum(widths))
        bias: list[Vector | None] = [None] * 3
        if fused is not None:
            bias = list(np.split(fused, np.cumsum(widths)[:2]))
    else:
        parts = ["attn_q", "attn_k", "attn_v"]
        qkv = [reader.matrix(name(f"{p}.weight"), w, hidden) for p, w in zip(parts, widths, strict=True)]
        bias = [reader.optional_vector(name(f"{p}.bias"), w) for p, w in zip(parts, widths, strict=True)]
    return LayerWeights(
        attn_norm=reader.vector(name("attn_norm.weight"), hidden),
        qkv=qkv,
        qkv_bias=bias,
        attn_output=reader.matrix(name("attn_output.weight"), hidden, q_width),
        post_attention_norm=reader.vector(name("post_attention_norm.weight"), hidden) if is_glm4 else None,
        ffn=None if index in config.pruned_ffn_layers else read_feed_forward(reader, config, index),
    )


def read_feed_forward(reader: WeightReader, config: ModelConfig, index: int) -> FeedForwardWeights:
    """The tensors blk.{index}.ffn_* and their norms; glm4 files hold gate and up as one matrix, the gate first."""
    hidden, ffn = config.hidden_size, config.intermediate_size

    def name(part: str) -> str:
        return f"blk.{index}.{part}.weight"

    if reader.has(name("ffn_gate")):
        gate, up = (reader.matrix(name(part), ffn, hidden) for part in ("ffn_gate", "ffn_up"))
    else:
        gate, up = reader.split_matrix(name("ffn_up"), [ffn, ffn], hidden)
    return FeedForwardWeights(
        norm=reader.vector(name("ffn_norm"), hidden),
        gate=gate,
        up=up,
        down=reader.matrix(name("ffn_down"), hidden, ffn),
        post_norm=reader.vector(name("post_ffw_norm"), hidden) if config.architecture == "glm4" else None,
    )


class _Activations:
    """Activation buffers, shared by all layers that use one in the same role and the same forms."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._made: dict[tuple[str, int, frozenset[int]], int] = {}

    def get(self, role: str, width: int, readers: list[Matrix]) -> int:
        # K-quants read one scale per 256, other quantized types one per 32, float types floats.
        key = (role, width, frozenset(BLOCK[GGMLType(matrix.type_id)][0] for matrix in readers))
        if key not in self._made:
            self._made[key] = self._program.activation(width)
        return self._made[key]


def inverse_frequencies(config: ModelConfig, factors: Vector | None) -> Vector:
    """f32 [rotary_dim / 2]: theta^(-2j / rotary_dim), divided by the file's factors where it has them."""
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim
    frequencies = config.rope_theta**-exponents
    return np.asarray(frequencies if factors is None else frequencies / factors, dtype=np.float32)


def build_text_program(
    runtime: Runtime, reader: WeightReader, config: ModelConfig, cache: KvCache, max_tokens: int
) -> Program:
    """Read all weights and compose one step: tokens in, one row of logits per wanted token out.

    max_tokens  tokens a step may hold
    Raises FormatError if a tensor is missing, misshapen or left over.
    """
    program = Program(runtime, max_tokens)
    hidden, eps = config.hidden_size, config.rms_norm_eps
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    factors = reader.optional_vector("rope_freqs.weight", config.rotary_dim // 2)
    program.set_attention(
        cache,
        config.num_attention_heads,
        config.rotary_dim,
        config.rope_interleaved,
        config.mrope_section or (config.rotary_dim // 2, 0, 0),
        config.head_dim,
        inverse_frequencies(config, factors),
    )
    activations = _Activations(program)
    x, branch = program.buffer(hidden), program.buffer(hidden)
    qkv, heads = program.buffer(q_width + 2 * kv_width), program.buffer(q_width)

    table = reader.embedding("token_embd.weight", config.vocab_size, hidden)
    program.embed(table.data, int(table.type), config.vocab_size, hidden, x)
    pending: Vector | None = None  # post norm of a branch that waits in `branch` to be added to x
    for index in range(config.num_hidden_layers):
        layer = read_layer(reader, config, index)
        sandwich = layer.post_attention_norm is not None  # then the branch is normed before it is added

        normed = activations.get("normed", hidden, layer.qkv)
        if pending is None:
            program.norm(x, normed, layer.attn_norm, eps)
        else:
            program.norm(x, normed, layer.attn_norm, eps, branch=branch, post_weight=pending)
        if index < config.num_hidden_layers - 1:
            program.linear(normed, layer.qkv, qkv, biases=layer.qkv_bias, name="qkv")
            program.rope_cache(qkv, index)
        else:  # of the tokens that are not wanted nobody reads more than keys and values
            keys_values, wanted = program.buffer(2 * kv_width), program.buffer(hidden)
            program.linear(normed, layer.qkv[1:], keys_values, biases=layer.qkv_bias[1:], name="kv")
            program.rope_cache(keys_values, index)
            program.gather(x, wanted)
            x = wanted
            program.norm(x, normed, layer.attn_norm, eps)
            program.linear(normed, layer.qkv[:1], qkv, biases=layer.qkv_bias[:1], name="q")
            program.rope_queries(qkv)
        program.attention(qkv, index, heads)
        attended = activations.get("attended", q_width, [layer.attn_output])
        program.quantize(heads, attended)
        program.linear(attended, [layer.attn_output], branch if sandwich else x, accumulate=not sandwich, name="o_proj")

        pending = layer.post_attention_norm
        ffn = layer.ffn
        if ffn is None:
            continue
        normed = activations.get("normed", hidden, [ffn.gate, ffn.up])
        if pending is None:
            program.norm(x, normed, ffn.norm, eps)
        else:
            program.norm(x, normed, ffn.norm, eps, branch=branch, post_weight=pending)
        gated = activations.get("gated", config.intermediate_size, [ffn.down])
        program.gated_mlp(normed, ffn.gate, ffn.up, gated)
        program.linear(gated, [ffn.down], branch if sandwich else x, accumulate=not sandwich, name="down")
        pending = ffn.post_norm

    _build_head(program, reader, config, x, branch, pending)
    reader.ignore(f"blk.{config.num_hidden_layers}.")  # multi-token-prediction layers of GLM-4.5 style files
    reader.finish()
    return program


def _build_head(
    program: Program, reader: WeightReader, config: ModelConfig, x: int, branch: int, pending: Vector | None
) -> None:
    """Last norm and vocabulary product."""
    hidden = config.hidden_size
    final = program.activation(hidden)
    weight = reader.vector("output_norm.weight", hidden)
    if pending is None:
        program.norm(x, final, weight, config.rms_norm_eps)
    else:
        program.norm(x, final, weight, config.rms_norm_eps, branch=branch, post_weight=pending)
    # Tied models have no output tensor and use the token table.
    head = "output.weight" if reader.has("output.weight") else "token_embd.weight"
    logits = program.buffer(config.vocab_size)
    program.linear(final, [reader.matrix(head, config.vocab_size, hidden)], logits, name="lm_head")
    program.result(logits)
