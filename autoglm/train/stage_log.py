"""What a running stage shows: metrics.jsonl, a progress bar or log lines, and the loss plot.

metrics.jsonl holds one JSON object a line: {"step", "loss", "learning_rate", "gradient_norm", "seconds", ...} with the
means since the line before, and {"step", "evaluation": {...}}. A resumed stage first drops the lines after its
checkpoint, so that the file reads as if nothing had happened.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from autoglm.train.plot import plot_stage
from autoglm.whole_file import whole_file

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"
_LINE_EVERY_S = 30.0  # between log lines where there is no terminal to draw a bar on
_PLOT_SHARE = 0.01  # of the training time may go into drawing
logger = logging.getLogger("autoglm.train")


class StageLog:
    """A context that shows one stage's progress. Only rank 0 has one that writes (folder None: shows nothing)."""

    def __init__(self, folder: Path | None, name: str, steps: int, start_step: int, plot_every_s: float) -> None:
        self._folder, self._name, self._steps = folder, name, steps
        self._plot_every_s = plot_every_s
        self._records = [] if folder is None else _kept_records(folder / METRICS_FILE, start_step)
        self._last_line = self._last_plot = time.monotonic()
        self._progress: Progress | None = None
        console = Console(stderr=True)
        if folder is not None and console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=console,
                refresh_per_second=2,
                speed_estimate_period=120,
            )
            self._task = self._progress.add_task(name, total=steps, completed=start_step, shown="")

    def __enter__(self) -> StageLog:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        self.draw()

    def advance(self, step: int) -> None:
        """The bar stands at step."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def training(self, step: int, values: Mapping[str, float], seconds_left: float) -> None:
        """Write the means since the last call; redraw what is due."""
        self._write({"step": step, **values})
        now = time.monotonic()
        shown = _shown(values)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, shown=shown)
        elif self._folder is not None and now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            logger.info(f"{self._name} {step}/{self._steps}  {shown}{_others(values)}  {_duration(seconds_left)} left")
        if now - self._last_plot >= self._plot_every_s:
            self.draw()

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write an evaluation's metrics, and say them."""
        self._write({"step": step, "evaluation": dict(metrics)})
        if self._folder is not None:
            values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.say(f"{self._name} {step}/{self._steps}  evaluated: {values}")

    def say(self, line: str) -> None:
        """One line above the bar, or in the log."""
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False)
        elif self._folder is not None:
            logger.info(line)

    def draw(self) -> None:
        """Draw the plot anew."""
        if self._folder is None or not self._records:
            return
        started = time.monotonic()
        plot_stage(self._records, self._folder / PLOT_FILE, f"{self._name}, {self._steps} steps")
        self._last_plot = time.monotonic()
        # Drawing gets slower as the records grow; it never takes more than its share.
        self._plot_every_s = max(self._plot_every_s, (self._last_plot - started) / _PLOT_SHARE)

    def _write(self, record: dict[str, Any]) -> None:
        if self._folder is None:
            return
        record = _finite(record)
        self._records.append(record)
        with open(self._folder / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line cut short by a crash is left out."""
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def _kept_records(path: Path, step: int) -> list[dict[str, Any]]:
    records = [record for record in read_metrics(path) if record["step"] <= step]
    if path.exists():
        with whole_file(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return records


def _finite(value: Any) -> Any:
    """NaN and infinity are no JSON."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(values: Mapping[str, float]) -> str:
    parts = [f"loss {values['loss']:.4f}"]
    if "samples_per_s" in values:
        parts.append(f"{values['samples_per_s']:.1f} samples/s")
    else:
        parts.append(f"{values['steps_per_s']:.2f} steps/s")
    return "  ".join(parts)


def _others(values: Mapping[str, float]) -> str:
    """What the stage itself logs: a log line has room for it, a bar has not."""
    own = {"loss", "samples_per_s", "steps_per_s", "gradient_norm", "learning_rate", "seconds"}
    return "".join(f"  {name} {value:.3g}" for name, value in values.items() if name not in own)


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {int(seconds % 60)} s"
