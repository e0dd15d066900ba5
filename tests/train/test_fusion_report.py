"""Both fusions meet the same spoiled media; the audio weight is asked of the same commands at each ratio."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from autoglm.errors import FormatError  # noqa: E402
from autoglm.train import fusion_report as reporting  # noqa: E402
from autoglm.train.dataset import CLEAN_SNR, BatchMaker  # noqa: E402
from autoglm.train.fusion_report import (  # noqa: E402
    FUSION_FILE,
    PLOT_FILE,
    audio_weights,
    make_fusion_report,
    read_fusion,
)
from autoglm.train.inference import LoadedPhone, replier  # noqa: E402
from autoglm.train.report import REPORT_FOLDER  # noqa: E402
from autoglm.train.run_context import RunContext  # noqa: E402
from autoglm.train.tokenizer import load_tokenizer  # noqa: E402
from autoglm.train.world.tasks import Example  # noqa: E402
from tests.train.finished_run import finish  # noqa: E402
from tests.train.phones import make_phone  # noqa: E402

asked: list[tuple[int, float, bool]] = []


@pytest.fixture
def noise_for_voices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of a tone instead of speech: no engine is needed, and none is waited for."""
    tone = np.sin(np.arange(16000, dtype=np.float32) * 0.2) * np.float32(0.5)
    monkeypatch.setattr("autoglm.train.dataset.say", lambda text, language, split, rng: tone)


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without answers that notes (parameters, ratio, is the screen one grey) of each question."""
    asked.clear()

    def stub(phone: LoadedPhone, *, snr: float, **settings: Any) -> Callable[[list[Example]], list[str]]:
        def generate(examples: list[Example]) -> list[str]:
            for example in examples:
                assert example.screen is not None and example.spoken is not None
                is_grey = len(example.screen.image.getcolors(1 << 24) or ()) == 1
                asked.append((phone.model.num_parameters(), snr, is_grey))
            return [""] * len(examples)

        return generate

    monkeypatch.setattr(reporting, "replier", stub)


def new_context(folder: Path) -> RunContext:
    return RunContext("smoke", folder, torch.device("cpu"))


def test_report_of_both_fusions(tmp_path: Path, noise_for_voices: None, replies: None) -> None:
    context = finish(new_context(tmp_path), ("gcmf", "concat", "qat"))
    settings: dict[str, Any] = {"counts": {"spoken_action": 2}, "snrs_db": (0.0, 40.0), "weight_examples": 2}
    report = make_fusion_report(context, **settings)
    small, large = sorted(report.parameters.values())
    assert large / small < 1.05, "models of one size are compared"
    assert {(snr, grey) for _, snr, grey in asked} == {(CLEAN_SNR, False), (0.0, False), (CLEAN_SNR, True)}
    for parameters in report.parameters.values():
        assert sum(entry[0] == parameters for entry in asked) == 6
    assert set(report.rates) == {"clean", "noise", "blank"} and report.missing == {}
    assert list(report.weights) == ["gcmf", "QAT"] and len(report.weights["QAT"]) == 2
    folder = tmp_path / REPORT_FOLDER
    assert read_fusion(folder / FUSION_FILE) == report
    assert (folder / PLOT_FILE).read_bytes()[:4] == b"\x89PNG"
    assert make_fusion_report(context, reuse=True, **settings) == report and len(asked) == 12
    make_fusion_report(context, reuse=True, **{**settings, "counts": {"spoken_action": 3}})
    assert len(asked) == 12 + 18


def test_unfinished_runs_are_named(tmp_path: Path, replies: None) -> None:
    report = make_fusion_report(new_context(tmp_path))
    assert set(report.missing) == {"gcmf", "concat"} and report.rates == {} and asked == []
    assert not (tmp_path / REPORT_FOLDER / PLOT_FILE).exists()
    (tmp_path / REPORT_FOLDER / FUSION_FILE).write_text('{"rates": {}}')
    with pytest.raises(FormatError, match="is damaged"):
        read_fusion(tmp_path / REPORT_FOLDER / FUSION_FILE)


def test_weights_are_those_of_the_model(noise_for_voices: None) -> None:
    """A fusion that always gives the sound the same share says so at every ratio; one that pools it does not."""
    model = make_phone()
    with torch.no_grad():
        model.fusion.pool_weight.zero_()
        model.fusion.pool_bias.copy_(torch.log(torch.tensor([1.0, 3.0, 1.0])))
    phone = LoadedPhone(model, load_tokenizer())
    for point in audio_weights(phone, (0.0, 40.0), 3):
        assert point.mean == pytest.approx(0.75, abs=1e-5) and point.spread < 1e-5 and point.examples == 3
    with torch.no_grad():
        model.fusion.pool_weight.normal_()
    noisy, quiet = audio_weights(phone, (0.0, 40.0), 3)
    assert noisy.mean != quiet.mean and noisy.spread > 0


def test_a_replier_asks_at_one_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float | None] = []
    init = BatchMaker.__init__

    def noted(self: BatchMaker, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self.snr)

    monkeypatch.setattr(BatchMaker, "__init__", noted)
    phone = LoadedPhone(make_phone(), load_tokenizer())
    replier(phone, snr=0.0)
    replier(phone)
    assert made == [0.0, None]
