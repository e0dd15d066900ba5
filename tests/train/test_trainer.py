"""The training loop: bit-exact resume, checkpoints that survive anything, stops, logs, one clear error each."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from autoglm.errors import ConfigError, FormatError, TrainingError  # noqa: E402
from autoglm.train import checkpoint  # noqa: E402
from autoglm.train.checkpoint import load_stage_weights, load_weights, read_done, read_tensors  # noqa: E402
from autoglm.train.stage_log import read_metrics  # noqa: E402
from autoglm.train.trainer import Pace, Stage, learning_rate, train  # noqa: E402
from tests.train.toy import ToyStage  # noqa: E402

EACH = Pace(log_every=1)


class Stopping(ToyStage):
    """Raises a signal while step `stop_at` is computed."""

    stop_at = 3
    signal = signal.SIGTERM

    def loss(self, batch: Any) -> Any:
        self.calls = getattr(self, "calls", self.first_steps[-1]) + 1
        if self.calls == self.stop_at:
            os.kill(os.getpid(), self.signal)
        return super().loss(batch)


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir / "toy" / "metrics.jsonl") if "loss" in record]


def weights(run_dir: Path) -> dict[str, Any]:
    return read_tensors(run_dir / "toy" / "weights.safetensors")[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, number: int) -> None:
    train(ToyStage(), tmp_path / "whole", pace=EACH)
    stage = Stopping()
    stage.signal = number  # type: ignore[assignment]
    outcome = train(stage, tmp_path / "parts", pace=EACH)
    assert (outcome.step, outcome.is_finished, outcome.signal) == (3, False, number)
    assert not (tmp_path / "parts" / "toy" / "done.json").exists()
    torch.randn(5)  # whatever else drew random numbers meanwhile
    second = ToyStage()
    outcome = train(second, tmp_path / "parts", resume=True, pace=EACH)
    assert outcome.is_finished and second.first_steps == [3]
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and len(losses(tmp_path / "whole")) == 6
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    whole, parts = (read_tensors(tmp_path / kind / "toy" / "checkpoint.safetensors")[0] for kind in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_training_learns_and_keeps_the_average(tmp_path: Path) -> None:
    stage = ToyStage(steps=400, dropout=0.0, evaluate_every=100, config={"sizes": {"width": 8}})
    outcome = train(stage, tmp_path)
    assert outcome.metrics["error"] < 0.1 and losses(tmp_path)[0] > 1
    # What stays in memory and on disk is the EMA, and it is what was evaluated last.
    with torch.no_grad():
        assert stage.evaluate() == pytest.approx(outcome.metrics)
    on_disk, facts = load_weights(tmp_path / "toy")
    assert facts.step == 400 and facts.config == {"sizes": {"width": 8}}
    assert all(torch.equal(on_disk[n], t) for n, t in stage.model.state_dict().items())
    tensors, _ = read_tensors(tmp_path / "toy" / "checkpoint.safetensors")
    assert not torch.equal(tensors["model.head.weight"], tensors["ema.head.weight"])
    from_checkpoint, _ = load_weights(tmp_path / "toy" / "checkpoint.safetensors")
    assert torch.equal(from_checkpoint["head.weight"], tensors["ema.head.weight"])


def test_finished_stage_is_skipped_and_its_result_loaded(tmp_path: Path) -> None:
    first = ToyStage()
    train(first, tmp_path)
    again = ToyStage()
    outcome = train(again, tmp_path)
    assert outcome.is_finished and again.first_steps == [] and outcome.metrics == read_done(tmp_path / "toy").metrics  # type: ignore[union-attr]
    assert all(torch.equal(t, again.model.state_dict()[n]) for n, t in first.model.state_dict().items())
    assert load_stage_weights(tmp_path, "toy", "small").keys() == first.model.state_dict().keys()


def test_minutes_end_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    outcome = train(ToyStage(steps=10**6), tmp_path, minutes=0.005, pace=Pace(plot_seconds=1e9))
    assert 0 < outcome.step < 10**6 and not outcome.is_finished and outcome.signal is None
    assert read_tensors(tmp_path / "toy" / "checkpoint.safetensors")[1].step == outcome.step


def test_micro_batches_average_as_one_large_batch(tmp_path: Path) -> None:
    class OneLarge(ToyStage):
        def batches(self, start_step: int, rank: int, world: int) -> Iterator[Any]:
            for parts in super().batches(start_step, rank, world):
                yield torch.cat(parts)

    train(ToyStage(micro_batches=3, dropout=0.0), tmp_path / "micro", pace=EACH)
    train(OneLarge(micro_batches=3, dropout=0.0), tmp_path / "large", pace=EACH)
    assert losses(tmp_path / "micro") == pytest.approx(losses(tmp_path / "large"), rel=1e-5)


def test_learning_rate_rises_then_falls_to_its_floor() -> None:
    stage = ToyStage(steps=100, warmup=10, final_learning_rate=0.1)
    rates = [learning_rate(stage, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.005) and rates[9] == pytest.approx(0.05) == pytest.approx(rates[10])
    assert rates[55] == pytest.approx(0.05 * 0.55) and rates[100] == pytest.approx(0.005)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_metrics_and_plot_are_written(tmp_path: Path) -> None:
    train(ToyStage(steps=7), tmp_path, pace=Pace(log_every=2))
    records = read_metrics(tmp_path / "toy" / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [2, 4, 6, 7]
    assert [r["step"] for r in records if "evaluation" in r] == [3, 6, 7]
    # The last step is one of every third as well: it is evaluated once.
    assert sum("evaluation" in r for r in read_metrics(_steps_of_six(tmp_path))) == 2
    first = records[0]
    assert first["twice"] == pytest.approx(2 * first["loss"]) and first["samples_per_s"] > 0
    assert {"learning_rate", "gradient_norm", "seconds", "steps_per_s"} <= first.keys()
    assert (tmp_path / "toy" / "loss.png").read_bytes().startswith(b"\x89PNG")


def _steps_of_six(tmp_path: Path) -> Path:
    train(ToyStage(steps=6, evaluate_every=3), tmp_path / "six")
    return tmp_path / "six" / "toy" / "metrics.jsonl"


def test_begun_stage_without_resume_is_refused(tmp_path: Path) -> None:
    train(Stopping(), tmp_path)
    with pytest.raises(ConfigError, match="--resume goes on"):
        train(ToyStage(), tmp_path)


def test_checkpoint_of_another_preset_or_shape_is_refused(tmp_path: Path) -> None:
    train(Stopping(), tmp_path)
    with pytest.raises(ConfigError, match="preset 'small'; this run is stage 'toy', preset 'large'"):
        train(ToyStage(preset="large"), tmp_path, resume=True)
    with pytest.raises(ConfigError, match=r"bias is float32 \[8\] in the file and float32 \[16\] in the model"):
        train(ToyStage(width=16), tmp_path, resume=True)
    train(ToyStage(), tmp_path, resume=True)
    with pytest.raises(ConfigError, match="preset 'large'"):
        train(ToyStage(preset="large"), tmp_path)
    with pytest.raises(ConfigError, match="preset 'large'"):
        load_stage_weights(tmp_path, "toy", "large")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.999])
def test_truncated_checkpoint_is_one_clear_error(tmp_path: Path, kept: float) -> None:
    train(ToyStage(name="earlier"), tmp_path)
    train(Stopping(), tmp_path)
    path = tmp_path / "toy" / "checkpoint.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(FormatError, match="cut short") as caught:
        train(ToyStage(), tmp_path, resume=True)
    assert str(path) in str(caught.value) and "Mend" in str(caught.value)
    assert train(ToyStage(name="earlier"), tmp_path).is_finished


def test_damaged_files_of_a_finished_stage(tmp_path: Path) -> None:
    train(ToyStage(), tmp_path)
    path = tmp_path / "toy" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FormatError, match="done.json"):
        train(ToyStage(), tmp_path)
    (tmp_path / "toy" / "done.json").unlink()  # as the message says
    stage = ToyStage()
    assert train(stage, tmp_path, resume=True).is_finished and stage.first_steps in ([], [6])
    (tmp_path / "toy" / "done.json").write_text("{")
    with pytest.raises(FormatError, match="done.json"):
        train(ToyStage(), tmp_path)


def test_foreign_safetensors_and_missing_stage(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="not written by autoglm train"):
        load_weights(tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="not there"):
        load_weights(tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match="is it a stage's folder"):
        load_weights(tmp_path)
    with pytest.raises(ConfigError, match="--stage teacher"):
        load_stage_weights(tmp_path, "teacher", "small")


def test_crash_while_saving_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(Stopping(), tmp_path)
    path = tmp_path / "toy" / "checkpoint.safetensors"
    before = path.read_bytes()

    def half(tensors: Any, target: Path, metadata: Any) -> None:
        Path(target).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError):
        train(ToyStage(), tmp_path, resume=True)
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert train(ToyStage(), tmp_path, resume=True).is_finished


def test_divergence_and_missing_batches_are_named(tmp_path: Path) -> None:
    class Diverging(ToyStage):
        def loss(self, batch: Any) -> Any:
            loss, values = super().loss(batch)
            return loss * math.nan, values

    class Short(ToyStage):
        def batches(self, start_step: int, rank: int, world: int) -> Iterator[Any]:
            return iter([])

    with pytest.raises(TrainingError, match="diverged: 20 steps"):
        train(Diverging(steps=100), tmp_path / "a")
    with pytest.raises(TrainingError, match="ran out of batches at step 0 of 6"):
        train(Short(), tmp_path / "b")
    for line in (tmp_path / "a" / "toy" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_one_bad_step_is_skipped(tmp_path: Path) -> None:
    class Once(ToyStage):
        def loss(self, batch: Any) -> Any:
            loss, values = super().loss(batch)
            self.calls = getattr(self, "calls", 0) + 1
            return (loss * math.inf if self.calls == 2 else loss), values

    stage = Once(steps=40, dropout=0.0)
    assert train(stage, tmp_path).metrics["error"] < 5
    assert all(torch.isfinite(tensor).all() for tensor in stage.model.state_dict().values())


def test_evaluation_does_not_change_training(tmp_path: Path) -> None:
    train(ToyStage(evaluate_every=1), tmp_path / "often", pace=EACH)
    train(ToyStage(evaluate_every=0), tmp_path / "last", pace=EACH)
    assert losses(tmp_path / "often") == losses(tmp_path / "last")


def test_the_loop_itself_costs_little(tmp_path: Path) -> None:
    """Against the same forward, backward and update written bare: under 2 ms a step more."""
    steps = 200
    stage: Stage = ToyStage(steps=steps, evaluate_every=0, ema_decay=0.0)
    started = time.perf_counter()
    outcome = train(stage, tmp_path, pace=Pace(plot_seconds=1e9))
    assert outcome.is_finished
    ours = time.perf_counter() - started
    bare = ToyStage(steps=steps)
    optimizer = torch.optim.AdamW(bare.model.parameters(), fused=True)
    batches = bare.batches(0, 0, 1)
    started = time.perf_counter()
    for _ in range(steps):
        bare.loss(next(batches)[0])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    extra_ms = 1000 * (ours - (time.perf_counter() - started)) / steps
    print(f"overhead {extra_ms:.3f} ms a step (with the checkpoint and the plot at the end spread over {steps})")
    assert extra_ms < 10
