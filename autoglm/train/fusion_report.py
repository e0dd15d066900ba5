"""Gated fusion against concatenation where a medium is spoiled, and its audio weight against noise: JSON and a PNG.

Both models are the short equal runs of stages `gcmf` and `concat`. Each condition spoils one thing and leaves the other
clean. The audio weight is a_audio of fusion.py on held-out spoken commands with a screen: the same commands, voices
and rooms at every signal-to-noise ratio.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from autoglm.errors import FormatError
from autoglm.train.checkpoint import WEIGHTS_FILE, read_done
from autoglm.train.dataset import CLEAN_SNR, BatchMaker
from autoglm.train.evaluate import Progress, Rate, evaluate, evaluation_examples, from_json, to_json
from autoglm.train.inference import LoadedPhone, load_phone, replier
from autoglm.train.report import REPORT_FOLDER, load_column, missing_columns, part_of, read_json, sha256_of, write_text
from autoglm.train.run_context import SMOKE, RunContext
from autoglm.train.world.split import rng_for
from autoglm.train.world.tasks import Task
from autoglm.whole_file import whole_file

logger = logging.getLogger("autoglm.train")
FUSION_FILE, PLOT_FILE = "fusion.json", "audio_weight.png"
STAGES = ("gcmf", "concat")
SHIPPED = "QAT"  # the column whose audio weight is drawn beside the short run's
# Condition -> (title, signal-to-noise ratio in dB, are screens blanked).
CONDITIONS: Mapping[str, tuple[str, float, bool]] = {
    "clean": ("clean sound, clear screen", CLEAN_SNR, False),
    "noise": ("sound at 0 dB, clear screen", 0.0, False),
    "blank": ("clean sound, blanked screen", CLEAN_SNR, True),
}
COUNTS: Mapping[Task, int] = {"spoken_action": 160}
SNRS_DB = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 40.0)
_WEIGHT_EXAMPLES, _GROUP = 60, 20
_INKS = ("#1f5fa8", "#b5541c")


@dataclass(frozen=True)
class Weight:
    """The audio weight over the examples heard at one signal-to-noise ratio."""

    snr_db: float
    mean: float
    spread: float  # standard deviation over the examples
    examples: int


@dataclass(frozen=True)
class FusionReport:
    """rates: condition -> stage -> row -> Rate; weights: model -> points; missing: stage -> why."""

    seed: int
    counts: dict[Task, int]
    sha256: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    rates: dict[str, dict[str, dict[str, Rate]]] = field(default_factory=dict)
    weights: dict[str, list[Weight]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def make_fusion_report(
    context: RunContext,
    *,
    counts: Mapping[Task, int] | None = None,
    snrs_db: Sequence[float] | None = None,
    weight_examples: int | None = None,
    seed: int = 0,
    reuse: bool = False,
    progress: Progress | None = None,
) -> FusionReport:
    """Measure what is finished of `gcmf`, `concat` and the shipped pair; write fusion.json and audio_weight.png.

    counts, snrs_db, weight_examples  None: the constants of this file, a smoke run's own few
    reuse     keep an earlier report if the weights, the counts and the seed are the same
    progress  called with (examples done, examples in all)
    """
    is_smoke = context.preset == SMOKE
    counts = dict(counts or ({"spoken_action": 2} if is_smoke else COUNTS))
    snrs_db = snrs_db or ((0.0, 20.0, 40.0) if is_smoke else SNRS_DB)
    weight_examples = weight_examples or (4 if is_smoke else _WEIGHT_EXAMPLES)
    folder = context.run_dir / REPORT_FOLDER
    report = FusionReport(seed, counts, missing=_missing(context.run_dir))
    for name in STAGES:
        if name not in report.missing:
            report.sha256[name] = sha256_of(context.run_dir / name / WEIGHTS_FILE)
    kept = _kept(folder / FUSION_FILE, report, snrs_db, weight_examples) if reuse else None
    if kept is not None:
        logger.info("report: fusion was measured before")
        report = kept
    else:
        _measure(context, report, snrs_db, weight_examples, progress)
    if SHIPPED not in missing_columns(context.run_dir):
        shipped = load_column(context, SHIPPED)
        report.weights[SHIPPED] = audio_weights(shipped, snrs_db, weight_examples, seed=seed)
    write_text(folder / FUSION_FILE, json.dumps(_to_json(report), indent=2) + "\n")
    if report.weights:
        plot_weights(report.weights, folder / PLOT_FILE)
    return report


def audio_weights(phone: LoadedPhone, snrs_db: Sequence[float], count: int, *, seed: int = 0) -> list[Weight]:
    """The audio weight of held-out spoken commands with a screen at each ratio; the same commands, voices and rooms."""
    model = phone.model
    device = next(model.parameters()).device
    examples = evaluation_examples("spoken_action", count, seed=seed)
    points = []
    for snr in snrs_db:
        maker = BatchMaker(model.config, phone.tokenizer, (), split="test", snr=snr)
        found: list[float] = []
        for number, example in enumerate(examples):
            # One generator an example: what is drawn for it does not depend on the ratio of those before.
            batch = maker.batch("spoken", [example], rng_for("test", "weights", seed, number), with_answer=False)
            with torch.no_grad():
                fused = model.embed(batch.inputs.to(device)).fused
            assert fused is not None, "a model without fusion has no weights to ask"
            found.append(float(fused.weights[0, 1]))
        points.append(Weight(snr, statistics.fmean(found), statistics.pstdev(found), len(found)))
    return points


def plot_weights(weights: Mapping[str, Sequence[Weight]], path: Path) -> None:
    """Mean of the audio weight over the signal-to-noise ratio, a band of one standard deviation around it."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots(1, 1)
    for ink, (name, points) in zip(_INKS, weights.items(), strict=False):
        snrs, means = [point.snr_db for point in points], [point.mean for point in points]
        label = "shipped model" if name == SHIPPED else f"stage {name}"
        axis.plot(snrs, means, color=ink, marker="o", markersize=3, linewidth=1.6, label=label)
        low, high = [p.mean - p.spread for p in points], [p.mean + p.spread for p in points]
        axis.fill_between(snrs, low, high, color=ink, alpha=0.15, linewidth=0)
    axis.set_title("How much fusion listens")
    axis.set_xlabel("signal-to-noise ratio of the sound, dB")
    axis.set_ylabel("audio weight")
    axis.grid(alpha=0.25)
    axis.legend(fontsize="small")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def read_fusion(path: Path) -> FusionReport:
    """What make_fusion_report wrote. Raises FormatError if it is not there or damaged."""
    content = read_json(path, "autoglm train --stage report")
    try:
        rates = {
            condition: {stage: from_json(rows) for stage, rows in stages.items()}
            for condition, stages in content["rates"].items()
        }
        weights = {name: [Weight(**point) for point in points] for name, points in content["weights"].items()}
        kept = {name: content[name] for name in ("seed", "counts", "sha256", "parameters", "missing")}
        return FusionReport(rates=rates, weights=weights, **kept)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FormatError(f"'{path}' is damaged. Mend: remove it and run the report again") from None


