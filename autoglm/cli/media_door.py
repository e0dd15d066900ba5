"""What reads the pictures and sounds sent to a loaded model, within the memory counted for them."""

from __future__ import annotations

from autoglm.cli.loading import LoadedModel
from autoglm.media.room import MediaRoom
from autoglm.media.sources import MediaSources
from autoglm.server.media import MediaDoor


def open_door(loaded: LoadedModel, sources: MediaSources, max_pixels: int | None = None) -> MediaDoor | None:
    """What reads a server's pictures and sounds, within the memory counted for them; None without an mmproj."""
    if loaded.multimodal is None or loaded.media is None:
        return None
    room = MediaRoom(loaded.media.decoded_bytes)
    return MediaDoor(loaded.multimodal, sources, sources.limits, max_pixels, loaded.most_pixels, loaded.media, room)
