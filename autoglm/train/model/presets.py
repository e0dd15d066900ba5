"""Sizes of AutoGLM-Phone models: one frozen config a part, and the named presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from autoglm.errors import ConfigError

AttentionMode = Literal["causal", "media", "turn"]
ATTENTION_MODES: tuple[AttentionMode, ...] = ("causal", "media", "turn")


@dataclass(frozen=True)
class VisionConfig:
    """A ViT (Dosovitskiy et al. 2020): `position_grid` is the (rows, columns) of learned positions.

    stem_channels  three widths of a convolutional stem in place of the linear patch embedding; () for none
    stem_norms     whether its convolutions are followed by batch norms (training) or have them folded in (files)
    """

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    patch_size: int = 16
    merge_size: int = 2
    position_grid: tuple[int, int] = (14, 14)
    max_pixels: int = 224 * 224
    stem_channels: tuple[int, ...] = ()
    stem_norms: bool = True
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class AudioConfig:
    """A Conformer (Gulati et al. 2020) over `num_mels` log-mel bins, one token per 4 frames of 10 ms.

    stem_residuals  residual layers of a convolutional stem in place of the paper's two convolutions; 0 for none
    stem_norms      as in VisionConfig
    """

    hidden_size: int = 192
    num_layers: int = 12
    num_heads: int = 4
    mlp_size: int = 768
    kernel_size: int = 15
    subsample_channels: int = 64
    stem_residuals: int = 0
    stem_norms: bool = True
    num_mels: int = 80
    max_seconds: int = 60
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class FusionConfig:
    """Gated cross-modal fusion; `mode` "concat" leaves tokens as they are (the baseline it is measured against)."""

    num_heads: int = 4
    projector_size: int = 512
    mode: Literal["gcmf", "concat"] = "gcmf"


@dataclass(frozen=True)
class TextConfig:
    """The `glm4` decoder. `pruned_ffn` names the layers that have no feed-forward part."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    rope_dim: int
    rope_sections: tuple[int, int, int]
    context_length: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    attention_mode: AttentionMode = "media"
    pruned_ffn: tuple[int, ...] = ()


@dataclass(frozen=True)
class PhoneConfig:
    """One model: its eyes, ears, fusion and decoder. `audio` is None for a model without ears."""

    name: str
    vision: VisionConfig
    audio: AudioConfig | None
    fusion: FusionConfig
    text: TextConfig

    def __post_init__(self) -> None:
        text, vision = self.text, self.vision
        if sum(text.rope_sections) * 2 != text.rope_dim:
            raise ConfigError(
                f"{self.name}: the rope sections {text.rope_sections} must sum to half of rope_dim {text.rope_dim}"
            )
        if text.num_heads % text.num_kv_heads:
            raise ConfigError(
                f"{self.name}: {text.num_heads} heads cannot share {text.num_kv_heads} key-value heads evenly"
            )
        if text.attention_mode not in ATTENTION_MODES:
            raise ConfigError(
                f"{self.name}: attention mode {text.attention_mode!r} is not one of {', '.join(ATTENTION_MODES)}"
            )
        if vision.hidden_size % vision.num_heads:
            raise ConfigError(
                f"{self.name}: {vision.num_heads} vision heads do not divide a width of {vision.hidden_size}"
            )
        if self.audio and self.audio.hidden_size % self.audio.num_heads:
            raise ConfigError(
                f"{self.name}: {self.audio.num_heads} audio heads do not divide a width of {self.audio.hidden_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, read back by `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PhoneConfig:
        """The config `to_dict` wrote. Raises ConfigError when a field is missing or unknown."""
        try:
            pairs = {name: tuple(values["vision"][name]) for name in ("position_grid", "stem_channels")}
            vision = VisionConfig(**{**values["vision"], **pairs})
            text = TextConfig(
                **{
                    **values["text"],
                    "rope_sections": tuple(values["text"]["rope_sections"]),
                    "pruned_ffn": tuple(values["text"]["pruned_ffn"]),
                }
            )
            audio = AudioConfig(**values["audio"]) if values["audio"] else None
            return cls(values["name"], vision, audio, FusionConfig(**values["fusion"]), text)
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"the model config cannot be read: {error}; was it written by another version of autoglm?"
            ) from error

    def without_stem_norms(self) -> PhoneConfig:
        """The same model as files hold it: batch norms of the stems folded into their convolutions."""
        audio = self.audio
        if audio is not None and audio.stem_residuals:
            audio = replace(audio, stem_norms=False)
        has_stem = bool(self.vision.stem_channels)
        return replace(
            self, vision=replace(self.vision, stem_norms=not has_stem and self.vision.stem_norms), audio=audio
        )

    def with_text(self, **changes: Any) -> PhoneConfig:
        """The same model with fields of its decoder changed."""
        return replace(self, text=replace(self.text, **changes))


NANO_VISION = VisionConfig(
    hidden_size=192,
    num_layers=3,
    num_heads=3,
    mlp_size=768,
    position_grid=(30, 14),
    max_pixels=224 * 480,
    stem_channels=(24, 48, 96),
)
NANO_AUDIO = AudioConfig(hidden_size=160, num_layers=4, num_heads=5, mlp_size=640, stem_residuals=4)
NANO_TEXT = TextConfig(
    vocab_size=2048,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    ffn_size=768,
    rope_dim=32,
    rope_sections=(4, 6, 6),
    context_length=4096,
)

# Every part present and as small as the grids allow: for tests and `train --smoke`.
_SMOKE = PhoneConfig(
    "smoke",
    replace(NANO_VISION, hidden_size=64, num_layers=2, num_heads=2, mlp_size=128, stem_channels=(8, 16, 16)),
    replace(NANO_AUDIO, hidden_size=64, num_layers=2, num_heads=2, mlp_size=128, stem_residuals=1),
    FusionConfig(projector_size=128),
    replace(NANO_TEXT, num_layers=2, ffn_size=256),
)
PRESETS: dict[str, PhoneConfig] = {
    config.name: config
    for config in (
        PhoneConfig("nano", NANO_VISION, NANO_AUDIO, FusionConfig(), NANO_TEXT),
        PhoneConfig(
            "nano-teacher",
            replace(NANO_VISION, num_layers=4),
            NANO_AUDIO,
            FusionConfig(),
            replace(NANO_TEXT, num_layers=5),
        ),
        _SMOKE,
        replace(_SMOKE, name="smoke-teacher", text=replace(_SMOKE.text, num_layers=3)),
        # The sizes of AutoGLM-Phone-9B's decoder with the full encoders of this architecture.
        PhoneConfig(
            "phone-9b",
            VisionConfig(),
            AudioConfig(),
            FusionConfig(num_heads=32, projector_size=4096),
            TextConfig(
                vocab_size=151552,
                hidden_size=4096,
                num_layers=40,
                num_heads=32,
                num_kv_heads=2,
                head_dim=128,
                ffn_size=13696,
                rope_dim=64,
                rope_sections=(8, 12, 12),
                context_length=65536,
            ),
        ),
    )
}
ENCODERS: dict[str, VisionConfig | AudioConfig] = {
    "vit-b16": VisionConfig(),
    "vit-nano": NANO_VISION,
    "conformer-tiny": AudioConfig(),
    "conformer-nano": NANO_AUDIO,
}


def preset(name: str) -> PhoneConfig:
    """The preset called `name`. Raises ConfigError that lists the names there are."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
