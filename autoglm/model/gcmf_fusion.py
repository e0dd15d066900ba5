"""Gated cross-modal fusion of one user turn: its picture, sound and words read each other before the decoder.

With N(x) = x / sqrt(mean(x^2) + 1e-6), X_m the projected tokens of modality m and e_m a learned vector:

    C_m = Wo MultiHead(q = Wq N(X_m), k, v of N(the others' tokens) + their e)
    F_m = G_m X_m + (1 - G_m) C_m,   G_m = sigmoid(Wg [N(X_m) ; C_m] + b)
    Y_m = (modalities present) a_m F_m,   a = softmax over present m of (w_m . mean N(X_m) + b_m)

A medium alone in its turn passes through unchanged; text only lends its embeddings. The training twin, with the
sources, is train/model/fusion.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoglm.errors import FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.model.layers import Linear, read_linear, sigmoid
from autoglm.model.loader import WeightReader

MODALITIES = ("vision", "audio", "text")


@dataclass(frozen=True)
class FusedTurn:
    """What fusion made of one turn.

    tokens   modality -> f32 [n, width], of those among vision and audio that were there
    weights  a of vision, audio and text; 0 where absent; a medium alone has all of it. {} in mode "concat"
    gates    modality -> f32 [n]: the mean of G over the channels of each token; 1 where nothing was mixed in
    """

    tokens: dict[str, NDArray[np.float32]]
    weights: dict[str, float]
    gates: dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class _Target:
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    gate: Linear


class GcmfFusion:
    """The fusion of a file whose gcmf.mode is "gcmf"; without one (mode "concat") tokens stay as they are."""

    def __init__(self, reader: WeightReader, gguf: GGUFFile, text_size: int) -> None:
        mode = gguf.get("gcmf.mode", str)
        if mode not in ("gcmf", "concat"):
            raise FormatError(f"{gguf.path}: gcmf.mode {mode[:20]!r} is not supported; expected gcmf or concat")
        self._targets: dict[str, _Target] = {}
        if mode == "concat":
            return
        self._num_heads = gguf.get("gcmf.attention.head_count", int)
        if self._num_heads < 1 or text_size % self._num_heads:
            raise FormatError(f"{gguf.path}: {self._num_heads} fusion heads do not divide a width of {text_size}")
        names = [name for name in ("vision", "audio") if reader.has(f"gcmf.{name}.gate.weight")]
        for name in names:
            q, k, v, out = (
                read_linear(reader, f"gcmf.{name}.attn_{part}", text_size, text_size) for part in ("q", "k", "v", "out")
            )
            gate = read_linear(reader, f"gcmf.{name}.gate", text_size, 2 * text_size)
            self._targets[name] = _Target(q, k, v, out, gate)
        count = len(MODALITIES)
        self._modality = reader.array("gcmf.modality_embd.weight", (count, text_size))
        self._pool_weight = reader.array("gcmf.pool.weight", (count, text_size))
        self._pool_bias = reader.vector("gcmf.pool.bias", count)

    @property
    def is_gated(self) -> bool:
        """Whether turns are fused at all: weights and gates mean something."""
        return bool(self._targets)

    def fuse(self, tokens: Mapping[str, NDArray[np.float32]]) -> FusedTurn:
        """tokens: modality -> f32 [n, width], n at least 1; absent modalities left out."""
        media = {name: x for name, x in tokens.items() if name != "text"}
        if not self._targets or len(tokens) < 2:
            weights = {name: float(name in tokens) for name in MODALITIES} if self._targets else {}
            return FusedTurn(media, weights, {name: np.ones(len(x), np.float32) for name, x in media.items()})
        normed = {name: _rms(x) for name, x in tokens.items()}
        present = [name for name in MODALITIES if name in tokens]
        scores = np.array([self._score(name, normed[name]) for name in present], np.float64)
        shares = np.exp(scores - scores.max())
        weights = dict(zip(present, (shares / shares.sum()).tolist(), strict=True))
        fused, gates = {}, {}
        for name, x in media.items():
            others = np.concatenate([normed[m] + self._modality[MODALITIES.index(m)] for m in present if m != name])
            mixed, gate = self._mix(self._targets[name], x, normed[name], others)
            fused[name] = np.asarray(np.float32(len(present) * weights[name]) * mixed, np.float32)
            gates[name] = gate.mean(axis=1)
        return FusedTurn(fused, {name: weights.get(name, 0.0) for name in MODALITIES}, gates)

    def _score(self, name: str, normed: NDArray[np.float32]) -> float:
        index = MODALITIES.index(name)
        return float(normed.mean(axis=0) @ self._pool_weight[index] + self._pool_bias[index])

    def _mix(
        self, target: _Target, x: NDArray[np.float32], normed: NDArray[np.float32], others: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """F and G of one modality, f32 [n, width] each."""
        width = x.shape[1]

        def heads(y: NDArray[np.float32]) -> NDArray[np.float32]:
            result: NDArray[np.float32] = y.reshape(len(y), self._num_heads, -1).transpose(1, 0, 2)
            return result

        q, k, v = heads(target.q(normed)), heads(target.k(others)), heads(target.v(others))
        scores = q @ k.transpose(0, 2, 1) * np.float32((width // self._num_heads) ** -0.5)
        share = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = (share / share.sum(axis=-1, keepdims=True)) @ v
        context = target.out(attended.transpose(1, 0, 2).reshape(len(x), width))
        gate = sigmoid(target.gate(np.concatenate([normed, context], axis=1)))
        return gate * x + (1 - gate) * context, gate


def _rms(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(1e-6)), np.float32)
