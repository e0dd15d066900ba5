"""GLM decoder: the `glm4` block, with two-way attention inside a picture or sound, or inside a user turn.

For each layer (RMS(x, w) = x / sqrt(mean(x^2) + eps) * w, computed in float32):

    a  = Attention(RMS(x, input_layernorm));      x1 = x  + RMS(a, post_self_attn_layernorm)
    u  = W_gate_up RMS(x1, post_attention_layernorm)
    f  = W_down (silu(u[:ffn]) * u[ffn:]);        x2 = x1 + RMS(f, post_mlp_layernorm)

Names and order of the weights are those of transformers' Glm4 and Glm4v text models, where the equations can be read
too. Rotary positions turn the first `rope_dim` channels of each head, in neighbouring pairs (2j, 2j+1); pair j turns by
the position of its section's axis (time, height, width) times theta^(-2j / rope_dim).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoglm.train.model.presets import AttentionMode, TextConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rope_tables(config: TextConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions [3, B, L] -> cos and sin [B, 1, L, rope_dim / 2]."""
    pairs = config.rope_dim // 2
    index = torch.arange(pairs, dtype=torch.float32, device=positions.device)
    frequency = config.rope_theta ** (-2.0 * index / config.rope_dim)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(config.rope_sections)).to(positions.device)
    angle = positions.float()[axis].permute(1, 2, 0) * frequency  # [B, L, pairs]
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, L, head_dim]: the first 2 * pairs channels turned, neighbouring pairs."""
    rope_dim = 2 * cos.shape[-1]
    turned, rest = x[..., :rope_dim], x[..., rope_dim:]
    a, b = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([pairs.to(x.dtype), rest], dim=-1)


def attention_mask(mode: AttentionMode, valid: Tensor, media: Tensor, turn: Tensor) -> Tensor:
    """Who sees whom: True at [B, 1, query, key].

    valid [B, L]: real tokens; media [B, L]: number of the picture or sound a token belongs to, 0 for none;
    turn [B, L]: number of the user turn it belongs to, 0 outside of user turns.
    """
    length = valid.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    allowed = causal.expand(valid.shape[0], -1, -1)
    span = {"causal": None, "media": media, "turn": turn}[mode]
    if span is not None:
        allowed = allowed | ((span[:, :, None] == span[:, None, :]) & (span[:, :, None] > 0))
    # A padding token sees itself, so that no softmax is empty.
    allowed = allowed & (valid[:, None, :] | torch.eye(length, dtype=torch.bool, device=valid.device))
    return allowed[:, None]


@dataclass
class DecoderCache:
    """Keys and values of finished tokens: a (k, v) pair a layer, each [B, kv heads, L, head_dim]."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Everything seen so far with k and v appended."""
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            old_k, old_v = self.layers[layer]
            self.layers[layer] = (torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2))
        return self.layers[layer]

    def select(self, rows: Tensor) -> None:
        """Keep only `rows` of the batch."""
        self.layers = [(k[rows], v[rows]) for k, v in self.layers]


class Attention(nn.Module):
    """Grouped-query attention with biases on q, k and v: [B, L, D] -> [B, L, D]."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: DecoderCache | None) -> Tensor:
        batch, length, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, -1, self.config.head_dim).transpose(1, 2)

        q, k, v = rotate(heads(self.q_proj(x)), *rope), rotate(heads(self.k_proj(x)), *rope), heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        result: Tensor = self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))
        return result


class GatedMLP(nn.Module):
    """W_down (silu(gate) * up), gate rows first in one matrix."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        result: Tensor = self.down_proj(F.silu(gate) * up)
        return result


class DecoderLayer(nn.Module):
    """One block; a layer named in `pruned_ffn` has no feed-forward part."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = Attention(config, layer)
        self.post_self_attn_layernorm = RMSNorm(width, eps)
        self.has_ffn = layer not in config.pruned_ffn
        if self.has_ffn:
            self.post_attention_layernorm = RMSNorm(width, eps)
            self.mlp = GatedMLP(config)
            self.post_mlp_layernorm = RMSNorm(width, eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: DecoderCache | None) -> Tensor:
        x = x + self.post_self_attn_layernorm(self.self_attn(self.input_layernorm(x), rope, mask, cache))
        if self.has_ffn:
            x = x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)))
        return x


class TextModel(nn.Module):
    """Embeddings [B, L, D] and positions [3, B, L] -> hidden states [B, L, D] after the last norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        mask: Tensor,
        cache: DecoderCache | None = None,
        features: list[Tensor] | None = None,
    ) -> Tensor:
        """mask [B, 1, L, L + cached]; `features` collects each layer's output when a list is given."""
        rope = rope_tables(self.config, positions)
        x = embeddings
        for layer in self.layers:
            x = layer(x, rope, mask, cache)
            if features is not None:
                features.append(x)
        result: Tensor = self.norm(x)
        return result
