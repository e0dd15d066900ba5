"""The held-out set's table over a run's finished stages, from the teacher to the exported files: report.json, table.md.

Columns are teacher, student, distilled, pruned, PTQ and QAT. PTQ is the pruned stage with its norms folded and merged,
exported with the best grids a search finds and read back, without a step of training; QAT is the exported pair read
back, so what ships is what is measured. Every column is asked the same examples and hears the same sounds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoglm.errors import ConfigError, FormatError
from autoglm.train.checkpoint import WEIGHTS_FILE, read_done
from autoglm.train.evaluate import COUNTS, Progress, Rate, evaluate, from_json, markdown_table, to_json
from autoglm.train.export import MODEL_NAME, Exported, export_pair
from autoglm.train.folding import folded
from autoglm.train.inference import LoadedPhone, load_phone, replier
from autoglm.train.run_context import SMOKE, RunContext
from autoglm.train.tokenizer import load_tokenizer
from autoglm.train.world.tasks import Task
from autoglm.whole_file import whole_file

logger = logging.getLogger("autoglm.train")
REPORT_FOLDER, EXPORT_FOLDER = "report", "export"
REPORT_FILE, TABLE_FILE = "report.json", "table.md"
# Column -> the stage it needs.
COLUMNS: Mapping[str, str] = {
    "teacher": "teacher", "student": "student", "distilled": "distilled", "pruned": "pruned", "PTQ": "pruned",
    "QAT": "qat",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One model's answers; sha256 of the files it was loaded from, seconds the asking took."""

    parameters: int
    sha256: tuple[str, ...]
    seconds: float
    rates: dict[str, Rate]


@dataclass(frozen=True)
class Report:
    """The columns that could be measured, and why the others are missing."""

    preset: str
    seed: int
    counts: dict[Task, int]
    columns: dict[str, Column] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def rates(self) -> dict[str, dict[str, Rate]]:
        """Column -> row -> Rate, as `markdown_table` takes them."""
        return {name: column.rates for name, column in self.columns.items()}


