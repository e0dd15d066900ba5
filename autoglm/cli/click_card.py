"""autoglm eval --card: how far a model file's taps are from its float reference's, written beside the model.

Each pair is loaded into the engine and asked over HTTP, as any client would, the same held-out typed instructions on
the same screens. Metrics:
  tap error   distance between the file's tap and the reference's in thousandths of the screen, over the examples where
              both touch (Tap or Long Press): a tap beside it moves by as many thousandths of width and height
  to centre   distance from a tap to the middle of the right box, over the examples where the file touches and a touch
              is right
  inside      taps inside the right box, over the examples that ask for a tap
  agreement   the same action as the reference: its kind, and every argument but the point
The card also keeps one screen that every measured type taps well inside its box; self_check.py asks it at start.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from autoglm.actions import Action, LongPress, Tap, parse_action
from autoglm.cli.api_client import connect
from autoglm.cli.console import CountBar
from autoglm.cli.loading import ModelOptions, find_mmproj
from autoglm.cli.self_check import card_path
from autoglm.cli.served import ask_all, content_of, png
from autoglm.deploy.machine import usable_cores
from autoglm.errors import ConfigError, FormatError
from autoglm.pack.requantize import requantize
from autoglm.pack.type_plan import FileType
from autoglm.train.evaluate import COUNTS, Rate, evaluation_examples, score, split_reply, to_json
from autoglm.train.report import sha256_of, write_text
from autoglm.train.world.tasks import Example, centre
from autoglm.whole_file import whole_file

logger = logging.getLogger("autoglm.cli")

# Prompt, thought and action of one held-out instruction fit several times over.
_CTX_SIZE = 2048
_CHUNK = 40
# Thousandths between a known tap and the edge of its box: rounding moves a tap by one or two.
_WIDE_MARGIN = 25
# The pairs that are written with every_type: the text file's type and the mmproj's.
_TYPES = (
    (FileType.F16, FileType.F16),
    (FileType.Q8_0, FileType.Q8_0),
    (FileType.Q4_K_M, FileType.Q8_0),
)


@dataclass(frozen=True)
class Pair:
    """A text GGUF and its mmproj; name says what the weights are."""

    name: str
    text: Path
    mmproj: Path

    @property
    def nbytes(self) -> int:
        return self.text.stat().st_size + self.mmproj.stat().st_size


@dataclass(frozen=True)
class CardRow:
    """One pair against the reference; the metrics are the module's, errors in thousandths of the screen."""

    weights: str
    nbytes: int
    num_taps: int
    median_error: float
    p95_error: float
    worst_error: float
    median_to_centre: float
    inside: Rate
    agreement: Rate

    def to_dict(self) -> dict[str, object]:
        rates = to_json({"inside": self.inside, "agreement": self.agreement})
        return {**vars(self), **rates}


@dataclass(frozen=True)
class CardOptions:
    """What to measure.

    reference   an F32 or F16 text GGUF with its mmproj beside it; None: `model`'s own weights, dequantized to F32
    every_type  measure the reference's weights in every other type this package writes, too
    """

    model: Path
    mmproj: Path | None = None
    reference: Path | None = None
    every_type: bool = False
    examples: int | None = None
    seed: int = 0


def make_card(options: CardOptions) -> Path:
    """Ask every pair, write the card's JSON, Markdown and known screen beside the model; the path of the Markdown.

    Raises ConfigError without an mmproj, FormatError for a file that cannot be run or a model that taps nowhere right.
    """
    model = _pair("", options.model, options.mmproj)
    examples = evaluation_examples("typed_action", options.examples or COUNTS["typed_action"], seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="autoglm-card-") as folder:
        reference, others = _pairs(model, options, Path(folder))
        wanted = _ask(reference, examples)
        replies = {pair: _ask(pair, examples) for pair in (model, *others)}
        rows = [_measure(pair, examples, replies[pair], wanted) for pair in replies]
        rows.insert(0, replace(_measure(reference, examples, wanted, wanted), weights=f"{reference.name} (reference)"))
    known = _known_screen(examples, [wanted, *replies.values()])
    if known is None:
        raise FormatError(
            f"{options.model}: taps inside no box of {len(examples)} held-out screens, so there is nothing to check it "
            "by; mend: is it the right mmproj? See autoglm eval"
        )
    path = card_path(options.model)
    example, box = known
    assert example.screen is not None
    with whole_file(path.with_suffix(".png")) as temporary:
        temporary.write_bytes(png(example.screen.image))
    content = {
        "model": {file.name: sha256_of(file) for file in (model.text, model.mmproj)},
        "reference": _told(options, reference),
        "screens": len(examples),
        "seed": options.seed,
        "rows": [row.to_dict() for row in rows],
        "self_check": {"say": example.typed, "box": list(box)},
    }
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_text(path.with_suffix(".md"), _markdown(options, reference, rows, len(examples), example))
    return path.with_suffix(".md")


