"""Checks before anything slow: is the port free, are the named files there.

Standard library only, no import of our own: run_autoglm_server.sh runs this file by path with the system's
Python before the package is built, and `autoglm serve` calls the same functions. That is why errors are plain
ValueError here; the command line turns them into ConfigError.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
from typing import NoReturn

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000


def check_port(host: str, port: int) -> None:
    """Raises ValueError unless host:port can be listened on; port 0 asks the system for a free one."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}, expected 0 to 65535")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"--host {host!r} is not an address of this machine ({error})") from None
    family, kind, protocol, _, address = addresses[0]
    with socket.socket(family, kind, protocol) as probe:
        # As the server itself does: a port whose last connections are still closing counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            # Without listening, BSD systems let a second socket bind to a port that is being served.
            probe.listen(1)
        except OSError as error:
            raise ValueError(_port_problem(host, port, error)) from None


def _port_problem(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is taken by another program; stop that program, "
            f"or choose another port: --port {free_port(host, port)}"
        )
    if error.errno == errno.EACCES:
        return f"port {port} needs administrator rights; choose one from 1024 up, e.g. --port 8000"
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"--host {host} is not an address of this machine; 127.0.0.1 serves this machine only, "
            "0.0.0.0 every network it is in"
        )
    return f"cannot listen on {host}:{port}: {error.strerror or error}"


def free_port(host: str, taken: int) -> int:
    """A port near `taken` that is free now, for a suggestion."""
    for port in range(taken + 1, min(taken + 50, 65536)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((host, port))
                return port
            except OSError:
                continue
    return 0


def check_model_file(path: str) -> None:
    """Raises ValueError unless path is a readable file."""
    if os.path.isdir(path):
        inside = sorted(name for name in os.listdir(path) if name.endswith(".gguf") and not name.startswith("mmproj"))
        hint = f"; it holds {', '.join(inside[:4])}: name one of them" if inside else "; name the .gguf file in it"
        raise ValueError(f"--model {path} is a folder{hint}")
    if not os.path.exists(path):
        raise ValueError(f"model file '{path}' not found; check the path, or leave --model out for the default model")
    if not os.access(path, os.R_OK):
        raise ValueError(f"model file '{path}' cannot be read by this user; mend: chmod u+r '{path}'")


def check_mmproj_file(path: str) -> None:
    """Raises ValueError unless the multimodal projector file exists."""
    if not os.path.isfile(path):
        raise ValueError(
            f"Cannot load multimodal projector, file '{path}' not found. "
            "It holds the vision encoder and the projector that turn pictures into tokens; it is the file named "
            "mmproj-*.gguf beside the model's .gguf where that was published (try: autoglm pull hf:OWNER/REPO). "
            "For text alone leave --mmproj out"
        )


def _looks_like_path(text: str) -> bool:
    return not text.startswith(("hf:", "modelscope:")) and (text.lower().endswith(".gguf") or os.sep in text)


class _QuietParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(arguments: list[str]) -> int:
    """Check the flags of `autoglm serve` that can be checked without it; everything else passes unread."""
    parser = _QuietParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default=DEFAULT_HOST)
    parser.add_argument("--port", default=str(DEFAULT_PORT))
    parser.add_argument("-m", "--model")
    parser.add_argument("--mmproj")
    parser.add_argument("--help", action="store_true")
    try:
        options, _ = parser.parse_known_args(arguments)
    except ValueError:
        return 0  # A malformed command line is explained by the real parser, which knows every flag.
    if options.help or not options.port.isascii() or not options.port.isdigit():
        return 0
    try:
        if options.mmproj is not None:
            check_mmproj_file(options.mmproj)
        # What does not look like a path may be a model's name; those are known to `autoglm serve` only.
        if options.model is not None and _looks_like_path(options.model):
            check_model_file(options.model)
        check_port(options.host, int(options.port))
    except ValueError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