def make_report(
    context: RunContext,
    *,
    counts: Mapping[Task, int] | None = None,
    seed: int = 0,
    reuse: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure every column whose stage is finished; write report.json and table.md into the run's report folder.

    counts    examples of each task; None: evaluate.COUNTS, a smoke run's own few
    reuse     keep columns an earlier report measured on the same bytes with the same counts and seed
    progress  called with (examples done, examples in all), over all columns
    The files are written after each column, so that a stopped report loses at most one.
    Raises ConfigError when no column can be measured, FormatError for damaged weights.
    """
    counts = dict(default_counts(context) if counts is None else counts)
    missing = missing_columns(context.run_dir)
    names = [name for name in COLUMNS if name not in missing]
    if not names:
        raise ConfigError(
            f"nothing to report: no stage with a whole model is finished in '{context.run_dir}'. "
            "Mend: train first, or name the folder of the run with --run-dir"
        )
    report = Report(context.preset, seed, counts, missing=missing)
    kept = _kept(context.run_dir, report) if reuse else {}
    each = sum(counts.values())
    for number, name in enumerate(names):
        files = _files(context.run_dir, name)
        sums = tuple(sha256_of(path) for path in files)
        if name in kept and kept[name].sha256 == sums:
            logger.info(f"report: {name} was measured before")
            report.columns[name] = kept[name]
        else:
            logger.info(f"report: asking {name}")
            report.columns[name] = _measure(
                context, name, sums, report, part_of(progress, number * each, len(names) * each)
            )
        _write(report, context.run_dir / REPORT_FOLDER)
    return report


def default_counts(context: RunContext) -> Mapping[Task, int]:
    """All of the held-out set, or the few examples of a smoke run."""
    return context.plan.counts if context.preset == SMOKE else COUNTS


def missing_columns(run_dir: Path) -> dict[str, str]:
    """Columns that cannot be measured yet -> why."""
    missing = {
        name: f"stage '{stage}' is not finished"
        for name, stage in COLUMNS.items()
        if read_done(run_dir / stage) is None
    }
    if "QAT" not in missing and shipped_pair(run_dir) is None:
        missing["QAT"] = "the pair is not exported yet"
    return missing


def shipped_pair(run_dir: Path) -> Exported | None:
    """The exported files of a run, None while they are not there."""
    folder = run_dir / EXPORT_FOLDER
    pair = Exported(folder / f"{MODEL_NAME}-Q4_K_M.gguf", folder / f"mmproj-{MODEL_NAME}-Q8_0.gguf")
    return pair if pair.text.is_file() and pair.mmproj.is_file() else None


def load_column(context: RunContext, name: str) -> LoadedPhone:
    """The model of a column, on the context's device."""
    if name == "PTQ":
        pair = export_rounded(context)
    elif name == "QAT":
        found = shipped_pair(context.run_dir)
        assert found is not None, "asked for only when missing_columns has not named it"
        pair = found
    else:
        return load_phone(context.run_dir / COLUMNS[name], device=context.device)
    return load_phone(pair.text, mmproj=pair.mmproj, device=context.device)


def export_rounded(context: RunContext) -> Exported:
    """The pruned stage merely rounded: stem folded, norms merged, the best grids, no training. Files of its own."""
    phone = load_phone(context.run_dir / COLUMNS["PTQ"])
    model = folded(phone.model)
    folder = context.run_dir / REPORT_FOLDER / "ptq"
    folder.mkdir(parents=True, exist_ok=True)
    return export_pair(model.state_dict(), model.config, load_tokenizer().gguf_metadata(), folder)


def render_table(report: Report) -> str:
    """The table as Markdown, and below it each column that is left out with its reason."""
    lines = [f"Left out: {name} ({reason})." for name, reason in report.missing.items()]
    return markdown_table(report.rates) + ("\n" + "\n".join(lines) + "\n" if lines else "")


def read_report(path: Path) -> Report:
    """What make_report wrote. Raises FormatError if it is not there or damaged."""
    content = read_json(path, "autoglm train --stage report")
    try:
        columns = {
            str(name): Column(
                int(entry["parameters"]), tuple(entry["sha256"]), float(entry["seconds"]), from_json(entry["rates"])
            )
            for name, entry in content["columns"].items()
        }
        return Report(content["preset"], content["seed"], content["counts"], columns, content["missing"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FormatError(f"'{path}' is damaged. Mend: remove it and run the report again") from None


def read_json(path: Path, maker: str) -> Any:
    """A JSON file. Raises FormatError naming `maker`, the command that writes it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"'{path}' is not there. Mend: {maker}") from None
    except (OSError, ValueError):
        raise FormatError(f"'{path}' is damaged. Mend: remove it, then {maker}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def part_of(progress: Progress | None, before: int, total: int) -> Progress | None:
    """What one evaluation of several reports to: `before` examples were asked before it, of `total` in all."""
    return None if progress is None else lambda done, _: progress(before + done, total)


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _files(run_dir: Path, name: str) -> tuple[Path, ...]:
    """What a column is loaded from."""
    pair = shipped_pair(run_dir) if name == "QAT" else None
    return (run_dir / COLUMNS[name] / WEIGHTS_FILE,) if pair is None else (pair.text, pair.mmproj)


def _kept(run_dir: Path, report: Report) -> dict[str, Column]:
    path = run_dir / REPORT_FOLDER / REPORT_FILE
    if not path.exists():
        return {}
    before = read_report(path)
    is_same = (before.preset, before.seed, before.counts) == (report.preset, report.seed, report.counts)
    return before.columns if is_same else {}


def _measure(
    context: RunContext, name: str, sums: tuple[str, ...], report: Report, progress: Progress | None
) -> Column:
    started = time.monotonic()
    phone = load_column(context, name)
    # A replier of its own: what is heard depends on how often it was called.
    rates = evaluate(replier(phone, seed=report.seed), counts=report.counts, seed=report.seed, progress=progress)
    return Column(phone.model.num_parameters(), sums, round(time.monotonic() - started, 1), rates)


def _write(report: Report, folder: Path) -> None:
    columns = {
        name: {
            "stage": COLUMNS[name],
            "parameters": column.parameters,
            "sha256": column.sha256,
            "seconds": column.seconds,
            "rates": to_json(column.rates),
        }
        for name, column in report.columns.items()
    }
    content = {"preset": report.preset, "seed": report.seed, "counts": report.counts, "columns": columns}
    write_text(folder / REPORT_FILE, json.dumps({**content, "missing": report.missing}, indent=2) + "\n")
    write_text(folder / TABLE_FILE, render_table(report))
