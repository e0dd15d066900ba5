"""Where media come from: base64 in the request always; http(s) hosts and one folder of files only if the operator said.

Sizes are checked before bytes are copied: of base64 by its length, of files by their status, of answers while they
stream.
"""

from __future__ import annotations

import asyncio
import base64
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from autoglm.errors import ConfigError, RequestError
from autoglm.media.content_parts import MediaPart, check_counts
from autoglm.media.limits import MediaLimits
from autoglm.media.remote_media import RemoteMedia

_LINE_BREAKS = b" \t\r\n"


class MediaSources:
    """Reads the bytes of a request's media, within `limits`.

    remote  http(s) fetching from named hosts; None refuses every http(s) address
    folder  file: addresses under it are read; None refuses them all
    Raises ConfigError where folder is no folder.
    """

    def __init__(self, limits: MediaLimits, *, remote: RemoteMedia | None = None, folder: Path | None = None) -> None:
        self.limits = limits
        self._remote = remote
        self._folder = None if folder is None else os.path.realpath(folder)
        if self._folder is not None and not os.path.isdir(self._folder):
            raise ConfigError(f"--media-path must name a folder, {str(folder)[:200]!r} is none")

    async def read(self, parts: Sequence[MediaPart]) -> list[bytes]:
        """The bytes of each part, in order.

        Raises RequestError naming the part: too many or too large, not base64, an address that is not allowed.
        """
        check_counts(parts, self.limits)
        files: list[bytes] = []
        left = self.limits.max_total_bytes
        for part in parts:
            most = self.limits.max_picture_bytes if part.kind == "picture" else self.limits.max_sound_bytes
            data = await self._read_one(part, most)
            left -= len(data)
            if left < 0:
                raise too_large(part.param, self.limits.max_total_bytes, "all media together are")
            files.append(data)
        return files

    async def _read_one(self, part: MediaPart, max_bytes: int) -> bytes:
        if part.base64 is not None:
            return await asyncio.to_thread(decode_base64, part.base64, max_bytes=max_bytes, param=part.param)
        url = part.url or ""
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return await asyncio.to_thread(read_data_uri, url, max_bytes=max_bytes, param=part.param)
        if scheme in ("http", "https"):
            if self._remote is None:
                raise _refusal(
                    part.param,
                    "http(s) addresses are not fetched; send a data: URI, or start the server with "
                    "--allow-remote-media HOST",
                )
            return await self._remote.fetch(url, max_bytes=max_bytes, param=part.param)
        if scheme == "file":
            if self._folder is None:
                raise _refusal(
                    part.param,
                    "file: addresses are not read; send a data: URI, or start the server with --media-path FOLDER",
                )
            return await asyncio.to_thread(read_file, url, self._folder, max_bytes=max_bytes, param=part.param)
        raise _refusal(part.param, "must be a data: URI with base64, or an http(s) or file: address if those are on")


def read_data_uri(url: str, *, max_bytes: int, param: str) -> bytes:
    """The bytes of `data:[type][;...];base64,...`; the type is not looked at, the bytes tell what they are."""
    head, comma, text = url[:200].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _refusal(param, "a data: URI must have the form data:TYPE;base64,BYTES")
    return decode_base64(url[len(head) + 1 :], max_bytes=max_bytes, param=param)


def decode_base64(text: str, *, max_bytes: int, param: str) -> bytes:
    """Standard base64, line breaks allowed. Raises RequestError, for more than `max_bytes` before decoding."""
    if len(text) > 2 * max_bytes + 1024:
        raise too_large(param, max_bytes)
    try:
        encoded = text.encode("ascii").translate(None, _LINE_BREAKS)
        if len(encoded) // 4 * 3 - encoded[-2:].count(b"=") > max_bytes:
            raise too_large(param, max_bytes)
        data = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise _refusal(param, "is not base64") from None
    if not data:
        raise _refusal(param, "holds no bytes")
    return data


def read_file(url: str, folder: str, *, max_bytes: int, param: str) -> bytes:
    """The file at an absolute file: address, if links and dots leave it under `folder` (itself a real path).

    One error for all that is outside, missing or no plain file, so that nothing is learnt about other folders.
    """
    refusal = _refusal(param, "names no readable file under the server's --media-path")
    try:
        parts = urlsplit(url)
        path = unquote(parts.path, errors="strict")
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not path.startswith("/"):
            raise refusal
        real = os.path.realpath(path)
        if os.path.commonpath((real, folder)) != folder:
            raise refusal
        # The path is real by now: a link put in its last place since then is not followed, a pipe does not block.
        with open(os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise refusal
            if status.st_size > max_bytes:
                raise too_large(param, max_bytes)
            data = file.read(max_bytes + 1)
    except (OSError, ValueError):
        raise refusal from None
    if len(data) > max_bytes:
        raise too_large(param, max_bytes)
    return data


def too_large(param: str, max_bytes: int, what: str = "the file is") -> RequestError:
    """The error for bytes over their limit."""
    return RequestError(
        f"{param}: {what} larger than {max_bytes} bytes; send a smaller file",
        param=param,
        code="media_too_large",
    )


def _refusal(param: str, what: str) -> RequestError:
    return RequestError(f"{param}: {what}", param=param, code="invalid_value")
