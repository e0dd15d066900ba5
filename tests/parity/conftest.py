"""The PyTorch twin of the shipped Nano, reading activations as the kernels do."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.kernels import reference
from autoglm.train.inference import load_phone
from autoglm.train.model import AutoGLMPhone


def _as_eight_bits(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = inputs[0]
    read = reference.quantize_activations_32(x.reshape(-1, x.shape[-1]).numpy())
    rounded = read.q * read.scale.repeat(read.block, axis=1)[:, : x.shape[-1]]
    return (torch.from_numpy(rounded.astype(np.float32)).view(x.shape), *inputs[1:])


@pytest.fixture(scope="module")
def twin() -> Iterator[AutoGLMPhone]:
    """The kernels read activations as 8-bit integers before Q8_0 weights; hooks do the same here, by the NumPy
    reference, so that what is left is rounding and not the number format."""
    model = load_phone(SHIPPED_MODELS["nano"].path).model
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_as_eight_bits)
    with torch.no_grad():
        yield model
