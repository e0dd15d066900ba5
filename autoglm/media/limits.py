"""How much media one request may bring; everything here is checked before the costly part begins."""

from __future__ import annotations

import math

from msgspec import Struct

from autoglm.errors import ConfigError


class MediaLimits(Struct, frozen=True):
    """Limits of one request. Raises ConfigError for a value that is not above zero.

    max_pictures, max_sounds  how many parts of each kind
    max_picture_bytes         of one picture file as it is sent, after base64
    max_sound_bytes           of one sound file; 60 s of 48 kHz stereo in 24 bits are 17 MB
    max_total_bytes           of all media files of the request together
    max_picture_pixels        width times height of one picture; the default holds an 8K screen (7680 x 4320)
    max_sound_s               length of one sound in seconds; what Nano hears at most
    remote_timeout_s          for one http(s) address, redirects included
    max_redirects             hops after the first address
    """

    max_pictures: int = 10
    max_sounds: int = 4
    max_picture_bytes: int = 20 << 20
    max_sound_bytes: int = 25 << 20
    max_total_bytes: int = 64 << 20
    max_picture_pixels: int = 1 << 25
    max_sound_s: float = 60.0
    remote_timeout_s: float = 10.0
    max_redirects: int = 3

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
