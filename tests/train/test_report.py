"""The report's columns: same questions and sounds for all, the shipped bytes measured, what is missing named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from autoglm.errors import ConfigError, FormatError  # noqa: E402
from autoglm.train import evaluate as evaluating  # noqa: E402
from autoglm.train import report as reporting  # noqa: E402
from autoglm.train.checkpoint import DONE_FILE, load_weights  # noqa: E402
from autoglm.train.inference import LoadedPhone  # noqa: E402
from autoglm.train.report import (  # noqa: E402
    COLUMNS,
    REPORT_FILE,
    REPORT_FOLDER,
    TABLE_FILE,
    export_rounded,
    load_column,
    make_report,
    read_report,
    sha256_of,
    shipped_pair,
)
from autoglm.train.run_context import RunContext  # noqa: E402
from autoglm.train.world.tasks import Example, Task  # noqa: E402
from tests.train.finished_run import finish  # noqa: E402

COUNTS: dict[Task, int] = {"identity": 4}
RIGHT = {"teacher": 4, "student": 1, "distilled": 2, "pruned": 2, "PTQ": 0, "QAT": 3}
asked: list[list[tuple[str, str]]] = []


def new_context(folder: Path) -> RunContext:
    return RunContext("smoke", folder, torch.device("cpu"))


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that answer the first so many questions of a column rightly; what they are asked is noted."""
    asked.clear()

    def stub(phone: LoadedPhone, **settings: Any) -> Callable[[list[Example]], list[str]]:
        right = list(RIGHT.values())[len(asked)]
        asked.append([])

        def generate(examples: list[Example]) -> list[str]:
            asked[-1] += [(example.typed, example.answer) for example in examples]
            return [f"<answer>{e.answer if i < right else ''}</answer>" for i, e in enumerate(examples)]

        return generate

    monkeypatch.setattr(reporting, "replier", stub)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    return finish(new_context(tmp_path_factory.mktemp("run")))


def test_every_column_is_asked_the_same(finished: RunContext, replies: None) -> None:
    steps: list[tuple[int, int]] = []
    report = make_report(finished, counts=COUNTS, progress=lambda done, total: steps.append((done, total)))
    assert list(report.columns) == list(COLUMNS) and report.missing == {}
    assert len(asked) == len(COLUMNS) and len(asked[0]) == 4
    assert all(questions == asked[0] for questions in asked)
    measured = {name: sum(rate.right for rate in rates.values()) for name, rates in report.rates.items()}
    assert measured == RIGHT
    assert steps == [(4 * n, 24) for n in range(1, 7)]


def test_files_hold_what_was_measured(finished: RunContext, replies: None) -> None:
    report = make_report(finished, counts=COUNTS)
    folder = finished.run_dir / REPORT_FOLDER
    assert read_report(folder / REPORT_FILE) == report
    table = (folder / TABLE_FILE).read_text()
    assert "| teacher | student | distilled | pruned | PTQ | QAT |" in table and "100.0 %" in table
    pair = shipped_pair(finished.run_dir)
    assert pair is not None
    content = json.loads((folder / REPORT_FILE).read_text())["columns"]
    assert content["QAT"]["sha256"] == [sha256_of(pair.text), sha256_of(pair.mmproj)]
    assert content["PTQ"]["sha256"] == content["pruned"]["sha256"]
    assert content["pruned"]["parameters"] < content["student"]["parameters"] < content["teacher"]["parameters"]


def test_measured_columns_are_kept_only_for_the_same_bytes(tmp_path: Path, replies: None) -> None:
    context = finish(new_context(tmp_path), ("teacher", "student"))
    first = make_report(context, counts=COUNTS)
    assert make_report(context, counts=COUNTS, reuse=True) == first and len(asked) == 2
    weights, path = (tmp_path / name / "weights.safetensors" for name in ("teacher", "student"))
    path.write_bytes(weights.read_bytes())
    again = make_report(context, counts=COUNTS, reuse=True)
    assert len(asked) == 3 and again.columns["teacher"] == first.columns["teacher"]
    assert again.columns["student"] != first.columns["student"]
    assert len(asked) == 3
    make_report(context, counts={"identity": 2}, reuse=True)
    assert len(asked) == 5, "other counts are another report"


def test_unfinished_stages_are_left_out_and_named(tmp_path: Path, replies: None) -> None:
    context = finish(new_context(tmp_path), ("student", "pruned", "distilled"))
    (tmp_path / "distilled" / DONE_FILE).unlink()  # begun, not finished
    report = make_report(context, counts=COUNTS)
    assert list(report.columns) == ["student", "pruned", "PTQ"]
    assert report.missing == {name: f"stage '{COLUMNS[name]}' is not finished" for name in
                              ("teacher", "distilled", "QAT")}  # fmt: skip
    table = (tmp_path / REPORT_FOLDER / TABLE_FILE).read_text()
    assert "Left out: teacher (stage 'teacher' is not finished)." in table and "| teacher |" not in table


def test_nothing_to_report_and_damaged_reports_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to report"):
        make_report(new_context(tmp_path), counts=COUNTS)
    with pytest.raises(FormatError, match="is not there. Mend: autoglm train --stage report"):
        read_report(tmp_path / REPORT_FILE)
    for text in ("{", "{}", '{"columns": {"a": 1}}'):
        (tmp_path / REPORT_FILE).write_text(text)
        with pytest.raises(FormatError, match="is damaged"):
            read_report(tmp_path / REPORT_FILE)


def test_a_pair_that_is_not_exported_is_named(tmp_path: Path, replies: None) -> None:
    context = finish(new_context(tmp_path), ("qat",))
    (tmp_path / "export" / "mmproj-AutoGLM-Phone-Nano-Q8_0.gguf").unlink()
    assert reporting.missing_columns(tmp_path)["QAT"] == "the pair is not exported yet"
    with pytest.raises(ConfigError, match="nothing to report"):
        make_report(context, counts=COUNTS)


def test_ptq_is_the_pruned_model_rounded_and_nothing_more(finished: RunContext) -> None:
    """The pruned layer stays out, weights are rounded and not trained, and the shipped files are left alone."""
    pair = export_rounded(finished)
    assert pair.text.parent != finished.run_dir / "export"
    ptq, plain = load_column(finished, "PTQ").model, load_column(finished, "pruned").model
    assert ptq.config.text.pruned_ffn == plain.config.text.pruned_ffn == (1,)
    shipped = load_column(finished, "QAT").model.state_dict()
    # The untrained `qat` stage of this run began as the same rounding, so both pairs must agree to the bit.
    assert all(torch.equal(value, shipped[name]) for name, value in ptq.state_dict().items())
    float_weights, _ = load_weights(finished.run_dir / "pruned")
    before = float_weights["model.text.embed_tokens.weight"]
    after = ptq.text.embed_tokens.weight
    assert not torch.equal(before, after) and (before - after).abs().max() < 0.2 * before.abs().max()


def test_the_whole_set_by_default_and_few_in_a_smoke_run(tmp_path: Path) -> None:
    assert reporting.default_counts(RunContext("nano", tmp_path, torch.device("cpu"))) == evaluating.COUNTS
    assert sum(reporting.default_counts(new_context(tmp_path)).values()) < 10
