"""autoglm train --stage report: the last step of the road, from finished stages to the model card beside the pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from autoglm.train.report import read_report  # noqa: E402
from autoglm.train.run_context import RunContext  # noqa: E402
from tests.cli.test_commands import run  # noqa: E402
from tests.train.finished_run import finish  # noqa: E402


def test_report_of_a_finished_run(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoglm.train.inference.MAX_REPLY_TOKENS", 3)
    tone = np.sin(np.arange(16000, dtype=np.float32) * 0.2) * np.float32(0.5)  # no engine is waited for
    monkeypatch.setattr("autoglm.train.dataset.say", lambda text, language, split, rng: tone)
    finish(RunContext("smoke", tmp_path, torch.device("cpu")), ("teacher", "pruned", "qat", "gcmf", "concat"))
    arguments = ["train", "--smoke", "--run-dir", str(tmp_path), "--stage", "report"]
    code, _, err = run(capfd, *arguments)
    assert code == 0 and "report: no column student, stage 'student' is not finished" in err
    assert "Exported" in err and "finished before" not in err, "nothing is trained"
    report = read_report(tmp_path / "report" / "report.json")
    assert list(report.columns) == ["teacher", "pruned", "PTQ", "QAT"] and sum(report.counts.values()) < 10
    card = (tmp_path / "export" / "MODEL_CARD.md").read_text()
    assert report.columns["QAT"].sha256[0] in card and (tmp_path / "export" / "audio_weight.png").exists()
    code, _, err = run(capfd, *arguments, "--resume")
    assert code == 0 and err.count("was measured before") == 5
    assert read_report(tmp_path / "report" / "report.json") == report


def test_nothing_finished_is_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capfd, "train", "--smoke", "--run-dir", str(tmp_path), "--stage", "report")
    assert code == 2 and out == "" and err.count("ERROR: ") == 1 and "Traceback" not in err
    assert "nothing to report" in err.splitlines()[-1] and not (tmp_path / "report").exists()
