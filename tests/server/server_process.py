"""A server of its own process for test_listen.py: port and step time come as arguments."""

from __future__ import annotations

import logging
import sys

from autoglm.chat.template import ChatTemplate
from autoglm.chat.tokenizer import Tokenizer
from autoglm.config import EngineConfig
from autoglm.engine.engine import Engine
from autoglm.errors import AutoglmError
from autoglm.formats.gguf import GGUFFile
from autoglm.server.app import create_app, run_server
from autoglm.server.driver import EngineDriver
from autoglm.server.settings import ServerSettings
from tests.server.scripted_runner import ScriptedRunner


def main(path: str, port: str, step_s: str, drain_timeout_s: str) -> int:
    """Serve the tiny model's tokenizer on a scripted runner until a signal comes."""
    logging.basicConfig(level=logging.DEBUG)
    with GGUFFile.open(path) as gguf:
        tokenizer, template = Tokenizer.from_gguf(gguf), ChatTemplate.from_gguf(gguf, None)
    runner = ScriptedRunner(tokenizer, "open the settings page and wait", step_s=float(step_s))
    app = create_app(
        EngineDriver(Engine(runner, tokenizer, EngineConfig())),
        tokenizer,
        template,
        model_id="tiny",
        settings=ServerSettings(drain_timeout_s=float(drain_timeout_s)),
    )
    try:
        run_server(app, "127.0.0.1", int(port))
    except AutoglmError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
