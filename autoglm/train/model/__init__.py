"""AutoGLM-Phone in PyTorch: the reference the native engine is held to, and what training trains."""

from autoglm.train.model.phone import AutoGLMPhone
from autoglm.train.model.presets import (
    PRESETS,
    AudioConfig,
    FusionConfig,
    PhoneConfig,
    TextConfig,
    VisionConfig,
    preset,
)

__all__ = [
    "PRESETS",
    "AudioConfig",
    "AutoGLMPhone",
    "FusionConfig",
    "PhoneConfig",
    "TextConfig",
    "VisionConfig",
    "preset",
]
