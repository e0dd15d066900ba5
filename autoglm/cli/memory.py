"""Memory of a model and its media: counted from headers before anything slow, told in one table of log lines."""

from __future__ import annotations

from autoglm.cli.console import size
from autoglm.config import EngineConfig
from autoglm.engine.fit import MediaMemory, MemoryPlan
from autoglm.media.limits import MediaLimits
from autoglm.media.pictures import DECODING_BYTES_PER_PIXEL


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
