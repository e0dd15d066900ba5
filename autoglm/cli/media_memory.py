"""Memory of pictures and sounds, counted from an mmproj's header; read only for a model that has one."""

from __future__ import annotations

from msgspec.structs import replace

from autoglm.config import DEFAULT_BATCHED_TOKENS, EngineConfig, ModelConfig
from autoglm.engine.fit import MediaMemory, MemoryPlan, decoded_media_bytes
from autoglm.formats.gguf import GGUFFile
from autoglm.model.encoder_memory import picture_bytes, sound_bytes, weights_bytes
from autoglm.model.multimodal import REMEMBERED_BYTES
from autoglm.model.projector import has_audio_encoder, pixel_budget, two_way_tokens


def encoders_by_part(mmproj: GGUFFile, in_floats: bool) -> dict[str, int]:
    """Bytes of the weights of each encoder that is there, as they are computed with."""
    sums = weights_bytes(mmproj, in_floats)
    return {f"{name} encoder": num_bytes for name, num_bytes in sums.items() if num_bytes}


def with_media_cache(config: EngineConfig, available_bytes: int) -> EngineConfig:
    """On a small machine fewer embeddings are kept for later turns: a sixteenth of what is free, at most."""
    return replace(config, media_cache_bytes=min(config.media_cache_bytes, available_bytes // 16))


def with_room_for_media(config: EngineConfig, mmproj: GGUFFile, model: ModelConfig, max_sound_s: float) -> EngineConfig:
    """A step long enough for the largest medium whose tokens see each other both ways."""
    if config.max_num_batched_tokens is not None:
        return config
    longest = two_way_tokens(mmproj, model, max_sound_s)
    needed = longest + config.max_num_seqs
    return replace(config, max_num_batched_tokens=needed) if needed > DEFAULT_BATCHED_TOKENS else config


def media_memory(
    mmproj: GGUFFile, config: EngineConfig, available_bytes: int, *, max_pixels: int | None, max_sound_s: float
) -> MediaMemory:
    """What pictures and sounds will take. Raises ConfigError for a max_pixels that could have no effect."""
    budget = pixel_budget(mmproj, max_pixels)
    return MediaMemory(
        min_pixels=budget.min_pixels,
        max_pixels=budget.default,
        picture_bytes=lambda pixels: picture_bytes(mmproj, pixels),
        sound_bytes=sound_bytes(mmproj, max_sound_s) if has_audio_encoder(mmproj) else 0,
        decoded_bytes=decoded_media_bytes(available_bytes),
        kept_bytes=config.media_cache_bytes + REMEMBERED_BYTES,
    )


def most_pixels(mmproj: GGUFFile, media: MediaMemory, plan: MemoryPlan) -> int:
    """What a request's max_pixels may reach: the model's maximum, or what half of the memory left over encodes."""
    spare_bytes = max(0, plan.available_bytes - plan.total_bytes) // 2
    largest = pixel_budget(mmproj).max_pixels
    return max(media.max_pixels, media.largest_picture(media.encoder_bytes + spare_bytes, largest))
