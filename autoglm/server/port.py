"""Reserve the port a server will listen on, so that a taken one is known before anything slow is done."""

from __future__ import annotations

import errno
import socket
import sys

from autoglm.errors import ConfigError


def reserve_socket(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening.

    port  0 lets the system choose one
    Raises ConfigError with the mend: taken, forbidden, or no such address.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port is {port}, expected 0 to 65535")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"--host {host!r} is no address of this machine; use 127.0.0.1 or 0.0.0.0") from None
    sock = socket.socket(family, kind, proto)
    try:
        if sys.platform != "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(bind_problem(host, port, error)) from None
    return sock


def bind_problem(host: str, port: int, error: OSError) -> str:
    """Why a server cannot listen there, in one sentence with the mend."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken by another program; stop that one or use --port with another number"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} needs rights this user lacks; use --port with a number over 1023"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is no address of this machine; use 127.0.0.1 or 0.0.0.0"
    return f"cannot listen on {host} port {port}: {error.strerror}"
