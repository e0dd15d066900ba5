"""Memory of a model and its media: counted from headers before anything slow, told in one table of log lines."""

from __future__ import annotations

from dataclasses import replace

from autoglm.cli.console import size
from autoglm.config import EngineConfig
from autoglm.engine.fit import MediaMemory, MemoryPlan, decoded_media_bytes
from autoglm.formats.gguf import GGUFFile
from autoglm.media.limits import MediaLimits
from autoglm.media.pictures import DECODING_BYTES_PER_PIXEL
from autoglm.model.encoder_memory import picture_bytes, sound_bytes, weights_bytes
from autoglm.model.loader import float_bytes
from autoglm.model.multimodal import REMEMBERED_BYTES
from autoglm.model.projector import has_audio_encoder, pixel_budget


def with_media_cache(config: EngineConfig, available_bytes: int) -> EngineConfig:
    """On a small machine fewer embeddings are kept for later turns: a sixteenth of what is free, at most."""
    return replace(config, media_cache_bytes=min(config.media_cache_bytes, available_bytes // 16))


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


def weights_by_part(text: GGUFFile, mmproj: GGUFFile | None, in_floats: bool) -> dict[str, int]:
    """Bytes of the weights of each part that is there, as they are computed with."""
    parts = {"backbone": float_bytes(text) if in_floats else sum(tensor.nbytes for tensor in text.tensors.values())}
    if mmproj is not None:
        sums = weights_bytes(mmproj, in_floats)
        parts |= {f"{name} encoder": num_bytes for name, num_bytes in sums.items() if num_bytes}
    return parts


def memory_table(
    parts: dict[str, int],
    config: EngineConfig,
    plan: MemoryPlan,
    media: MediaMemory | None,
    limits: MediaLimits,
) -> list[str]:
    """One line a part: what it is, how much it takes, and what that depends on; the last one is the sum."""
    # In memory weights are laid out anew; each part has its share of that.
    factor = plan.weights_bytes / max(1, sum(parts.values()))
    kind = config.cache_type_k
    if config.cache_type_v != kind:
        kind = f"{config.cache_type_k}/{config.cache_type_v}"
    pool_tokens = (config.num_kv_blocks or 0) * config.block_size
    rows = [(f"weights of the {name}", num_bytes * factor, "") for name, num_bytes in parts.items()]
    rows.append(("KV cache", plan.kv_pool_bytes, f"{pool_tokens} tokens, {kind}"))
    rows.append(("work buffers", plan.workspace_bytes, f"the process, and steps of {config.token_budget} tokens"))
    if media is not None:
        rows += _media_rows(media, limits)
    rows.append(("all together", plan.total_bytes, f"of {size(plan.available_bytes)} free"))
    label = max(len(what) for what, _, _ in rows)
    return [f"Memory: {what:{label}} {size(num_bytes):>9}  {why}".rstrip() for what, num_bytes, why in rows]


def _media_rows(media: MediaMemory, limits: MediaLimits) -> list[tuple[str, float, str]]:
    pixels = min(limits.max_picture_pixels, media.decoded_bytes // DECODING_BYTES_PER_PIXEL)
    request = f"{limits.max_pictures} pictures"
    largest = f"of {media.max_pixels} pixels; one picture or sound at a time"
    rows: list[tuple[str, float, str]] = [("encoding a picture", media.picture_bytes(media.max_pixels), largest)]
    if media.sound_bytes:
        request += f" and {limits.max_sounds} sounds"
        rows.append(("encoding a sound", media.sound_bytes, f"of {limits.max_sound_s:g} s; the larger counts"))
    shared = f"shared by all requests of up to {request} each; a picture up to {pixels / 1e6:.1f} megapixels"
    rows.append(("decoded media", media.decoded_bytes, shared))
    rows.append(("embeddings kept", media.kept_bytes, "of pictures and sounds, for later turns"))
    return rows
