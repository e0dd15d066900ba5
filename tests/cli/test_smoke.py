"""autoglm train --smoke, whole: every stage, the exported pair, and autoglm eval on what came out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from autoglm.errors import ConfigError  # noqa: E402
from autoglm.train.checkpoint import load_stage_weights, read_done  # noqa: E402
from autoglm.train.stages import STAGES  # noqa: E402
from autoglm.train.world.speech import voices  # noqa: E402
from tests.cli.test_commands import only_error, run  # noqa: E402


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with every stage of --smoke done: one to three minutes on two cores."""
    from autoglm import cli

    try:
        for language in ("zh", "en"):
            for split in ("train", "test"):
                voices(language, split)
    except ConfigError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("smoke") / "run"
    assert cli.main(["train", "--smoke", "--run-dir", str(folder)]) == 0
    return folder


def test_every_stage_leaves_its_files(smoke_run: Path) -> None:
    for name in STAGES:
        done = read_done(smoke_run / name)
        assert done is not None and done.preset == "smoke" and done.step == 3
        assert (smoke_run / name / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert (smoke_run / name / "metrics.jsonl").read_text().count("\n") >= 1


def test_stages_go_on_from_each_other(smoke_run: Path) -> None:
    """What a stage does not train is what it was handed: the decoder waits for pictures and sounds, eyes for sounds."""
    weights = {name: load_stage_weights(smoke_run, name, "smoke") for name in ("pictures", "sounds", "sight")}

    def changed(one: str, other: str) -> set[str]:
        """Parts of the model whose weights are not the same after two stages."""
        names = [name for name in weights[one] if name.startswith("model.")]
        return {name.split(".")[1] for name in names if not torch.equal(weights[one][name], weights[other][name])}

    assert changed("pictures", "sounds") == {"audio", "audio_projector"}
    assert changed("pictures", "sight") == {"vision", "vision_projector", "fusion", "text"}


def test_eval_asks_checkpoint_and_pair_the_same(capfd: pytest.CaptureFixture[str], smoke_run: Path) -> None:
    """The exported pair is the qat stage's model bit for bit, so both columns are equal."""
    pair = smoke_run / "export" / "AutoGLM-Phone-Nano-Q4_K_M.gguf"
    arguments = ["eval", f"qat={smoke_run / 'qat'}", f"pair={pair}", "-n", "2"]
    code, out, err = run(capfd, *arguments, "--task", "identity", "--task", "spoken_action", "--json")
    assert code == 0, err
    rates = json.loads(out.splitlines()[-1])
    assert set(rates) == {"qat", "pair"} and rates["qat"] == rates["pair"]
    totals = {row: entry["total"] for row, entry in rates["qat"].items()}
    assert totals["identity_zh"] == totals["identity_en"] == 1 and totals["spoken_action"] == 2
    teacher = str(smoke_run / "teacher" / "checkpoint.safetensors")
    code, out, _ = run(capfd, *arguments[:2], f"teacher={teacher}", "-n", "1", "--task", "identity", "--markdown")
    assert code == 0 and "| asked | qat | teacher |" in out and "who are you" in out
    code, out, _ = run(capfd, *arguments[:2], "--task", "identity", "-n", "1")
    assert code == 0 and "Held-out set" in out


def test_another_engine_reads_the_exported_text(capfd: pytest.CaptureFixture[str], smoke_run: Path) -> None:
    for name in ("AutoGLM-Phone-Nano-Q4_K_M.gguf", "AutoGLM-Phone-Nano-compatible-Q4_K_M.gguf"):
        code, out, err = run(capfd, "info", str(smoke_run / "export" / name), "--json")
        assert code == 0, err
        assert json.loads(out)["problem"] is None


def test_a_finished_run_is_not_trained_again(capfd: pytest.CaptureFixture[str], smoke_run: Path) -> None:
    code, _, err = run(capfd, "train", "--smoke", "--run-dir", str(smoke_run))
    assert code == 0 and err.count("finished before") == len(STAGES)


def test_wrong_models_are_one_line(capfd: pytest.CaptureFixture[str], smoke_run: Path, tmp_path: Path) -> None:
    shutil.copytree(smoke_run / "qat", tmp_path / "cut")
    weights = tmp_path / "cut" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    pair = str(smoke_run / "export" / "AutoGLM-Phone-Nano-Q4_K_M.gguf")
    for arguments, exit_code, message in (
        ([], 2, "name what to measure"),
        (["none.gguf"], 2, "'none.gguf' is not there"),
        ([str(tmp_path / "cut")], 3, "damaged or cut short"),
        ([str(smoke_run / "eyes")], 2, "keeps no whole model"),
        ([str(smoke_run)], 2, "is it a stage's folder?"),
        ([pair, pair], 2, "two models are called"),
        ([pair, "--mmproj", pair], 3, "is not an mmproj"),
        ([pair, "--task", "sing"], 2, "--task 'sing' is no task"),
        ([pair, "--json", "--markdown"], 2, "give one of them"),
    ):
        code, out, err = run(capfd, "eval", *arguments)
        assert code == exit_code and out == "" and message in only_error(err), arguments
