"""autoglm eval: the held-out set's table for checkpoints, stages, GGUF pairs and running servers, one column each."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autoglm.cli.api_client import connect
from autoglm.cli.click_card import CardOptions, make_card
from autoglm.cli.console import CountBar, parameter_count, printable
from autoglm.cli.loading import ModelOptions
from autoglm.cli.served import served_replier
from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.errors import ConfigError
from autoglm.train.agreement import Agreement, Recorder, agreement
from autoglm.train.distributed import pick_device
from autoglm.train.evaluate import COUNTS, ROWS, Generate, Rate, evaluate, markdown_table, to_json
from autoglm.train.inference import load_phone, replier
from autoglm.train.world.tasks import Task

logger = logging.getLogger("autoglm.cli")


@dataclass(frozen=True)
class EvalOptions:
    """What to measure; `models` are paths, `nano` for the shipped pair, URLs of servers, or NAME= before either."""

    models: tuple[str, ...] = ()
    mmproj: Path | None = None
    api_key: str | None = None
    examples: int | None = None
    tasks: tuple[str, ...] = ()
    seed: int = 0
    blank: bool = False
    compare: bool = False
    card: bool = False
    reference: Path | None = None
    every_type: bool = False
    as_json: bool = False
    as_markdown: bool = False


def run_evaluation(options: EvalOptions) -> None:
    """Load every model, ask each the same examples, print the table or one line of JSON.

    Raises ConfigError, FormatError and ServerError before anything is asked if one of the models cannot be loaded.
    """
    if options.as_json and options.as_markdown:
        raise ConfigError("--json and --markdown are two ways to print the same; give one of them")
    if options.card:
        _write_card(options)
        return
    if options.reference is not None or options.every_type:
        raise ConfigError("--reference and --every-type are about a click card; add --card")
    if options.compare and len(options.models) < 2:
        raise ConfigError("--compare holds models against the first one; name at least two")
    counts = _counts(options)
    columns: dict[str, dict[str, Rate]] = {}
    with ExitStack() as open_servers:
        asked = {name: Recorder(generate) for name, generate in _load(options, open_servers).items()}
        for name, generate in asked.items():
            logger.info(f"Asking {name}")
            with CountBar(f"asking {name}") as bar:
                columns[name] = evaluate(
                    generate, counts=counts, seed=options.seed, blank=options.blank, progress=bar.report
                )
    first, *others = asked.values()
    compared = {
        name: agreement(first.examples, first.replies, other.replies)
        for name, other in zip(list(asked)[1:], others, strict=True)
        if options.compare
    }
    if options.as_json:
        print(json.dumps({name: to_json(rates) for name, rates in columns.items()} | _agreement_json(compared)))
    elif options.as_markdown:
        print(markdown_table(columns), end="")
    else:
        Console().print(_table(columns, options))
    if not options.as_json:
        for name, found in compared.items():
            _print_agreement(next(iter(asked)), name, found)


def _write_card(options: EvalOptions) -> None:
    if len(options.models) != 1 or is_url(options.models[0]):
        raise ConfigError("--card measures one model file: autoglm eval MODEL.gguf --card")
    if options.tasks or options.blank or options.compare or options.as_json or options.as_markdown:
        raise ConfigError("--card takes -n, --seed, --mmproj, --reference and --every-type; leave the other flags out")
    path = make_card(
        CardOptions(
            model=model_path(options.models[0]),
            mmproj=options.mmproj,
            reference=options.reference,
            every_type=options.every_type,
            examples=options.examples,
            seed=options.seed,
        )
    )
    print(path.read_text(encoding="utf-8"), end="")
    logger.info(f"Written: '{path}'")


def _counts(options: EvalOptions) -> dict[Task, int]:
    unknown = [name for name in options.tasks if name not in COUNTS]
    if unknown:
        raise ConfigError(f"--task {unknown[0]!r} is no task; the tasks are {', '.join(COUNTS)}")
    most = options.examples
    return {
        task: count if most is None else min(count, most)
        for task, count in COUNTS.items()
        if not options.tasks or task in options.tasks
    }


def _load(options: EvalOptions, open_servers: ExitStack) -> dict[str, Generate]:
    if not options.models:
        raise ConfigError(
            "name what to measure: nano (the model in this package), a text GGUF with its mmproj beside it, a "
            "checkpoint, a stage's folder, or a server's address such as http://127.0.0.1:8000/v1"
        )
    if options.mmproj is not None and len(options.models) > 1:
        raise ConfigError("--mmproj fits one text GGUF; with several models each needs its mmproj beside it")
    named: dict[str, str] = {}
    for name, what in map(_named, options.models):
        if name in named:
            raise ConfigError(f"two models are called {name!r}; name them: first={what} second=...")
        named[name] = what
    found: dict[str, Generate] = {}
    for name, what in named.items():
        if is_url(what):
            client = open_servers.enter_context(connect(ModelOptions(), what, options.api_key))
            found[name] = served_replier(client, seed=options.seed)
        else:
            phone = load_phone(model_path(what), mmproj=options.mmproj, device=pick_device())
            logger.info(f"{name} has {parameter_count(phone.model.num_parameters())} parameters")
            found[name] = replier(phone, seed=options.seed)
    return found


def _named(model: str) -> tuple[str, str]:
    """NAME=WHAT -> both; without a name a file is called by its own, a server by its address."""
    name, separator, what = model.partition("=")
    if not separator or is_url(name):
        what = model
        name = what.partition("://")[2].partition("/")[0] if is_url(what) else Path(what).resolve().name
    return name, what


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def model_path(what: str) -> Path:
    """A path, or `nano` for the shipped text GGUF. Raises ConfigError if that is not here."""
    shipped = None if Path(what).exists() else SHIPPED_MODELS.get(what.lower())
    if shipped is None:
        return Path(what)
    shipped.check()
    return shipped.path


def _agreement_json(compared: Mapping[str, Agreement]) -> dict[str, object]:
    if not compared:
        return {}
    rates = {
        name: to_json({part: getattr(found, part) for part in ("same_answers", "media_answers", "same_replies")})
        for name, found in compared.items()
    }
    return {"compared": rates}


def _print_agreement(first: str, name: str, found: Agreement) -> None:
    """The shares, and each example whose answer differs: examples are generated, so nothing private is printed."""
    console = Console(highlight=False, soft_wrap=True)

    def line(text: str) -> None:
        console.print(text, markup=False)

    line(f"\n{name} against {first}: {_of(found.same_answers)} answers are the same, {_of(found.media_answers)} of")
    line(f"those with a picture or a sound, {_of(found.same_replies)} with the thought before it")
    for other in found.differences:
        line(f"  {other.example.task} {other.number} ({other.example.language})")
        for who, reply in ((first, other.first), (name, other.second)):
            line(f"    {who}: {printable(reply)}")


def _of(rate: Rate) -> str:
    return f"{rate.right} of {rate.total} ({100 * rate.share:.2f} %)"


def _table(columns: Mapping[str, Mapping[str, Rate]], options: EvalOptions) -> Table:
    table = Table(
        title=f"Held-out set, seed {options.seed}" + (", grey screens" if options.blank else ""),
        title_justify="left",
        caption="per cent right (95 % interval) of so many examples",
        caption_justify="left",
    )
    table.add_column("measured")
    table.add_column("asked", justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    for row, title, _, _, _, goal in ROWS:
        rates = [rates.get(row) for rates in columns.values()]
        if any(rates):
            shown = ["" if rate is None else f"{rate} of {rate.total}" for rate in rates]
            table.add_row(title, "" if goal is None else f"{100 * goal:.0f} %", *shown)
    return table
