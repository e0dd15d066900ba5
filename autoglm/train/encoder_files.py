"""Encoder weights in files of their own -> the state and config that an mmproj is made from.

A file is a PyTorch state dict (`.pt`, `.bin`: read with weights_only, so that it can hold nothing but tensors and
never runs code) or safetensors; which one is told by its first bytes. Parameters have the names they have in
`VisionEncoder`, `AudioEncoder` or the whole `AutoGLMPhone`. Left out: other libraries' names for the same networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoglm.errors import ConfigError, FormatError
from autoglm.train.export import MMPROJ_PARTS, check_state
from autoglm.train.model import PRESETS, FusionConfig, PhoneConfig
from autoglm.train.model.audio import AudioEncoder, AudioProjector
from autoglm.train.model.fusion import GatedCrossModalFusion
from autoglm.train.model.vision import VisionEncoder, VisionProjector

# What training frameworks wrap state dicts in, and put before every name.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_PROJECTORS = ("vision_projector.", "audio_projector.", "fusion.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, f32, by name. Raises FormatError naming what is wrong with it; never runs its code."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if start[:4] == b"GGUF":
        raise FormatError(f"{path}: is a GGUF already, expected a PyTorch state dict or safetensors")
    found = _read_safetensors(path) if start[8:9] == b"{" else _read_torch(path)
    for wrapper in _WRAPPERS:
        if isinstance(found.get(wrapper), dict):
            found = found[wrapper]  # type: ignore[assignment]
    odd = [name for name, value in found.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd or not found:
        what = f"entry {str(odd[0])[:80]!r}, which is no tensor" if odd else "no tensors"
        raise FormatError(f"{path}: holds {what}; save the encoder's state_dict() alone")
    return {_bare(name): value.float() for name, value in found.items() if isinstance(value, Tensor)}


def _read_safetensors(path: Path) -> dict[str, object]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: is damaged or cut short ({error}); fetch it again") from None


def _read_torch(path: Path) -> dict[str, object]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader raise about anything
        if type(error).__name__ == "UnpicklingError":
            raise FormatError(
                f"{path}: is not a file of tensors alone, and objects in it are never opened; "
                "save the encoder's state_dict() with torch.save, or as safetensors"
            ) from None
        raise FormatError(
            f"{path}: is no PyTorch or safetensors file, or is cut short ({type(error).__name__}); fetch it again"
        ) from None
    if not isinstance(loaded, dict):
        raise FormatError(f"{path}: holds a {type(loaded).__name__}, expected a state dict of named tensors")
    return loaded


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def assemble(
    vision: Mapping[str, Tensor],
    audio: Mapping[str, Tensor] | None,
    projectors: Mapping[str, Tensor] | None,
    *,
    width: int | None = None,
) -> tuple[dict[str, Tensor], PhoneConfig]:
    """The parts of an mmproj put together: state for `export_mmproj`, and the config found by the shapes.

    vision, audio  an encoder each, with or without "vision." and "audio." before the names; the projectors and the
                   fusion may stand in these files too
    projectors     vision_projector.*, audio_projector.* and fusion.*; without fusion.* tokens are only put in a row
    width          make new, untrained projectors and fusion for a decoder of this width instead
    Raises ConfigError if no preset has such encoders, or a part is missing.
    """
    state = _named(vision, "vision.")
    if audio is not None:
        state |= _named(audio, "audio.")
    state |= projectors or {}
    if audio is None:
        state = {name: value for name, value in state.items() if not name.startswith(("audio.", "audio_projector."))}
    base = _matching_preset(state, has_audio=audio is not None)
    if not any(name.startswith(_PROJECTORS) for name in state):
        if width is None:
            raise ConfigError(
                "no projectors: without them nothing the encoders see reaches a decoder; name a file that holds "
                "vision_projector.*, audio_projector.* and fusion.* with --projectors, or make new, untrained ones "
                "with --width"
            )
        state |= _new_projectors(config := _sized(base, width, base.fusion.projector_size, has_fusion=True))
    else:
        config = _fitted(base, state)
    check_state(state, config, MMPROJ_PARTS)
    return state, config


def _named(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    known = (prefix, *_PROJECTORS)
    return {name if name.startswith(known) else prefix + name: value for name, value in weights.items()}


def _matching_preset(state: Mapping[str, Tensor], *, has_audio: bool) -> PhoneConfig:
    """The preset whose encoders have exactly these parameters, its stem's norms folded or not."""
    given = {name: value.shape for name, value in state.items() if name.startswith(("vision.", "audio."))}
    vision = _first_match(given, "vision.")
    if not has_audio:
        return replace(vision, audio=None)
    return replace(vision, audio=_first_match(given, "audio.").audio)


