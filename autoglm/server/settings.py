"""What the person who runs the server may choose about its HTTP side, checked on creation."""

from __future__ import annotations

from msgspec import Struct

from autoglm.errors import ConfigError


class ServerSettings(Struct, frozen=True):
    """Limits and doors of the HTTP server.

    max_body_bytes      a larger request body is refused with 413 before it is read whole
    body_timeout_s      longest silence while a body is being sent
    keep_alive_s        an SSE comment is sent after so many seconds without a token
    drain_timeout_s     how long running requests may go on after SIGTERM
    allowed_origins     browser origins that may use the server ("*" = any); none by default
    actions             answers are AutoGLM actions where a request names neither response_format nor tools
    prebuild            what a phone agent's next request begins with is computed while nobody is served
    allowed_hosts       extra Host names taken on a loopback address (see guard.py)
    """

    max_body_bytes: int = 32 << 20
    body_timeout_s: float = 60.0
    keep_alive_s: float = 5.0
    drain_timeout_s: float = 60.0
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    actions: bool = False
    prebuild: bool = True
    metrics_prefix: str = "autoglm"

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "body_timeout_s", "keep_alive_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected more than 0")
        if self.drain_timeout_s < 0:
            raise ConfigError(f"drain_timeout_s is {self.drain_timeout_s}, expected 0 or more")
        for origin in self.allowed_origins:
            if origin != "*" and ("://" not in origin or origin.endswith("/")):
                raise ConfigError(
                    f"allowed_origins holds {origin!r}; write an origin as a browser sends it, "
                    "such as http://localhost:3000, without a path"
                )