# --- the pairs ---------------------------------------------------------------------------------------------


def _pair(name: str, text: Path, mmproj: Path | None) -> Pair:
    found = find_mmproj(text, ModelOptions(mmproj=mmproj, takes_media=True))
    if found is None:
        raise ConfigError(f"no mmproj of its name lies beside '{text}': without eyes nothing can be tapped")
    return Pair(name or f"{_type_name(text)} + {_type_name(found)}", text, found)


def _type_name(path: Path) -> str:
    """Q4_K_M out of Phone-Q4_K_M.gguf, or the whole name."""
    return path.stem.rpartition("-")[2]


def _pairs(model: Pair, options: CardOptions, folder: Path) -> tuple[Pair, list[Pair]]:
    """The reference, and the other types of its weights; what is made lies in `folder`."""
    if options.reference is None:
        reference = _made(model, FileType.F32, FileType.F32, folder)
    else:
        reference = _pair("", options.reference, None)
    if not options.every_type:
        return reference, []
    made = [_made(reference, *types, folder) for types in _TYPES]
    return reference, [pair for pair in made if pair.name != model.name]


def _made(source: Pair, text_type: FileType, mmproj_type: FileType, folder: Path) -> Pair:
    name = f"{text_type.name} + {mmproj_type.name}"
    pair = Pair(name, folder / f"{name}.gguf", folder / f"mmproj-{name}.gguf")
    requantize(source.text, pair.text, text_type, num_threads=usable_cores())
    requantize(source.mmproj, pair.mmproj, mmproj_type, num_threads=usable_cores())
    return pair


def _ask(pair: Pair, examples: Sequence[Example]) -> list[str]:
    """The pair's greedy replies, from a server in this process."""
    logger.info(f"Asking {pair.name}")
    options = ModelOptions(model=str(pair.text), mmproj=pair.mmproj, ctx_size=_CTX_SIZE)
    replies: list[str] = []
    with connect(options, None, None, media=["picture"]) as client, CountBar(f"asking {pair.name}") as bar:
        for start in range(0, len(examples), _CHUNK):
            contents = [content_of(example, None) for example in examples[start : start + _CHUNK]]
            replies += ask_all(client, contents)
            bar.report(len(replies), len(examples))
    return replies


# --- what was measured -------------------------------------------------------------------------------------


def _action(reply: str) -> Action | None:
    try:
        return parse_action(split_reply(reply)[1])
    except FormatError:
        return None


def _point(action: Action | None) -> tuple[int, int] | None:
    return (action.x, action.y) if isinstance(action, Tap | LongPress) else None


def _measure(pair: Pair, examples: Sequence[Example], replies: Sequence[str], wanted: Sequence[str]) -> CardRow:
    ours, theirs = [_action(reply) for reply in replies], [_action(reply) for reply in wanted]
    errors = _distances((_point(a), _point(b)) for a, b in zip(ours, theirs, strict=True))
    to_centre = _distances(
        (_point(action), None if example.target is None else centre(example.target))
        for action, example in zip(ours, examples, strict=True)
    )
    hits = [
        found["tap_in_box"]
        for example, reply in zip(examples, replies, strict=True)
        if "tap_in_box" in (found := score(example, reply))
    ]
    agreed = [_is_same(a, b) for a, b in zip(ours, theirs, strict=True)]
    return CardRow(
        weights=pair.name,
        nbytes=pair.nbytes,
        num_taps=len(errors),
        median_error=_percentile(errors, 50),
        p95_error=_percentile(errors, 95),
        worst_error=_percentile(errors, 100),
        median_to_centre=_percentile(to_centre, 50),
        inside=Rate(sum(hits), len(hits)),
        agreement=Rate(sum(agreed), len(agreed)),
    )


