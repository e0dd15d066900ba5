"""GCMF, gated cross-modal fusion: picture and sound of one turn read each other and the words before the decoder.

For every modality m of {vision, audio} in the turn, with projected tokens X_m [n_m, d], N = RMSNorm without weight and
e_m a learned vector per modality:

    O_m = N(tokens of the other modalities, each plus its e)          the turn's text lends its embeddings here
    C_m = MultiHeadAttention(Q = N(X_m) Wq, K = O_m Wk, V = O_m Wv) Wo
    G_m = sigmoid([N(X_m) ; C_m] Wg + bg)                             per token and channel
    F_m = G_m * X_m + (1 - G_m) * C_m
    a   = softmax over present m of (w_m · mean(N(X_m)) + b_m)        text takes part with its own w and b
    Y_m = |present| * a_m * F_m

Text embeddings enter the decoder as they are. A modality alone in its turn passes through unchanged, and an absent one
leaves every result what it would be if the modality did not exist. Wo and Wg start at zero and bg at +2: a fresh fusion
only scales its tokens, and what a decoder knew without it still holds.
Weights Wq, Wk, Wv, Wo, Wg are per target modality. The idea of gating own against attended features follows GMU
(Arevalo et al. 2017); equations are this project's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODALITIES = ("vision", "audio", "text")


@dataclass
class Fused:
    """What fusion made of one batch of turns.

    vision, audio: [B, n, d]; weights [B, 3]: a of vision, audio, text (0 where absent); gates: mean G a token [B, n].
    """

    vision: Tensor | None
    audio: Tensor | None
    weights: Tensor
    gates: dict[str, Tensor]


def rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6) over the last axis."""
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)


class GatedCrossAttention(nn.Module):
    """C, G and F of one target modality."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.out.starts_at_zero = True  # type: ignore[assignment]
        self.gate = nn.Linear(2 * width, width)
        self.gate.starts_at_zero = True  # type: ignore[assignment]
        self.gate.keep_bias = True  # type: ignore[assignment]
        nn.init.constant_(self.gate.bias, 2.0)

    def forward(self, x: Tensor, others: Tensor, others_mask: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, n, d], others [B, k, d] with mask [B, k] -> F and G [B, n, d]; F = x where others is empty."""
        batch, _, width = x.shape
        normed = rms(x)

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, -1, self.num_heads, width // self.num_heads).transpose(1, 2)

        any_other = others_mask.any(dim=1)
        # A row without others attends to everything, so that no softmax is empty; its result is not used.
        mask = (others_mask | ~any_other[:, None])[:, None, None, :]
        attended = F.scaled_dot_product_attention(
            heads(self.q(normed)), heads(self.k(others)), heads(self.v(others)), attn_mask=mask
        )
        context = self.out(attended.transpose(1, 2).reshape(batch, -1, width))
        gate = torch.sigmoid(self.gate(torch.cat([normed, context], dim=-1)))
        gate = torch.where(any_other[:, None, None], gate, torch.ones_like(gate))
        return gate * x + (1 - gate) * context, gate


class GatedCrossModalFusion(nn.Module):
    """The tokens of one turn's picture, sound and words -> its fused picture and sound tokens."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.vision = GatedCrossAttention(width, num_heads)
        self.audio = GatedCrossAttention(width, num_heads)
        self.modality = nn.Parameter(torch.randn(len(MODALITIES), width) * 0.02)
        self.pool_weight = nn.Parameter(torch.zeros(len(MODALITIES), width))
        self.pool_bias = nn.Parameter(torch.zeros(len(MODALITIES)))

    def forward(self, tokens: dict[str, tuple[Tensor, Tensor]]) -> Fused:
        """tokens: modality -> (X [B, n, d], mask [B, n]); a row whose mask is all False lacks that modality."""
        normed = {name: rms(x) for name, (x, _) in tokens.items()}
        weights = self._weights(normed, tokens)
        present = (weights > 0).sum(dim=1)
        fused: dict[str, Tensor] = {}
        gates: dict[str, Tensor] = {}
        for name in ("vision", "audio"):
            if name not in tokens:
                continue
            x, _ = tokens[name]
            lenders = [m for m in tokens if m != name]
            if not lenders:
                fused[name], gates[name] = x, torch.ones_like(x[..., 0])
                continue
            others = torch.cat([normed[m] + self.modality[MODALITIES.index(m)] for m in lenders], dim=1)
            block: GatedCrossAttention = getattr(self, name)
            mixed, gate = block(x, others, torch.cat([tokens[m][1] for m in lenders], dim=1))
            scale = present * weights[:, MODALITIES.index(name)]
            fused[name] = torch.where((present > 1)[:, None, None], scale[:, None, None] * mixed, x)
            gates[name] = gate.mean(dim=-1)
        return Fused(fused.get("vision"), fused.get("audio"), weights, gates)

    def _weights(self, normed: dict[str, Tensor], tokens: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The softmax over present modalities: [B, 3]."""
        any_tokens = next(iter(tokens.values()))[0]
        scores = any_tokens.new_full((any_tokens.shape[0], len(MODALITIES)), -torch.inf)
        columns = []
        for index, name in enumerate(MODALITIES):
            if name not in tokens:
                columns.append(scores[:, index])
                continue
            mask = tokens[name][1]
            mean = (normed[name] * mask[..., None]).sum(1) / mask.sum(1).clamp(min=1)[:, None]
            score = mean @ self.pool_weight[index] + self.pool_bias[index]
            columns.append(torch.where(mask.any(1), score, scores[:, index]))
        return torch.nan_to_num(torch.softmax(torch.stack(columns, dim=1), dim=1), nan=0.0)
