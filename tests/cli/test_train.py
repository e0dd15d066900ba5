"""autoglm train as a person meets it: stages in order, skips, resume, stops, one clear error for each wrong turn."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from autoglm import cli  # noqa: E402
from autoglm.cli import train as training  # noqa: E402
from autoglm.train.checkpoint import load_stage_weights  # noqa: E402
from autoglm.train.trainer import Stage  # noqa: E402
from tests.cli.test_commands import only_error, run  # noqa: E402
from tests.train.toy import ToyStage  # noqa: E402

built: list[str] = []
check_world = training._check_world


def toy_stages(**settings: Any) -> dict[str, Callable[[Any], Stage]]:
    """Two stages, the second starts from the first one's weights."""

    def teacher(context: Any) -> Stage:
        built.append("teacher")
        return ToyStage(name="teacher", preset=context.preset, **settings)

    def student(context: Any) -> Stage:
        built.append("student")
        stage = ToyStage(name="student", preset=context.preset)
        stage.model.load_state_dict(load_stage_weights(context.run_dir, "teacher", context.preset))
        return stage

    return {"teacher": teacher, "student": student}


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    built.clear()
    monkeypatch.setattr(training, "STAGES", toy_stages())
    monkeypatch.setattr(training, "_check_world", lambda preset: None)  # toys draw and say nothing


class Interrupted(ToyStage):
    def loss(self, batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(batch)


def test_all_stages_run_once_and_are_listed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capfd, "train", "nano", "--run-dir", str(tmp_path))
    assert code == 0 and built == ["teacher", "student"]
    assert "[1/2] teacher: finished at step 6" in err and "error" in out and "student" in out
    for name in built:
        assert (tmp_path / name / "loss.png").exists() and (tmp_path / name / "metrics.jsonl").exists()
    assert json.loads((tmp_path / "run.json").read_text()) == {"preset": "nano"}
    built.clear()
    code, out, err = run(capfd, "train", "nano", "--run-dir", str(tmp_path))
    assert code == 0 and built == [] and err.count("finished before") == 2


def test_one_stage_at_a_time(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capfd, "train", "nano", "--run-dir", str(tmp_path), "--stage", "student")
    assert code == 2 and "ERROR: stage 'teacher' is not finished" in err and "--stage teacher" in err
    for name in ("teacher", "student"):
        assert run(capfd, "train", "nano", "--run-dir", str(tmp_path), "--stage", name)[0] == 0
    assert built == ["student", "teacher", "student"]


def test_a_signal_keeps_a_checkpoint_and_says_how_to_go_on(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = toy_stages()
    monkeypatch.setitem(stages, "student", lambda context: Interrupted(name="student", preset="nano"))
    monkeypatch.setattr(training, "STAGES", stages)
    arguments = ["train", "nano", "--run-dir", str(tmp_path)]
    code, _, err = run(capfd, *arguments)
    assert code == 128 + signal.SIGTERM
    assert "student: stopped at step 1" in err and f"autoglm train nano --run-dir '{tmp_path}' --resume" in err
    monkeypatch.setattr(training, "STAGES", toy_stages())
    code, _, err = run(capfd, *arguments)
    assert code == 2 and "--resume goes on with it" in err.splitlines()[-1]
    code, _, err = run(capfd, *arguments, "--resume")
    assert code == 0 and "going on from step 1" in err and built.count("teacher") == 1


def test_minutes_are_shared_by_the_stages(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "STAGES", toy_stages(steps=10**6, evaluate_every=0))
    code, _, err = run(capfd, "train", "nano", "--run-dir", str(tmp_path), "--minutes", "0.01")
    assert code == 0 and "teacher: stopped at step" in err and built == ["teacher"]


def test_smoke_leaves_nothing_behind(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                     tmp_path: Path) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capfd, "train", "--smoke")
    assert code == 0 and built == ["teacher", "student"] and "preset smoke" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the preset to train"),
        (["phone-10b"], "preset 'phone-10b' cannot be trained here, expected nano"),
        (["phone-9b"], "cannot be trained here"),
        (["nano", "--smoke"], "leave the preset 'nano' out"),
        (["nano", "--stage", "prune"], "--stage 'prune' is no stage; the stages are teacher, student"),
        (["nano", "--minutes", "-1"], "--minutes"),
        (["nano", "--minutes", "soon"], "--minutes"),
    ],
)
def test_wrong_flags_are_one_line(
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capfd, "train", *arguments)
    assert code == 2 and out == "" and message in only_error(err)
    assert built == [] and list(tmp_path.iterdir()) == []


def test_wrong_run_folders(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capfd, "train", "--smoke", "--run-dir", str(tmp_path / "a"))[0] == 0
    code, _, err = run(capfd, "train", "nano", "--run-dir", str(tmp_path / "a"))
    assert code == 2 and "holds a run of preset 'smoke', this is 'nano'" in only_error(err)
    (tmp_path / "a" / "run.json").write_text("{")
    code, _, err = run(capfd, "train", "nano", "--run-dir", str(tmp_path / "a"))
    assert code == 3 and "is damaged" in only_error(err)
    (tmp_path / "file").write_text("")
    code, _, err = run(capfd, "train", "nano", "--run-dir", str(tmp_path / "file"))
    assert code == 2 and "is no folder to write to" in only_error(err)


def test_a_truncated_checkpoint_is_one_line_and_loses_no_finished_stage(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["train", "nano", "--run-dir", str(tmp_path)]
    assert run(capfd, *arguments)[0] == 0
    (tmp_path / "student" / "done.json").unlink()
    checkpoint = tmp_path / "student" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    teacher = (tmp_path / "teacher" / "weights.safetensors").read_bytes()
    code, _, err = run(capfd, *arguments, "--resume")
    assert code == 3 and err.count("ERROR: ") == 1 and "Traceback" not in err
    assert str(checkpoint) in err and "remove it to train this stage from its beginning" in err
    checkpoint.unlink()
    assert run(capfd, *arguments, "--resume")[0] == 0
    assert (tmp_path / "teacher" / "weights.safetensors").read_bytes() == teacher


def test_missing_assets_stop_a_real_run_before_it_starts(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_check_world", check_world)
    monkeypatch.setattr("autoglm.train.world.assets.missing_assets", lambda: ("fonts-noto-cjk",))
    code, _, err = run(capfd, "train", "nano", "--run-dir", str(tmp_path / "x"))
    assert code == 2 and "fonts-noto-cjk. Mend: sh scripts/install_train_assets.sh" in only_error(err)
    assert built == [] and not (tmp_path / "x").exists()


def test_presets_and_stages_are_listed(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capfd, "train", "--list")
    assert code == 0 and "…" not in out and "teacher, student" in out
    nine = next(line for line in out.splitlines() if "phone-9b" in line)
    assert nine.split() == ["phone-9b", "9,745,423,619", "9,400,279,040", "115,171,584", "28,580,864", "201,392,131"]
    assert "autoglm train nano" in out


def test_help_names_every_flag(capfd: pytest.CaptureFixture[str]) -> None:
    for command, flags in {
        "train": "--stage --resume --run-dir --minutes --smoke --list",
        "eval": "--mmproj --examples --task --seed --blank --json --markdown",
    }.items():
        _, out, _ = run(capfd, command, "--help")
        assert all(flag in out for flag in flags.split()), command
    assert cli.main(["data"]) in (0, 2)
