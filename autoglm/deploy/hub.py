"""hf:OWNER/REPO[:FILE] and modelscope:OWNER/REPO[:FILE]: GGUF files through the hubs' official client libraries.

The clients are the extra `hub` and are imported only here, on use. They keep what they fetch in their own caches,
so a file another program fetched is not fetched again. Out of a repository with many quantizations the one named
after the colon is taken (a file name, or a quantization such as Q5_K_M), otherwise Q4_K_M or the next best;
a projector (mmproj-*.gguf) comes with it.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from msgspec import Struct

from autoglm.errors import ConfigError, DownloadError

_NAME = re.compile(r"(hf|modelscope):(\w[\w.-]*/\w[\w.-]*)(?::([^:]+))?", re.ASCII)
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
# Best first: the common trade of size and quality, then its neighbours, then the large ones.
_QUANTIZATIONS = (
    "Q4_K_M", "Q4_K_S", "Q4_K", "Q5_K_M", "Q5_K_S", "Q4_1", "Q4_0", "Q5_1", "Q5_0", "Q6_K", "Q8_0",
    "F16", "BF16", "F32",
)  # fmt: skip
_PROJECTOR_TYPES = ("F16", "BF16", "Q8_0", "F32")
_GGUF_MAGIC = b"GGUF"


class HubFiles(Struct, frozen=True):
    """What was fetched: the model's GGUF and its projector, if the repository has one."""

    model: Path
    mmproj: Path | None


class _Hub(Struct, frozen=True):
    """One hub's client as two functions: list a repository's file names, fetch one file."""

    list_files: Callable[[str], list[str]]
    download: Callable[[str, str], str]


def is_hub_name(text: str) -> bool:
    """Whether text names a hub; its form is checked by pull_from_hub."""
    return text.startswith(("hf:", "modelscope:"))


def pull_from_hub(name: str) -> HubFiles:
    """Fetch the chosen files of a repository.

    Raises ConfigError for a malformed name or a missing client library, DownloadError for everything else.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"{name!r} is not of the form hf:OWNER/REPO[:FILE] or modelscope:OWNER/REPO[:FILE]")
    kind, repository, wanted = match.groups()
    hub = _huggingface() if kind == "hf" else _modelscope()
    files = _ask(repository, lambda: hub.list_files(repository))
    chosen = choose_model_file(repository, files, wanted)
    projector = choose_projector_file(files)
    model_path = Path(_ask(repository, lambda: hub.download(repository, chosen)))
    _check_magic(model_path, repository)
    if projector is None:
        return HubFiles(model_path, None)
    projector_path = Path(_ask(repository, lambda: hub.download(repository, projector)))
    _check_magic(projector_path, repository)
    return HubFiles(model_path, projector_path)


def choose_model_file(repository: str, files: Sequence[str], wanted: str | None) -> str:
    """The file to fetch out of a listing. Raises DownloadError naming what there is if none fits."""
    models = sorted(file for file in files if _is_gguf(file) and not _is_projector(file))
    whole = [file for file in models if not _SPLIT.search(file)]
    if not models:
        raise DownloadError(
            f"{repository} holds no .gguf file; look for a repository of the same model with GGUF in its name"
        )
    if wanted is not None:
        named = [file for file in models if wanted in (file, PurePosixPath(file).name)]
        candidates = named or [file for file in whole if _has_type(file, wanted)]
        if not candidates:
            raise DownloadError(f"{repository} holds no {wanted!r}; it holds {_listing(models)}")
        if _SPLIT.search(candidates[0]):
            raise DownloadError(
                f"{candidates[0]} is one part of a split model; name a repository that has it in one file"
            )
        return candidates[0]
    for quantization in _QUANTIZATIONS:
        for file in whole:
            if _has_type(file, quantization):
                return file
    if len(whole) == 1:
        return whole[0]
    raise DownloadError(
        f"{repository} holds no file of a kind this server prefers; name one after a colon: {_listing(whole or models)}"
    )


def choose_projector_file(files: Sequence[str]) -> str | None:
    """The projector to fetch with the model, 16-bit preferred: it is small and sight is sensitive to rounding."""
    projectors = sorted(file for file in files if _is_gguf(file) and _is_projector(file))
    for kind in _PROJECTOR_TYPES:
        for file in projectors:
            if _has_type(file, kind):
                return file
    return projectors[0] if projectors else None


def _is_gguf(file: str) -> bool:
    return file.lower().endswith(".gguf")


def _is_projector(file: str) -> bool:
    return "mmproj" in PurePosixPath(file).name.lower()


def _has_type(file: str, quantization: str) -> bool:
    """Whether the file name holds the quantization as a word of its own: F16 is not in BF16, Q4_K not in Q4_K_M."""
    return (
        re.search(rf"(?<![a-z0-9]){re.escape(quantization)}(?![a-z0-9_])", PurePosixPath(file).name, re.IGNORECASE)
        is not None
    )


def _listing(files: Sequence[str]) -> str:
    shown = ", ".join(files[:8])
    return shown + (f" and {len(files) - 8} more" if len(files) > 8 else "")


def _check_magic(path: Path, repository: str) -> None:
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != _GGUF_MAGIC:
        raise DownloadError(f"{path.name} of {repository} is not a GGUF file (it begins with {magic!r})")


def _ask(repository: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    # The clients raise their own classes, their HTTP library's and ValueError, differently by version.
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise DownloadError(
            f"{repository} could not be fetched: {type(error).__name__}: {reason[:200]}; mend: check the name and the "
            "network; for a private repository log in with the hub's own client first"
        ) from error


def _client(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"the client library {package} is not installed; mend: {sys.executable} -m pip install {package}"
        ) from None


def _huggingface() -> _Hub:
    client = _client("huggingface_hub", "huggingface_hub")
    return _Hub(
        list_files=lambda repository: list(client.HfApi().list_repo_files(repository)),
        download=lambda repository, file: str(client.hf_hub_download(repository, file)),
    )


def _modelscope() -> _Hub:
    api = _client("modelscope.hub.api", "modelscope")
    fetch = _client("modelscope.hub.file_download", "modelscope")
    return _Hub(
        list_files=lambda repository: [
            entry["Path"] for entry in api.HubApi().get_model_files(repository, recursive=True)
        ],
        download=lambda repository, file: str(fetch.model_file_download(repository, file)),
    )
