"""A small phone model whose every weight matters, and a batch that reaches every part of it."""

from __future__ import annotations

import torch

from autoglm.train.folding import fold_stem
from autoglm.train.model import AutoGLMPhone, PhoneConfig, preset
from autoglm.train.model.phone import Inputs


def make_phone(config: PhoneConfig | None = None, *, seed: int = 1, fold: bool = False) -> AutoGLMPhone:
    """The smoke preset with random norms and biases too: ones and zeros would hide a forgotten or swapped tensor.

    fold  fold the stem's batch norms, as is done before quantization-aware training
    """
    torch.manual_seed(seed)
    model = AutoGLMPhone(config or preset("smoke")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
            elif "pos_bias" in name or "pool" in name or ".out." in name or ".gate." in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape) * 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape) + 0.5)
    if fold:
        state, folded = fold_stem(model.state_dict(), model.config)
        model = AutoGLMPhone(folded).eval()
        model.load_state_dict(state)
    return model


def some_inputs(seed: int = 3) -> Inputs:
    """Two rows: one with a picture of 2 x 3 tokens and a sound, one with words alone."""
    generator = torch.Generator().manual_seed(seed)
    length, image, sound = 24, 6, 5
    tokens = torch.randint(0, 2000, (2, length), generator=generator)
    media, words = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, length, dtype=torch.bool)
    media[0, 3 : 3 + image], media[0, 11 : 11 + sound] = 1, 2
    words[:, 17:20] = True
    turn = torch.zeros(2, length, dtype=torch.long)
    turn[:, 2:20] = 1
    return Inputs(
        tokens=tokens,
        positions=torch.arange(length).expand(3, 2, -1),
        valid=torch.ones(2, length, dtype=torch.bool),
        media=media,
        turn=turn,
        words=words,
        images=torch.rand(1, 3, 64, 96, generator=generator) * 2 - 1,
        image_of=torch.tensor([0, -1]),
        mel=torch.randn(1, 18, 80, generator=generator),
        frames=torch.tensor([18]),
        sound_of=torch.tensor([0, -1]),
    )