def _missing(run_dir: Path) -> dict[str, str]:
    return {name: f"stage '{name}' is not finished" for name in STAGES if read_done(run_dir / name) is None}


def _measure(
    context: RunContext, report: FusionReport, snrs_db: Sequence[float], weight_examples: int, progress: Progress | None
) -> None:
    """Fill in the rates of both short runs and the audio weight of gcmf."""
    names = [name for name in STAGES if name not in report.missing]
    each, done = sum(report.counts.values()), 0
    for name in names:
        phone = load_phone(context.run_dir / name, device=context.device)
        report.parameters[name] = phone.model.num_parameters()
        for condition, (title, snr, blank) in CONDITIONS.items():
            logger.info(f"report: asking {name}, {title}")
            generate = replier(phone, seed=report.seed, snr=snr, batch_size=_GROUP)
            shown = part_of(progress, done, each * len(names) * len(CONDITIONS))
            rates = evaluate(generate, counts=report.counts, seed=report.seed, blank=blank, progress=shown)
            report.rates.setdefault(condition, {})[name] = rates
            done += each
        if name == "gcmf":
            report.weights[name] = audio_weights(phone, snrs_db, weight_examples, seed=report.seed)


def _kept(path: Path, report: FusionReport, snrs_db: Sequence[float], weight_examples: int) -> FusionReport | None:
    if not path.exists():
        return None
    before = read_fusion(path)
    points = before.weights.get("gcmf", [])
    is_same = (before.seed, before.counts, before.sha256) == (report.seed, report.counts, report.sha256)
    is_same &= "gcmf" not in report.sha256 or (
        [point.snr_db for point in points] == list(snrs_db) and points[0].examples == weight_examples
    )
    return before if is_same else None


def _to_json(report: FusionReport) -> dict[str, object]:
    return {
        **{name: getattr(report, name) for name in ("seed", "counts", "sha256", "parameters", "missing")},
        "rates": {
            condition: {stage: to_json(rows) for stage, rows in stages.items()}
            for condition, stages in report.rates.items()
        },
        "weights": {name: [vars(point) for point in points] for name, points in report.weights.items()},
    }
