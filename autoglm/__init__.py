"""autoglm: serve a GGUF over the OpenAI API on its own CPU engine. Public names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoglm.actions import Action, format_action, parse_action
    from autoglm.engine.engine import Engine
    from autoglm.engine.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["Action", "Engine", "SamplingParams", "__version__", "format_action", "parse_action"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for, so that `import autoglm` stays light."""
    if name == "Engine":
        from autoglm.engine.engine import Engine

        return Engine
    if name == "SamplingParams":
        from autoglm.engine.sampling import SamplingParams

        return SamplingParams
    if name in ("Action", "format_action", "parse_action"):
        from autoglm import actions

        return getattr(actions, name)
    raise AttributeError(f"module 'autoglm' has no attribute {name!r}")