def _distances(points: Iterable[tuple[tuple[int, int] | None, tuple[int, int] | None]]) -> list[float]:
    return [math.dist(a, b) for a, b in points if a is not None and b is not None]


def _percentile(values: Sequence[float], percent: float) -> float:
    """Rounded to a tenth of a thousandth; NaN would be no JSON, so 0 where nothing was measured (num_taps tells)."""
    return round(float(np.percentile(values, percent)), 1) if values else 0.0


def _is_same(a: Action | None, b: Action | None) -> bool:
    if _point(a) is not None and _point(b) is not None:
        return type(a) is type(b)
    return a is not None and a == b


def _known_screen(
    examples: Sequence[Example], replies: Sequence[Sequence[str]]
) -> tuple[Example, tuple[int, int, int, int]] | None:
    """A tap that all pairs make well inside its box, on the smallest picture: the example, and the box in thousandths.

    Where none is well inside, the one with the widest margin; None where no box is hit by all.
    """
    best: tuple[tuple[float, int], Example] | None = None
    for number, example in enumerate(examples):
        taps = [action for each in replies if isinstance(action := _action(each[number]), Tap)]
        if example.screen is None or "tap_in_box" not in example.scored or len(taps) < len(replies):
            continue
        left, top, right, bottom = _box(example)
        margin = min(min(tap.x - left, right - tap.x, tap.y - top, bottom - tap.y) for tap in taps)
        if margin >= 0:
            rank = min(margin, _WIDE_MARGIN), -len(png(example.screen.image))
            best = (rank, example) if best is None or rank > best[0] else best
    return None if best is None else (best[1], _box(best[1]))


def _box(example: Example) -> tuple[int, int, int, int]:
    """The right box in whole thousandths, rounded inwards."""
    assert example.target is not None
    x0, y0, x1, y1 = (1000 * side for side in example.target.box)
    return math.ceil(x0), math.ceil(y0), math.floor(x1) - 1, math.floor(y1) - 1


# --- what is written ---------------------------------------------------------------------------------------


def _told(options: CardOptions, reference: Pair) -> str:
    return "the same weights in F32" if options.reference is None else reference.text.name


def _markdown(
    options: CardOptions, reference: Pair, rows: Sequence[CardRow], num_screens: int, example: Example
) -> str:
    picture = card_path(options.model).with_suffix(".png").name
    lines = [
        f"# Click card of {options.model.stem}",
        "",
        f"Where it taps, against {_told(options, reference)}: {num_screens} typed instructions on held-out screens "
        f"(seed {options.seed}), asked of the engine over its API at temperature 0. Errors are distances in "
        "thousandths of the screen, over the examples where both touch.",
        "",
        card_table(rows),
        "",
        f"`autoglm serve` asks this at start, and does not start where the tap misses its box: “{example.typed}”",
        "",
        f"![the known screen]({picture})",
        "",
        "Repeat it: `" + _command(options) + "`",
        "",
    ]
    return "\n".join(lines)


def _command(options: CardOptions) -> str:
    parts = [f"autoglm eval {options.model.name} --card"]
    if options.reference is not None:
        parts.append(f"--reference {options.reference.name}")
    if options.every_type:
        parts.append("--every-type")
    if options.examples is not None:
        parts.append(f"-n {options.examples}")
    return " ".join([*parts, f"--seed {options.seed}"])


def card_table(rows: Sequence[CardRow]) -> str:
    """The rows as a Markdown table, rates with their 95 % intervals."""
    lines = [
        "| weights (text + mmproj) | MB | both tap | median error | 95 % within | worst | median to the centre | "
        "inside the box | same action |",
        "| --- |" + " ---: |" * 8,
    ]
    lines += [
        f"| {row.weights} | {row.nbytes / 1e6:.1f} | {row.num_taps} | {row.median_error} | {row.p95_error} | "
        f"{row.worst_error} | {row.median_to_centre} | {row.inside} | {row.agreement} |"
        for row in rows
    ]
    return "\n".join(lines)
