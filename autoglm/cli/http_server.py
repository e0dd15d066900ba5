"""A loaded model behind the HTTP API: self-check, what reads media, the application, until a signal ends it."""

from __future__ import annotations

import functools
import importlib
import logging
import socket
import threading
import time

from autoglm.cli import start_files
from autoglm.cli.loading import LoadedModel
from autoglm.cli.serve import ServeOptions
from autoglm.errors import ConfigError
from autoglm.server.app import create_app, run_server
from autoglm.server.driver import EngineDriver
from autoglm.server.media import MediaDoor
from autoglm.server.settings import ServerSettings

logger = logging.getLogger("autoglm.cli")

_FIRST_REQUEST_S = 0.25
# Read before the first picture or sound comes, and never for a model without eyes and ears.
_MEDIA_MODULES = ("PIL.Image", "soundfile", "soxr")


def run(loaded: LoadedModel, options: ServeOptions, settings: ServerSettings, sock: socket.socket) -> None:
    """Serve on `sock` until a signal ends it. Raises FormatError for a model that fails its self-check."""
    if options.self_check and loaded.multimodal is not None:
        from autoglm.cli.self_check import check_taps

        check_taps(loaded)
    driver = EngineDriver(loaded.engine)
    app = create_app(
        driver,
        loaded.tokenizer,
        loaded.template,
        model_id=loaded.model_id,
        aliases=loaded.aliases,
        api_key=options.api_key,
        settings=settings,
        media=_media_door(loaded, options),
    )
    run_server(app, sock=sock, log=functools.partial(_announce, loaded, driver))


def _media_door(loaded: LoadedModel, options: ServeOptions) -> MediaDoor | None:
    """What reads pictures and sounds; None without an mmproj. Raises ConfigError for flags that cannot take effect."""
    if loaded.multimodal is None:
        given = [
            flag
            for flag, value in (
                ("--allow-remote-media", options.allow_remote_media),
                ("--media-path", options.media_path),
                ("--max-pixels", options.max_pixels),
            )
            if value
        ]
        if given:
            raise ConfigError(f"{given[0]} has no effect: no mmproj is loaded; mend: name one with --mmproj")
        return None
    from autoglm.cli.media_door import open_door
    from autoglm.media.limits import MediaLimits
    from autoglm.media.remote_media import RemoteMedia
    from autoglm.media.sources import MediaSources

    limits = MediaLimits()
    remote = RemoteMedia(options.allow_remote_media, limits) if options.allow_remote_media else None
    sources = MediaSources(limits, remote=remote, folder=options.media_path)
    return open_door(loaded, sources, options.max_pixels)


def _announce(loaded: LoadedModel, driver: EngineDriver, line: str) -> None:
    logger.info(line.removeprefix("INFO: "))
    threading.Thread(target=_after_start, args=(loaded, driver)).start()


def _after_start(loaded: LoadedModel, driver: EngineDriver) -> None:
    """What is left to do once the port is open, after a moment for the first request, which waits for this thread's
    share of the interpreter otherwise. Weights that were read into small pages move while nobody is served."""
    time.sleep(_FIRST_REQUEST_S)
    start_files.remember()
    if loaded.multimodal is not None:
        for module in _MEDIA_MODULES:
            importlib.import_module(module)
    while driver.status == "ready" and (driver.num_in_flight or loaded.runtime.collapse()):
        if driver.num_in_flight:
            time.sleep(_FIRST_REQUEST_S)
