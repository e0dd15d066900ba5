"""How many parameters each part of a preset has, counted on the meta device: not one weight is allocated."""

from __future__ import annotations

import torch

from autoglm.train.model import AutoGLMPhone, PhoneConfig

_PARTS = {"text": ("text",), "vision": ("vision", "vision_projector"), "audio": ("audio", "audio_projector")}


def parameter_counts(config: PhoneConfig) -> dict[str, int]:
    """Part (text, vision, audio, fusion; encoders with their projectors) -> parameters, and their sum as "all"."""
    with torch.device("meta"):
        model = AutoGLMPhone(config)
    counts = dict.fromkeys((*_PARTS, "fusion"), 0)
    for name, parameter in model.named_parameters():
        root = name.partition(".")[0]
        part = next((part for part, roots in _PARTS.items() if root in roots), "fusion")
        counts[part] += parameter.numel()
    return {**counts, "all": sum(counts.values())}
