"""OpenAI content parts that carry media -> where their bytes are: image_url, input_audio and audio_url.

Both spellings of an address are taken, {"url": ...} and a bare string. A field that would have no effect here is an
error that names it, `detail` "low" too: it has no size of its own, max_pixels does. The format that input_audio names
is a hint only, the bytes themselves decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from autoglm.errors import RequestError
from autoglm.media.limits import MediaLimits

KINDS: Mapping[str, Literal["picture", "sound"]] = {
    "image_url": "picture",
    "input_audio": "sound",
    "audio_url": "sound",
}
_FIELDS = {"image_url": {"url", "detail"}, "input_audio": {"data", "format"}, "audio_url": {"url"}}
# Providers behind other APIs put this beside any part; it changes no answer.
_IGNORED = {"cache_control"}
_DETAILS = (None, "auto", "high")


class MediaPart(Struct, frozen=True):
    """One picture or sound of a request, not yet read.

    kind    picture or sound
    url     data:, http:, https: or file: address; None where the bytes stand in the request itself
    base64  those bytes; None where there is an address
    param   the field's path in the request, for errors
    """

    kind: Literal["picture", "sound"]
    url: str | None
    base64: str | None
    param: str


def media_part(part: Mapping[str, Any], param: str) -> MediaPart | None:
    """The medium in a content part; None for a part of another type. Raises RequestError naming the field."""
    name = part.get("type")
    if not isinstance(name, str) or name not in KINDS:
        return None
    _refuse_unknown(part, {"type", name} | _IGNORED, param)
    body, param = part.get(name), f"{param}.{name}"
    if isinstance(body, str):
        body = {"data" if name == "input_audio" else "url": body}
    if not isinstance(body, Mapping):
        raise _refusal(param, "must be an object")
    _refuse_unknown(body, _FIELDS[name], param)
    if body.get("detail") not in _DETAILS:
        raise _refusal(f"{param}.detail", 'must be "auto" or "high"; send max_pixels for a smaller picture')
    key = "data" if name == "input_audio" else "url"
    address, param = body.get(key), f"{param}.{key}"
    if not isinstance(address, str) or not address:
        raise _refusal(param, "must be a text that is not empty")
    if key == "url" or address[:5].lower() == "data:":
        return MediaPart(KINDS[name], address, None, param)
    return MediaPart(KINDS[name], None, address, param)


def check_counts(parts: Sequence[MediaPart], limits: MediaLimits) -> None:
    """Raises RequestError for more pictures or sounds than a request may have."""
    for kind, most in (("picture", limits.max_pictures), ("sound", limits.max_sounds)):
        found = [part for part in parts if part.kind == kind]
        if len(found) > most:
            raise RequestError(
                f"the request has {len(found)} {kind}s, at most {most} are read; leave out those of earlier turns",
                param=found[most].param,
                code="too_many_media",
            )


def _refuse_unknown(body: Mapping[str, Any], known: set[str], param: str) -> None:
    for name in body:
        if name not in known:
            raise _refusal(f"{param}.{str(name)[:40]}", "is not a field of this part and would have no effect")


def _refusal(param: str, what: str) -> RequestError:
    return RequestError(f"{param}: {what}", param=param, code="invalid_value")
