"""The known screen beside a model: serve asks the loaded engine where to tap on it before anybody else may ask.

A model file that loads can still be wrong: weights that were converted badly, an mmproj of another training, a kernel
that miscomputes on this processor. All of these tap somewhere else. The screen, what to say and the box come from the
model's click card (click_card.py); a model without one is not checked.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from autoglm.actions import Tap, parse_action
from autoglm.cli.console import printable
from autoglm.cli.loading import LoadedModel
from autoglm.engine.sampling import SamplingParams
from autoglm.engine.sequence import Sequence
from autoglm.errors import CapacityError, FormatError, RequestError
from autoglm.media.limits import MediaLimits
from autoglm.media.pictures import decode_picture

logger = logging.getLogger("autoglm.cli")

# The longest right reply to a known screen has about 40 tokens.
_MAX_TOKENS = 96
_SALT = b"self-check"


@dataclass(frozen=True)
class KnownScreen:
    """A screen with one right tap.

    picture  PNG file
    say      the instruction, as text
    box      left, top, right, bottom in thousandths of the screen: where the tap counts
    """

    picture: Path
    say: str
    box: tuple[int, int, int, int]

    def holds(self, tap: Tap) -> bool:
        """Whether the tap lies in the box."""
        left, top, right, bottom = self.box
        return left <= tap.x <= right and top <= tap.y <= bottom


def card_path(model: Path) -> Path:
    """Where the click card of a text GGUF lies; its picture has the same name with .png, its text with .md."""
    return model.with_name(f"{model.stem}.click-card.json")


def read_known_screen(model: Path) -> KnownScreen | None:
    """The known screen of a model's card; None without a card. Raises FormatError for a damaged card."""
    path = card_path(model)
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))["self_check"]
        left, top, right, bottom = (int(value) for value in entry["box"])
        return KnownScreen(path.with_suffix(".png"), str(entry["say"]), (left, top, right, bottom))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise FormatError(f"{path}: is no click card; mend: delete it, or make it anew: autoglm eval --card") from None


def check_taps(loaded: LoadedModel) -> None:
    """Ask the loaded engine the known screen of the model's click card, and log where it taps.

    Returns without asking where there is no card, no mmproj, or no room for the picture in the engine's settings.
    Raises FormatError, in one sentence with the mend, unless the model taps inside the box.
    """
    screen = read_known_screen(loaded.path)
    if screen is None or loaded.multimodal is None:
        logger.debug("No self-check: no click card and mmproj lie beside the model")
        return
    started_s = time.monotonic()
    try:
        sequence = _question(loaded, screen)
        loaded.engine.add(sequence)
    except (RequestError, CapacityError) as error:
        logger.warning(f"Self-check left out, the known screen does not fit: {error}")
        return
    written = ""
    while loaded.engine.has_work():
        written += "".join(output.text for output in loaded.engine.step())
    where = _judge(screen, written)
    if where is not None:
        raise FormatError(
            f"{loaded.path}: fails its self-check: told {printable(screen.say)!r} on its known screen it {where}; "
            "mend: fetch the model and its mmproj again, or make its card anew (autoglm eval --card), or serve it "
            "as it is with --skip-self-check"
        )
    logger.info(f"Self-check: the known screen is tapped inside its box ({time.monotonic() - started_s:.2f} s)")


def _question(loaded: LoadedModel, screen: KnownScreen) -> Sequence:
    """The question as the chat route would put it to the engine; the picture keeps all pixels the model takes."""
    assert loaded.multimodal is not None
    try:
        data = screen.picture.read_bytes()
    except OSError as error:
        raise FormatError(
            f"{screen.picture}: the click card's picture cannot be read ({error.strerror}); mend: fetch it again, or "
            "make the card anew: autoglm eval --card"
        ) from None
    picture = decode_picture(data, limits=MediaLimits(), param=screen.picture.name)
    content = [{"type": "image"}, {"type": "text", "text": screen.say}]
    ids = loaded.template.render_tokens(loaded.tokenizer, [{"role": "user", "content": content}])
    ids, media = loaded.multimodal.plan(ids, [picture], [])
    params = SamplingParams(max_tokens=_MAX_TOKENS, temperature=0, banned_token_ids=loaded.tokenizer.unused_token_ids)
    return Sequence("self-check", ids, params, cache_salt=_SALT, media=media)


def _judge(screen: KnownScreen, written: str) -> str | None:
    """What is wrong with the answer; None if it taps inside the box."""
    try:
        action = parse_action(written)
    except FormatError:
        return "gives no action"
    if not isinstance(action, Tap):
        return f"answers {type(action).__name__} and not a tap"
    if screen.holds(action):
        return None
    left, top, right, bottom = screen.box
    return f"taps at ({action.x}, {action.y}), outside of the box ({left}, {top}) to ({right}, {bottom})"
