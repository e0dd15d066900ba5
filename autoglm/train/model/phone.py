"""The whole model: encoders -> projectors -> fusion -> decoder; one forward pass and greedy generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoglm.train.model.audio import AudioEncoder, AudioProjector
from autoglm.train.model.fusion import Fused, GatedCrossModalFusion
from autoglm.train.model.presets import PhoneConfig
from autoglm.train.model.text import DecoderCache, TextModel, attention_mask
from autoglm.train.model.vision import VisionEncoder, VisionProjector


@dataclass
class Inputs:
    """A batch of B conversations of one user turn with at most one picture and one sound each, L tokens long.

    tokens [B, L]; positions [3, B, L] (time, height, width); valid [B, L] False on padding;
    media [B, L] 1 on picture tokens, 2 on sound tokens, 0 elsewhere; turn [B, L] 1 inside the user turn;
    words [B, L] True on the typed words of the user turn, which lend context to the fusion;
    images [S, 3, H, W] in -1..1 and image_of [B]: the picture each row looks at, -1 for none;
    mel [A, T, 80], frames [A] and sound_of [B]: likewise for sounds.
    """

    tokens: Tensor
    positions: Tensor
    valid: Tensor
    media: Tensor
    turn: Tensor
    words: Tensor
    images: Tensor | None = None
    image_of: Tensor | None = None
    mel: Tensor | None = None
    frames: Tensor | None = None
    sound_of: Tensor | None = None

    def to(self, device: torch.device | str) -> Inputs:
        """The same batch on another device."""
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return Inputs(**moved)


@dataclass
class Embedded:
    """Decoder inputs [B, L, D] and what the encoders saw on the way."""

    embeddings: Tensor
    patches: Tensor | None  # [S, H/16 * W/16, vision width]
    sound: Tensor | None  # [A, T/4, audio width]
    sound_mask: Tensor | None  # [A, T/4]
    fused: Fused | None


class AutoGLMPhone(nn.Module):
    """Text, pictures and speech in; logits out."""

    def __init__(self, config: PhoneConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.text.hidden_size, config.fusion.projector_size
        self.vision = VisionEncoder(config.vision)
        self.vision_projector = VisionProjector(config.vision, hidden, width)
        if config.audio:
            self.audio = AudioEncoder(config.audio)
            self.audio_projector = AudioProjector(config.audio, hidden, width)
        if config.fusion.mode == "gcmf":
            self.fusion = GatedCrossModalFusion(width, config.fusion.num_heads)
        self.text = TextModel(config.text)
        self.apply(_initialize)

    def num_parameters(self) -> int:
        """Weights in all."""
        return sum(parameter.numel() for parameter in self.parameters())

    def see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[S, 3, H, W] -> the encoder's patches [S, H/16 * W/16, vision width] and the projected tokens [S, t, D]."""
        patches = self.vision(images)
        rows, columns = (side // self.config.vision.patch_size for side in images.shape[2:])
        return patches, self.vision_projector(patches, rows, columns)

    def embed(self, inputs: Inputs) -> Embedded:
        """Token embeddings with the fused picture and sound tokens in their places."""
        embeddings = self.text.embed_tokens(inputs.tokens)
        patches = sound = sound_mask = None
        tokens: dict[str, tuple[Tensor, Tensor]] = {}
        if inputs.images is not None and inputs.image_of is not None:
            patches, projected = self.see(inputs.images)
            has = inputs.image_of >= 0
            tokens["vision"] = (projected[inputs.image_of.clamp(min=0)], has[:, None].expand(-1, projected.shape[1]))
        if inputs.mel is not None and inputs.frames is not None and inputs.sound_of is not None:
            sound, sound_mask = self.audio(inputs.mel, inputs.frames)
            index = inputs.sound_of.clamp(min=0)
            has = (inputs.sound_of >= 0)[:, None]
            tokens["audio"] = (self.audio_projector(sound)[index], sound_mask[index] & has)
        fused = None
        if tokens:
            if self.config.fusion.mode == "gcmf":
                fused = self.fusion({**tokens, "text": (embeddings, inputs.words)})
            for number, name in ((1, "vision"), (2, "audio")):
                if name in tokens:
                    values = getattr(fused, name) if fused else tokens[name][0]
                    embeddings = _place(embeddings, inputs.media == number, values, tokens[name][1])
        return Embedded(embeddings, patches, sound, sound_mask, fused)

    def hidden(self, inputs: Inputs, embedded: Embedded, features: list[Tensor] | None = None) -> Tensor:
        """Hidden states [B, L, D] after the decoder's last norm."""
        mask = attention_mask(self.config.text.attention_mode, inputs.valid, inputs.media, inputs.turn)
        result: Tensor = self.text(embedded.embeddings, inputs.positions, mask, features=features)
        return result

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits [B, L, vocabulary]."""
        logits: Tensor = self.text.lm_head(self.hidden(inputs, self.embed(inputs)))
        return logits

    @torch.no_grad()
    def generate(self, inputs: Inputs, max_tokens: int, stop: frozenset[int]) -> list[list[int]]:
        """Greedy tokens after each prompt, without the stop token. Prompts are padded on the left."""
        cache = DecoderCache()
        mask = attention_mask(self.config.text.attention_mode, inputs.valid, inputs.media, inputs.turn)
        hidden = self.text(self.embed(inputs).embeddings, inputs.positions, mask, cache)[:, -1]
        position = inputs.positions[:, :, -1:].amax(dim=0, keepdim=True).expand(3, -1, -1)
        seen = inputs.valid
        results: list[list[int]] = [[] for _ in range(len(seen))]
        running = torch.arange(len(seen), device=seen.device)
        for _ in range(max_tokens):
            chosen = self.text.lm_head(hidden).argmax(dim=-1)
            going = torch.tensor([int(token) not in stop for token in chosen], device=seen.device)
            for row, token, goes_on in zip(running.tolist(), chosen.tolist(), going.tolist(), strict=True):
                if goes_on:
                    results[row].append(token)
            if not going.any():
                break
            running, chosen = running[going], chosen[going]
            cache.select(going)
            position = position[:, going] + 1
            seen = torch.cat([seen[going], torch.ones_like(chosen, dtype=torch.bool)[:, None]], dim=1)
            embeddings = self.text.embed_tokens(chosen[:, None])
            hidden = self.text(embeddings, position, seen[:, None, None, :], cache)[:, -1]
        return results


def _place(embeddings: Tensor, where: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """`embeddings` with `values` [B, n, D] where `mask` [B, n] put, in order, where `where` [B, L] is True."""
    return embeddings.masked_scatter(where[..., None], values[mask].to(embeddings.dtype))


def _initialize(module: nn.Module) -> None:
    """Truncated normal of 0.5 for embeddings, 1/sqrt(fan in) for matrices, zero biases and matrices that ask for it."""
    if isinstance(module, nn.Linear):
        if getattr(module, "starts_at_zero", False):
            nn.init.zeros_(module.weight)
        else:
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None and not getattr(module, "keep_bias", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.5)
