"""The live plot of a stage: loss, learning rate and evaluation over its steps, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from autoglm.whole_file import whole_file

_SMOOTHING = 0.9  # of the running mean drawn over the raw losses
_INK = "#1f5fa8"


def plot_stage(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw metrics.jsonl's records; written under another name first, so that a viewer never meets half a picture.

    Upper panel: loss (raw and smoothed) and learning rate. Lower panel, once there is an evaluation: its metrics.
    """
    training = [record for record in records if record.get("loss") is not None]
    evaluations = [record for record in records if "evaluation" in record]
    figure = Figure(figsize=(8, 6 if evaluations else 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if evaluations else 1, 1, squeeze=False, sharex=True)[:, 0]
    _draw_loss(axes[0], training)
    axes[0].set_title(title)
    if evaluations:
        _draw_evaluations(axes[1], evaluations)
    axes[-1].set_xlabel("step")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def _draw_loss(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    axis.plot(steps, losses, color=_INK, alpha=0.3, linewidth=0.8)
    axis.plot(steps, _smoothed(losses), color=_INK, linewidth=1.6, label="loss")
    if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
        axis.set_yscale("log")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.25)
    rate = axis.twinx()
    rate.plot(steps, [record["learning_rate"] for record in records], color="#999999", linewidth=0.9)
    rate.set_ylabel("learning rate", color="#777777")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _draw_evaluations(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    for name in sorted({name for record in records for name in record["evaluation"]}):
        points = [(r["step"], r["evaluation"][name]) for r in records if r["evaluation"].get(name) is not None]
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=name)
    axis.set_ylabel("evaluation")
    axis.grid(alpha=0.25)
    axis.legend(fontsize="x-small", ncols=3)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential running mean without the pull of its start (Adam's bias correction)."""
    means: list[float] = []
    mean = weight = 0.0
    for value in values:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        means.append(mean / weight)
    return means
