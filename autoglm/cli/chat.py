"""autoglm chat: a conversation in the terminal, with a model loaded here or with a running server."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from autoglm.cli.api_client import Answer, ApiClient, ServerError, connect
from autoglm.cli.console import print_answer, printable
from autoglm.cli.loading import ModelOptions
from autoglm.cli.media_files import picture_part, sound_part
from autoglm.errors import ConfigError

_HELP = """/image FILE, /audio FILE  show a picture or play a sound with the next message (an empty line sends it alone)
/reset  forget the conversation     /system TEXT  begin anew with a system message
/think on|off  let the model think first, or not     /exit  leave (also Ctrl-D)
Ctrl-C stops an answer."""


@dataclass(frozen=True)
class ChatOptions:
    """What the flags of `autoglm chat` say; None leaves the choice to the server."""

    url: str | None = None
    api_key: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    thinking: bool | None = None


def run_chat(model: ModelOptions, options: ChatOptions) -> None:
    """Chat until the person leaves."""
    with connect(model, options.url, options.api_key) as client:
        _Conversation(client, options).run()


class _Conversation:
    """The loop of question and answer; keeps the history the server does not."""

    def __init__(self, client: ApiClient, options: ChatOptions) -> None:
        self._client = client
        self._options = options
        self._thinking = options.thinking
        self._console = Console(highlight=False)
        self._messages: list[dict[str, Any]] = []
        self._attached: list[dict[str, Any]] = []  # media of the next message
        self._reset(options.system)

    def run(self) -> None:
        """Read a line, answer it, until the end of input or /exit."""
        if sys.stdin.isatty():
            self._console.print(
                f"[bold]{printable(self._client.model)}[/bold]  /help lists the commands", soft_wrap=True
            )
        while (line := self._read_line()) is not None:
            if line.startswith("/"):
                if not self._command(line):
                    return
            elif line or self._attached:
                self._ask(line)

    def _read_line(self) -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()
            return None

    def _reset(self, system: str | None) -> None:
        self._messages = [] if not system else [{"role": "system", "content": system}]
        self._attached = []

    def _command(self, line: str) -> bool:
        """Carry out a /command; False means leave."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command in ("/exit", "/quit", "/bye"):
            return False
        if command == "/reset":
            self._reset(self._options.system)
            print("The conversation is forgotten.")
        elif command == "/system" and argument:
            self._reset(argument)
            print("The conversation begins anew with that system message.")
        elif command == "/think" and argument in ("on", "off"):
            self._thinking = argument == "on"
            print(f"Thinking is {argument}.")
        elif command in ("/image", "/audio") and argument:
            self._attach(command, argument)
        else:
            print(_HELP)
        return True

    def _attach(self, command: str, name: str) -> None:
        # A file dragged into a terminal comes in quotes.
        path = Path(name.strip("'\"")).expanduser()
        try:
            self._attached.append(picture_part(path)[1] if command == "/image" else sound_part(path))
        except ConfigError as error:
            print(f"ERROR: {printable(str(error), 2000)}", file=sys.stderr)
            return
        print("It goes with the next message.")

    def _ask(self, text: str) -> None:
        content: str | list[dict[str, Any]] = text
        if self._attached:
            content = [*self._attached, *([{"type": "text", "text": text}] if text else [])]
        self._attached = []
        self._messages.append({"role": "user", "content": content})
        answer = Answer()
        try:
            print_answer(self._console, self._client.stream(self._body(), answer))
        except KeyboardInterrupt:
            print(" [stopped]")
        except ServerError as error:
            # The conversation goes on; the question that failed is not part of it.
            self._messages.pop()
            print(f"ERROR: {error}", file=sys.stderr)
            return
        if answer.finish_reason == "length":
            print("[the answer was cut off at its longest length]")
        self._messages.append({"role": "assistant", "content": answer.content})

    def _body(self) -> dict[str, Any]:
        optional = {
            "temperature": self._options.temperature,
            "max_tokens": self._options.max_tokens,
            "enable_thinking": self._thinking,
        }
        chosen = {key: value for key, value in optional.items() if value is not None}
        return {"messages": self._messages, **chosen}
