"""autoglm serve: check, load, listen, drain. The log lines and their order are part of the product.

Most of a start is Python reading modules. So nothing is imported here that loading a model does without; the
HTTP side (http_server.py) comes in while native threads read the weights.
"""

from __future__ import annotations

import functools
import gc
import ipaddress
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from autoglm.cli.console import ProgressBars
from autoglm.cli.loading import (
    LoadedModel,
    ModelOptions,
    check_model_option,
    describe,
    find_model,
    load_model,
    served_names,
)
from autoglm.deploy import preflight
from autoglm.errors import ConfigError
from autoglm.server.port import reserve_socket
from autoglm.server.settings import ServerSettings

logger = logging.getLogger("autoglm.cli")


class ServeOptions(Struct, frozen=True):
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


# Serves a loaded model on a reserved port until a signal ends it: http_server.run.
HttpServer = Callable[[LoadedModel, "ServeOptions", ServerSettings, socket.socket], None]


def serve(model: ModelOptions, options: ServeOptions, import_http_server: Callable[[], HttpServer]) -> None:
    """Serve until a signal ends it. Everything that can be refused is refused before the weights are read, or in the
    first of that time."""
    _check(model, options)
    settings = ServerSettings(
        allowed_origins=options.allowed_origins,
        allowed_hosts=options.allowed_hosts,
        actions=options.actions,
        prebuild=options.prebuild,
    )
    model_id, _ = served_names(model)
    http_server = functools.cache(import_http_server)
    logger.info(f"Starting {model_id} server...")
    # Held from now on, so that no other program takes the port while the model loads.
    with reserve_socket(options.host, options.port) as sock:
        with ProgressBars() as bars:
            options_for_media = replace(model, max_pixels=options.max_pixels)
            loaded = load_model(find_model(model, bars.report), options_for_media, bars.report, meanwhile=http_server)
        logger.info(describe(loaded))
        if options.api_key is None and not _is_loopback(options.host):
            logger.warning(
                f"{options.host} is open to the network and no --api-key is set: "
                "whoever reaches this machine can use the model"
            )
        gc.freeze()  # vocabulary and modules live on; no collection need walk through them again
        gc.enable()
        try:
            http_server()(loaded, options, settings, sock)
        finally:
            gc.unfreeze()  # or native objects in a cycle would be reported as leaked at the end


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
