"""autoglm: serve a GGUF over the OpenAI API on its own CPU engine. Public names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoglm.engine.engine import Engine
    from autoglm.engine.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["Engine", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for, so that `import autoglm` stays light."""
    if name == "Engine":
        from autoglm.engine.engine import Engine

        return Engine
    if name == "SamplingParams":
        from autoglm.engine.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'autoglm' has no attribute {name!r}")