def _first_match(given: Mapping[str, torch.Size], prefix: str) -> PhoneConfig:
    own = {name: shape for name, shape in given.items() if name.startswith(prefix)}
    nearest, most_alike = "", len(own) // 2
    for config in _candidates():
        wanted = _encoder_shapes(config, prefix)
        differing = [name for name in wanted if own.get(name) != wanted[name]]
        differing += [name for name in own if name not in wanted]
        if wanted and not differing:
            return config
        if len(wanted) - len(differing) > most_alike:
            most_alike = len(wanted) - len(differing)
            nearest = f"; it is most like {config.name}'s, from which it differs first in {differing[0]}"
    raise ConfigError(f"the {prefix[:-1]} encoder is of no preset's size ({', '.join(PRESETS)}){nearest}")


def _candidates() -> list[PhoneConfig]:
    """Every preset, and those with a stem once more with its norms folded."""
    presets = list(PRESETS.values())
    return presets + [config.without_stem_norms() for config in presets]


def _encoder_shapes(config: PhoneConfig, prefix: str) -> dict[str, torch.Size]:
    """Parameter name -> shape of one encoder; empty for a model without it."""
    with torch.device("meta"):
        if prefix == "vision.":
            encoder: nn.Module = VisionEncoder(config.vision)
        elif config.audio is not None:
            encoder = AudioEncoder(config.audio)
        else:
            return {}
    return {prefix + name: value.shape for name, value in encoder.state_dict().items()}


def _fitted(base: PhoneConfig, state: Mapping[str, Tensor]) -> PhoneConfig:
    """The config with the projectors' own sizes."""
    last, first = state.get("vision_projector.fc2.weight"), state.get("vision_projector.fc1.weight")
    if last is None or first is None:
        raise ConfigError("vision_projector.fc1.weight or fc2.weight is missing; name its file with --projectors")
    has_fusion = any(name.startswith("fusion.") for name in state)
    return _sized(base, last.shape[0], first.shape[0], has_fusion=has_fusion)


def _encoders(config: PhoneConfig) -> tuple[object, object]:
    """The encoders' configs, whether or not their norms are folded."""
    folded = config.without_stem_norms()
    return folded.vision, folded.audio


def _sized(base: PhoneConfig, width: int, projector_size: int, *, has_fusion: bool) -> PhoneConfig:
    # Heads do not show in shapes: they are those of the preset whose decoder is as wide.
    twins = [config.fusion for config in PRESETS.values() if config.text.hidden_size == width]
    num_heads = (twins[0] if twins else base.fusion).num_heads
    return replace(
        base,
        name=next((c.name for c in PRESETS.values() if _encoders(c) == _encoders(base)), "custom"),
        fusion=FusionConfig(num_heads, projector_size, "gcmf" if has_fusion else "concat"),
        text=replace(base.text, hidden_size=width),
    )


def _new_projectors(config: PhoneConfig) -> dict[str, Tensor]:
    """Untrained projectors and fusion, the same each time."""
    width, hidden = config.text.hidden_size, config.fusion.projector_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts: dict[str, nn.Module] = {"vision_projector": VisionProjector(config.vision, hidden, width)}
        if config.audio is not None:
            parts["audio_projector"] = AudioProjector(config.audio, hidden, width)
        parts["fusion"] = GatedCrossModalFusion(width, config.fusion.num_heads)
    return nn.ModuleDict(parts).state_dict()
