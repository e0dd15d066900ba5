"""Two gloo processes under torchrun and FSDP2: the losses of one process, save, stop and resume."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from autoglm.train.checkpoint import read_tensors  # noqa: E402
from autoglm.train.stage_log import read_metrics  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def toy_run(processes: int, *arguments: str | Path) -> str:
    """Run toy_run.py alone or under torchrun; its output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else ()), str(ROOT / "tests" / "train" / "toy_run.py")]
    result = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir / "toy" / "metrics.jsonl") if "loss" in record]


def tensors(run_dir: Path, file: str) -> dict[str, Any]:
    return {
        name: tensor
        for name, tensor in read_tensors(run_dir / "toy" / f"{file}.safetensors")[0].items()
        if not name.startswith("rng.")
    }


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_stop_and_resume_as_one_does(tmp_path: Path) -> None:
    """Both processes have other micro-batches, some without a part of the model; only the second gets the signal.

    First with every block a unit of its own, then, resumed, as one unit; then resumed by one process alone.
    """
    toy_run(1, tmp_path / "one")
    said = toy_run(2, tmp_path / "two", "--units", "--stop-at", "3")
    assert "rank 0 of 2: step 3" in said and "rank 1 of 2: step 3" in said
    shutil.copytree(tmp_path / "two", tmp_path / "alone")
    said = toy_run(2, tmp_path / "two", "--resume")
    assert "rank 0 of 2: step 8" in said and "rank 1 of 2: step 8" in said
    toy_run(1, tmp_path / "alone", "--resume")
    expected = losses(tmp_path / "one")
    assert len(expected) == 8
    for run in ("two", "alone"):
        assert losses(tmp_path / run) == pytest.approx(expected, rel=1e-4), run
        for file in ("checkpoint", "weights"):
            ours, theirs = tensors(tmp_path / run, file), tensors(tmp_path / "one", file)
            assert ours.keys() == theirs.keys()
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5, msg=f"{run} {file} {name}")
