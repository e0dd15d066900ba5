"""autoglm eval: the held-out set's table for checkpoints, stages and GGUF pairs, one column each."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autoglm.cli.console import CountBar, parameter_count
from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.errors import ConfigError
from autoglm.train.distributed import pick_device
from autoglm.train.evaluate import COUNTS, ROWS, Rate, evaluate, markdown_table, to_json
from autoglm.train.inference import LoadedPhone, load_phone, replier
from autoglm.train.world.tasks import Task

logger = logging.getLogger("autoglm.cli")


@dataclass(frozen=True)
class EvalOptions:
    """What to measure; `models` are paths, `nano` for the shipped pair, or NAME=PATH."""

    models: tuple[str, ...] = ()
    mmproj: Path | None = None
    examples: int | None = None
    tasks: tuple[str, ...] = ()
    seed: int = 0
    blank: bool = False
    as_json: bool = False
    as_markdown: bool = False


def run_evaluation(options: EvalOptions) -> None:
    """Load every model, ask each the same examples, print the table or one line of JSON.

    Raises ConfigError and FormatError before anything is asked if one of the models cannot be loaded.
    """
    if options.as_json and options.as_markdown:
        raise ConfigError("--json and --markdown are two ways to print the same; give one of them")
    counts = _counts(options)
    phones = _load(options)
    columns: dict[str, dict[str, Rate]] = {}
    for name, phone in phones.items():
        logger.info(f"Asking {name} ({parameter_count(phone.model.num_parameters())} parameters)")
        with CountBar(f"asking {name}") as bar:
            columns[name] = evaluate(
                replier(phone, seed=options.seed),
                counts=counts,
                seed=options.seed,
                blank=options.blank,
                progress=bar.report,
            )
    if options.as_json:
        print(json.dumps({name: to_json(rates) for name, rates in columns.items()}))
    elif options.as_markdown:
        print(markdown_table(columns), end="")
    else:
        Console().print(_table(columns, options))


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


def _load(options: EvalOptions) -> dict[str, LoadedPhone]:
    if not options.models:
        raise ConfigError(
            "name what to measure: nano (the model in this package), a text GGUF with its mmproj beside it, a "
            "checkpoint, or a stage's folder"
        )
    if options.mmproj is not None and len(options.models) > 1:
        raise ConfigError("--mmproj fits one text GGUF; with several models each needs its mmproj beside it")
    phones: dict[str, LoadedPhone] = {}
    for model in options.models:
        name, _, path = model.rpartition("=")
        name = name or Path(path).resolve().name
        if name in phones:
            raise ConfigError(f"two models are called {name!r}; name them: first={path} second=...")
        shipped = None if Path(path).exists() else SHIPPED_MODELS.get(path.lower())
        if shipped is not None:
            shipped.check()
        phones[name] = load_phone(shipped.path if shipped else Path(path), mmproj=options.mmproj, device=pick_device())
    return phones


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
