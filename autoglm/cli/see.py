"""autoglm see: one screen and what to do with it, typed or spoken -> thought, action, and the action on the screen."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import asdict
from PIL import Image
from rich.console import Console

from autoglm.actions import Action, parse_action
from autoglm.cli.action_picture import draw_action, save_drawn, touched_pixels, was_drawn_here
from autoglm.cli.api_client import Answer, connect
from autoglm.cli.console import print_answer, printable
from autoglm.cli.loading import ModelOptions
from autoglm.cli.media_files import picture_part, sound_part
from autoglm.errors import ConfigError, FormatError
from autoglm.media.pictures import Picture


@dataclass(frozen=True)
class SeeOptions:
    """What the flags of `autoglm see` say.

    say, text   the command, spoken or typed; one of them or both
    output      PNG to write; None: SCREEN-seen.png beside the screen
    """

    screen: Path
    text: str | None = None
    say: Path | None = None
    output: Path | None = None
    url: str | None = None
    api_key: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    max_pixels: int | None = None
    as_json: bool = False


def run_see(model: ModelOptions, options: SeeOptions) -> None:
    """Ask the model, print what it thinks and does, write the picture.

    Raises ConfigError before anything is loaded, ServerError, and FormatError for an answer that is no action.
    """
    if not (options.text and options.text.strip()) and options.say is None:
        raise ConfigError('nothing is asked of the screen; give a text, such as "open settings", or --say COMMAND.wav')
    picture, part = picture_part(options.screen)
    output = _output_path(options)
    parts = [part]
    if options.say is not None:
        parts.append(sound_part(options.say))
    if options.text:
        parts.append({"type": "text", "text": options.text})
    answer = _ask(model, options, parts)
    try:
        action = parse_action(answer.content)
    except FormatError as error:
        if options.as_json:
            print(json.dumps(_told(answer), ensure_ascii=False))
        raise FormatError(f"nothing was drawn: {error}") from None
    _save(picture, action, output)
    if options.as_json:
        width, height = picture.width, picture.height
        told = _told(answer) | {
            "action": {"kind": type(action).__name__, **asdict(action)},
            "pixels": touched_pixels(action, width, height),
            "screen": {"width": width, "height": height},
            "drawn": str(output),
        }
        print(json.dumps(told, ensure_ascii=False))
    else:
        print(f"Drawn in {printable(str(output), 4096)}")


def _ask(model: ModelOptions, options: SeeOptions, parts: list[dict[str, Any]]) -> Answer:
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if options.system:
        messages.insert(0, {"role": "system", "content": options.system})
    body: dict[str, Any] = {
        "messages": messages,
        "temperature": 0,
        "response_format": {"type": "autoglm_action"},
    }
    optional = {"max_tokens": options.max_tokens, "max_pixels": options.max_pixels}
    body.update({key: value for key, value in optional.items() if value is not None})
    answer = Answer()
    kinds = ["picture"] if options.say is None else ["picture", "sound"]
    with connect(model, options.url, options.api_key, media=kinds) as client:
        pieces = client.stream(body, answer)
        if options.as_json:
            for _ in pieces:
                pass
        else:
            print_answer(Console(highlight=False), pieces)
    return answer


def _told(answer: Answer) -> dict[str, Any]:
    return {
        "thought": answer.thought.strip(),
        "answer": answer.content.strip(),
        "action": None,
        "finish_reason": answer.finish_reason,
        "timings": answer.timings,
    }


def _output_path(options: SeeOptions) -> Path:
    """Where the picture goes. Raises ConfigError where it cannot, or where a file of somebody else lies."""
    screen = options.screen
    path = options.output or screen.with_name(f"{screen.stem}-seen.png")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"-o '{path}' is no name for a PNG, which is what is written; mend: -o '{path.stem}.png'")
    folder = path.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ConfigError(f"'{folder}' is no folder this user can write to; mend: name another with -o FILE.png")
    try:
        is_free = not path.exists() or (was_drawn_here(path) and not path.samefile(screen))
    except OSError:
        is_free = False
    if not is_free:
        raise ConfigError(f"'{path}' is there and was not drawn by autoglm see; mend: -o ANOTHER.png")
    return path


def _save(picture: Picture, action: Action, output: Path) -> None:
    try:
        save_drawn(draw_action(Image.fromarray(picture.rgb), action), output)
    except OSError as error:
        raise ConfigError(f"'{output}' cannot be written: {error.strerror or error}") from None
