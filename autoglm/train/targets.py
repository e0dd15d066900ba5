"""What the model was asked to reach, and whether the measured numbers reach it: the model card's list of targets.

Nothing is called met that was not measured. Shares of two columns are compared with Newcombe's interval of a
difference, which takes the columns for independent; they are asked the same examples, so it is rather too wide.
Source: Newcombe, Interval estimation for the difference between independent proportions, 1998 (method 10).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoglm.train.evaluate import ROWS, Rate
from autoglm.train.fusion_report import CONDITIONS, FusionReport, Weight
from autoglm.train.report import Report

MAX_FILE_BYTES = 25_000_000  # of both files together
MAX_ROUNDING_LOSS = 0.01  # of QAT against the float weights it began with
SHIPPED, FLOAT = "QAT", "pruned"
SPOILED = ("noise", "blank")
# Standard errors a mean difference must be away from zero.
_SURE = 1.96
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """One thing that was asked: its measured value in words; is_met None = not measured."""

    title: str
    asked: str
    measured: str
    is_met: bool | None


def find_targets(report: Report, fusion: FusionReport, nbytes: int | None) -> list[Target]:
    """Every target, in the order of the table. nbytes: of the two exported files, None while there are none."""
    found = [_share_target(name, title, goal, report) for name, title, _, _, _, goal in ROWS if goal is not None]
    found.append(_rounding_target(report))
    size = NOT_MEASURED if nbytes is None else f"{nbytes / 1e6:.2f} MB"
    found.append(
        Target(
            "both files together",
            f"at most {MAX_FILE_BYTES / 1e6:.0f} MB",
            size,
            None if nbytes is None else nbytes <= MAX_FILE_BYTES,
        )
    )
    found += [_fusion_target(condition, fusion) for condition in SPOILED]
    found += [_weight_target(name, fusion.weights.get(name, ())) for name in ("gcmf", SHIPPED)]
    return found


def difference(first: Rate, second: Rate) -> tuple[float, float, float]:
    """first's share less second's, and its 95 % interval."""
    apart = first.share - second.share
    (low1, high1), (low2, high2) = first.interval(), second.interval()
    low = apart - math.hypot(first.share - low1, high2 - second.share)
    high = apart + math.hypot(high1 - first.share, second.share - low2)
    return apart, low, high


def compared(first: Rate | None, second: Rate | None) -> str:
    """The difference in points for people: +3.2 points (0.4 to 6.0)."""
    if first is None or second is None or not first.total or not second.total:
        return NOT_MEASURED
    apart, low, high = (100 * value for value in difference(first, second))
    return f"{apart:+.1f} points ({low:+.1f} to {high:+.1f})"


def fusion_row(rates: Mapping[str, Mapping[str, Rate]]) -> str | None:
    """The row fusion is judged by: the whole action, None where it was not asked of both."""
    return "spoken_action" if all("spoken_action" in rates.get(stage, {}) for stage in ("gcmf", "concat")) else None


def _share_target(name: str, title: str, goal: float, report: Report) -> Target:
    rate = report.rates.get(SHIPPED, {}).get(name)
    asked = f"at least {100 * goal:.0f} %" if goal < 1 else "100 %"
    if rate is None or not rate.total:
        return Target(title, asked, NOT_MEASURED, None)
    return Target(title, asked, f"{rate}", rate.share >= goal)


def _rounding_target(report: Report) -> Target:
    """The worst loss over the rows that have a goal; both columns must hold them all."""
    shipped, plain = report.rates.get(SHIPPED, {}), report.rates.get(FLOAT, {})
    title = f"quantized within {100 * MAX_ROUNDING_LOSS:.0f} point of the float weights (column {FLOAT}), worst row"
    asked = f"at most {100 * MAX_ROUNDING_LOSS:.0f} point less"
    rows = {name: title_ for name, title_, _, _, _, goal in ROWS if goal is not None}
    losses = {row: plain[row].share - shipped[row].share for row in rows if row in plain and row in shipped}
    if not losses:
        return Target(title, asked, NOT_MEASURED, None)
    worst = max(losses, key=losses.__getitem__)
    said = f"{0.0 - 100 * losses[worst]:+.1f} points ({rows[worst]})"
    # A whole number of examples over another is seldom exact in floating point.
    is_met = losses[worst] <= MAX_ROUNDING_LOSS + 1e-9
    return Target(title, asked, said, is_met if len(losses) == len(rows) or not is_met else None)


def _fusion_target(condition: str, fusion: FusionReport) -> Target:
    """Met only where the interval of the difference lies above zero."""
    title = f"gated fusion against concatenation, {CONDITIONS[condition][0]}"
    rates = fusion.rates.get(condition, {})
    row = fusion_row(rates)
    if row is None:
        return Target(title, "better", NOT_MEASURED, None)
    gcmf, concat = rates["gcmf"][row], rates["concat"][row]
    _, low, high = difference(gcmf, concat)
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference these examples can show"
    return Target(title, "better", f"{compared(gcmf, concat)}: {verdict}", low > 0)


def _weight_target(name: str, points: Sequence[Weight]) -> Target:
    """Falls with the noise: no step towards it raises the mean, and the ends are surely apart."""
    title = f"audio weight falls as the noise rises, {'shipped model' if name == SHIPPED else 'stage ' + name}"
    if len(points) < 2:
        return Target(title, "falls", NOT_MEASURED, None)
    ordered = sorted(points, key=lambda point: point.snr_db)
    loud, quiet = ordered[0], ordered[-1]
    error = math.hypot(loud.spread / math.sqrt(loud.examples), quiet.spread / math.sqrt(quiet.examples))
    is_apart = quiet.mean - loud.mean > _SURE * error
    rises = [(a, b) for a, b in zip(ordered[1:], ordered[:-1], strict=True) if b.mean > a.mean + _error(a, b)]
    said = f"{quiet.mean:.3f} at {quiet.snr_db:.0f} dB, {loud.mean:.3f} at {loud.snr_db:.0f} dB"
    if is_apart and rises:
        said += f", but it rises from {rises[0][0].snr_db:.0f} to {rises[0][1].snr_db:.0f} dB"
    return Target(title, "falls", said, is_apart and not rises)


def _error(a: Weight, b: Weight) -> float:
    """How far two means may lie apart by chance."""
    return _SURE * math.hypot(a.spread / math.sqrt(a.examples), b.spread / math.sqrt(b.examples))
