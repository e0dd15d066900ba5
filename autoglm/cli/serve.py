"""autoglm serve: check, load, listen, drain. The log lines and their order are part of the product."""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from autoglm.cli.console import ProgressBars
from autoglm.cli.loading import (
    LoadedModel,
    ModelOptions,
    check_model_option,
    describe,
    find_model,
    load_model,
    open_door,
    served_names,
)
from autoglm.cli.self_check import check_taps
from autoglm.deploy import preflight
from autoglm.errors import ConfigError
from autoglm.media.limits import MediaLimits
from autoglm.media.remote_media import RemoteMedia
from autoglm.media.sources import MediaSources
from autoglm.server.app import create_app, run_server
from autoglm.server.driver import EngineDriver
from autoglm.server.listen import reserve_socket
from autoglm.server.media import MediaDoor
from autoglm.server.settings import ServerSettings

logger = logging.getLogger("autoglm.cli")


@dataclass(frozen=True)
class ServeOptions:
    """The flags about the HTTP side."""

    host: str = preflight.DEFAULT_HOST
    port: int = preflight.DEFAULT_PORT
    api_key: str | None = None
    allow_remote_media: tuple[str, ...] = ()
    media_path: Path | None = None
    max_pixels: int | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    actions: bool = False
    self_check: bool = True
    prebuild: bool = True


def serve(model: ModelOptions, options: ServeOptions) -> None:
    """Serve until a signal ends it. Everything that can be refused is refused before the model is read."""
    _check(model, options)
    settings = ServerSettings(
        allowed_origins=options.allowed_origins,
        allowed_hosts=options.allowed_hosts,
        actions=options.actions,
        prebuild=options.prebuild,
    )
    model_id, _ = served_names(model)
    logger.info(f"Starting {model_id} server...")
    # Held from now on, so that no other program takes the port while the model loads.
    with reserve_socket(options.host, options.port) as sock:
        with ProgressBars() as bars:
            options_for_media = replace(model, max_pixels=options.max_pixels)
            loaded = load_model(find_model(model, bars.report), options_for_media, bars.report)
        logger.info(describe(loaded))
        if options.self_check:
            check_taps(loaded)
        if options.api_key is None and not _is_loopback(options.host):
            logger.warning(
                f"{options.host} is open to the network and no --api-key is set: "
                "whoever reaches this machine can use the model"
            )
        app = create_app(
            EngineDriver(loaded.engine),
            loaded.tokenizer,
            loaded.template,
            model_id=loaded.model_id,
            aliases=loaded.aliases,
            api_key=options.api_key,
            settings=settings,
            media=_media_door(loaded, options),
        )
        run_server(app, sock=sock, log=_announce)


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
    limits = MediaLimits()
    remote = RemoteMedia(options.allow_remote_media, limits) if options.allow_remote_media else None
    sources = MediaSources(limits, remote=remote, folder=options.media_path)
    return open_door(loaded, sources, options.max_pixels)


def _announce(line: str) -> None:
    logger.info(line.removeprefix("INFO: "))


def _check(model: ModelOptions, options: ServeOptions) -> None:
    if options.api_key is not None and not options.api_key.strip():
        raise ConfigError("--api-key (or AUTOGLM_API_KEY) is empty; give a key, or leave it out to take any")
    check_model_option(model)
    try:
        preflight.check_port(options.host, options.port)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
