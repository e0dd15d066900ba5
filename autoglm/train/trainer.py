"""The one training loop: step, log, evaluate, save, stop when asked, go on bit for bit.

AdamW on the parameters a stage names, linear warmup then cosine, gradients clipped by their norm, an exponential moving
average of the weights where a stage wants one. What is learned and from what is the stage's alone (stages.py).
Sources: AdamW, Loshchilov & Hutter 2019 (arXiv:1711.05101) with its cosine schedule of 2017 (arXiv:1608.03983).
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autoglm.errors import ConfigError, FormatError, TrainingError
from autoglm.train.checkpoint import (
    CHECKPOINT_FILE,
    WEIGHTS_FILE,
    Done,
    Facts,
    check_facts,
    copy_state,
    read_done,
    read_tensors,
    save_done,
    save_tensors,
)
from autoglm.train.distributed import (
    Root,
    agree_on_largest,
    current_world,
    forget_untouched,
    gather_bytes,
    like,
    local,
    mean_over_world,
    shard,
    sync_gradients,
    touch,
    wait_for_all,
    whole,
    without_gradients,
)
from autoglm.train.stage_log import StageLog

_MAX_BAD_STEPS = 20  # in a row; a single overflow is skipped, this many mean that training has diverged
_GO_ON, _SAVE, _STOP = 0, 1, 2


class Stage(Protocol):
    """What the trainer needs to know of a stage; inherit from it for the defaults.

    name, preset   folder of the stage in the run, and the sizes it was built with: a checkpoint of another is refused
    steps, warmup, evaluate_every   in optimizer steps; evaluate_every 0 = only at the end
    learning_rate  the peak; it falls along a cosine to final_learning_rate (a share of the peak)
    weight_decay   on parameters of two dimensions and more
    ema_decay      of the weights' moving average, which is then evaluated and kept as the result; 0 = none
    config         plain JSON kept in the files, for whoever loads the weights (PhoneConfig.to_dict() of the model)
    """

    name: str
    steps: int
    preset: str = ""
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.02
    warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_gradient_norm: float = 1.0
    ema_decay: float = 0.0
    evaluate_every: int = 0
    config: Mapping[str, Any] = {}

    def modules(self) -> nn.Module:
        """What is trained (its parameters with requires_grad), on its device. The same object at each call."""
        ...

    def batches(self, start_step: int, rank: int, world: int) -> Iterator[Any]:
        """One batch a step from start_step on, the same for the same step however often the run was resumed.

        A list is a step of several micro-batches whose gradients are averaged.
        """
        ...

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """The scalar to minimize and what to log; "samples" among the latter (its sum) gives samples/s."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Metrics of the weights as they are now, in eval mode and without gradients; {} = nothing to evaluate."""
        return {}


@dataclass(frozen=True)
class Pace:
    """How often the loop turns to something else than training."""

    checkpoint_minutes: float = 5.0
    log_every: int = 10  # steps
    plot_seconds: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """How a call of train ended; metrics are the last evaluation's."""

    stage: str
    step: int
    is_finished: bool
    seconds: float  # of training, over all resumes
    metrics: dict[str, float]
    signal: int | None = None  # what stopped it


def train(
    stage: Stage, run_dir: Path, *, resume: bool = False, minutes: float | None = None, pace: Pace | None = None
) -> Outcome:
    """Train a stage to its end, or until SIGTERM, SIGINT or `minutes` are over; then its checkpoint is written.

    A finished stage is not trained again: its result is loaded into modules(). Without resume a begun one is refused.
    Raises ConfigError (begun without resume, another preset), FormatError (damaged checkpoint), TrainingError.
    """
    folder = run_dir / stage.name
    done = read_done(folder)
    if done is not None:
        return _load_finished(stage, folder, done)
    if not resume and (folder / CHECKPOINT_FILE).exists():
        raise ConfigError(
            f"stage '{stage.name}' was begun in '{run_dir}'. Mend: --resume goes on with it; "
            "another --run-dir, or removing that stage's folder, begins anew"
        )
    wait_for_all()  # nobody writes before everybody has looked
    folder.mkdir(parents=True, exist_ok=True)
    return _Run(stage, folder, pace or Pace(), minutes).train()


def learning_rate(stage: Stage, step: int) -> float:
    """The rate of optimizer step `step` (from 0): linear warmup, then half a cosine down to final_learning_rate."""
    if step < stage.warmup:
        return stage.learning_rate * (step + 1) / stage.warmup
    progress = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    low = stage.final_learning_rate
    return stage.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@dataclass
class _Window:
    """Sums since the last line of the log."""

    steps: int = 0
    sums: dict[str, Tensor | float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def add(self, name: str, value: Tensor | float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Means of all but samples, which become a rate; a GPU is waited for here and not at every step."""
        elapsed = max(1e-9, time.monotonic() - self.started)
        values = {name: float(total) / self.counts[name] for name, total in self.sums.items() if name != "samples"}
        values["steps_per_s"] = self.steps / elapsed
        if "samples" in self.sums:
            values["samples_per_s"] = float(self.sums["samples"]) / elapsed
        return values


class _Run:
    """One stage being trained."""

    def __init__(self, stage: Stage, folder: Path, pace: Pace, minutes: float | None) -> None:
        self.stage, self.folder, self.pace = stage, folder, pace
        self.world = current_world()
        self.module = stage.modules()
        self.root: Root = shard(self.module, self.world)
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise TrainingError(f"stage '{stage.name}' has nothing to train: no parameter requires a gradient")
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = _optimizer(stage, list(self.parameters.values()))
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()} if stage.ema_decay else {}
        self.step, self.seconds, self.bad_steps = 0, 0.0, 0
        self.metrics: dict[str, float] = {}
        self.evaluated_step: int | None = None
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def train(self) -> Outcome:
        if (self.folder / CHECKPOINT_FILE).exists():
            self._restore(self.folder / CHECKPOINT_FILE)
        else:
            torch.manual_seed(zlib.crc32(self.stage.name.encode()) + self.world.rank)
        log_folder = self.folder if self.world.rank == 0 else None
        self.clock = time.monotonic() - self.seconds
        with (
            _StopSignals() as stop,
            StageLog(log_folder, self.stage.name, self.stage.steps, self.step, self.pace.plot_seconds) as log,
        ):
            if self.step:
                log.say(f"{self.stage.name}: going on from step {self.step}")
            self._loop(stop, log)
            if self.step < self.stage.steps:
                self._save()
                return self._outcome(stop.received)
            self._finish(log)
        return self._outcome(None)

    def _loop(self, stop: _StopSignals, log: StageLog) -> None:
        self.module.train()
        batches = self.stage.batches(self.step, self.world.rank, self.world.size)
        window, saved_at = _Window(), time.monotonic()
        try:
            while self.step < self.stage.steps:
                batch = self._next_batch(batches, stop)
                if batch is None:
                    return
                rate = self._train_step(batch, window)
                del batch
                log.advance(self.step)
                what = self._what_now(stop, saved_at)
                if window.steps >= self.pace.log_every or what != _GO_ON or self.step == self.stage.steps:
                    self._log(log, window, rate)
                    window = _Window()
                if self.stage.evaluate_every and self.step % self.stage.evaluate_every == 0:
                    self._evaluate(log)
                    window.started = time.monotonic()
                if what == _STOP:
                    return
                if what == _SAVE:
                    self._save()
                    saved_at = window.started = time.monotonic()
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()

    def _next_batch(self, batches: Iterator[Any], stop: _StopSignals) -> Any:
        """The step's batch; None if the signal that stops us has ended the processes that make them."""
        # A DataLoader seeds its workers from the global generator: a resumed run would draw once more than a whole one.
        state = torch.get_rng_state()
        try:
            return next(batches)
        except StopIteration:
            raise TrainingError(
                f"stage '{self.stage.name}' ran out of batches at step {self.step} of {self.stage.steps}"
            ) from None
        except RuntimeError:  # what a DataLoader raises then
            if stop.received is None:
                raise
            return None
        finally:
            torch.set_rng_state(state)

    def _train_step(self, batch: Any, window: _Window) -> float:
        """Forward and backward over the micro-batches, clip, update; returns the learning rate used."""
        micro_batches = batch if isinstance(batch, list) else [batch]
        for index, micro_batch in enumerate(micro_batches):
            sync_gradients(self.root, index == len(micro_batches) - 1)
            with _autocast(self.device):
                loss, values = self.root(self._loss, micro_batch)
            (loss / len(micro_batches)).backward()
            window.add("loss", loss.detach())
            for name, value in values.items():
                window.add(name, value)
        forget_untouched(self.parameters.values())
        rate = learning_rate(self.stage, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.stage.max_gradient_norm)
        norm_value = float(whole(norm))
        if math.isfinite(norm_value):
            self.optimizer.step()
            self._update_ema()
            window.add("gradient_norm", norm_value)
            self.bad_steps = 0
        else:
            self._count_bad_step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        window.steps += 1
        return rate

    def _loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        loss, values = self.stage.loss(batch)
        return touch(loss, self.module), values

    def _count_bad_step(self) -> None:
        self.bad_steps += 1
        if self.bad_steps >= _MAX_BAD_STEPS:
            raise TrainingError(
                f"stage '{self.stage.name}' diverged: {self.bad_steps} steps up to {self.step} had no finite gradient. "
                "Mend: a lower learning rate; the last checkpoint is kept, --resume goes on from it"
            )

    def _update_ema(self) -> None:
        if not self.ema:
            return
        # A short memory at first, so that the average does not drag the random start along.
        decay = min(self.stage.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                [local(value) for value in self.ema.values()],
                [local(p.detach()) for p in self.parameters.values()],
                1 - decay,
            )

    def _what_now(self, stop: _StopSignals, saved_at: float) -> int:
        now = time.monotonic()
        what = _GO_ON
        if self.world.rank == 0 and now - saved_at >= 60 * self.pace.checkpoint_minutes:
            what = _SAVE
        if stop.received is not None or now >= self.deadline:
            what = _STOP
        return agree_on_largest(what, self.device)

    def _log(self, log: StageLog, window: _Window, rate: float) -> None:
        values = window.means()
        values["loss"] = mean_over_world(values["loss"], self.device)
        if "samples_per_s" in values:
            values["samples_per_s"] *= self.world.size
        self.seconds = time.monotonic() - self.clock
        left = (self.stage.steps - self.step) / max(1e-9, values["steps_per_s"])
        log.training(self.step, {**values, "learning_rate": rate, "seconds": round(self.seconds, 3)}, left)

    def _evaluate(self, log: StageLog) -> None:
        """Evaluate the EMA where there is one; neither the weights nor the random numbers of training change."""
        if self.evaluated_step == self.step:
            return
        self.evaluated_step = self.step
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._averaged_weights():
            self.module.eval()
            with _autocast(self.device):
                self.metrics = without_gradients(self.root, self.stage.evaluate)
            self.module.train()
        if self.metrics:
            log.evaluation(self.step, self.metrics)

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        self._swap_ema()
        try:
            yield
        finally:
            self._swap_ema()

    def _swap_ema(self) -> None:
        with torch.no_grad():
            for name, value in self.ema.items():
                parameter, kept = local(self.parameters[name].detach()), local(value)
                held = parameter.clone()
                parameter.copy_(kept)
                kept.copy_(held)

    def _finish(self, log: StageLog) -> None:
        """The final evaluation, then the checkpoint, the weights and at last the marker."""
        self._evaluate(log)
        self._save()
        self._swap_ema()  # the result, also in memory, is the average
        weights = {name: whole(tensor) for name, tensor in self.module.state_dict().items()}
        self.module.eval()
        if self.world.rank == 0:
            save_tensors(self.folder / WEIGHTS_FILE, weights, self._facts())
            save_done(
                self.folder,
                Done(self.stage.name, self.stage.preset, self.step, round(self.seconds, 3), self.metrics),
            )
        wait_for_all()

    def _facts(self) -> Facts:
        return Facts(self.stage.name, self.stage.preset, self.step, round(self.seconds, 3), dict(self.stage.config))

    def _save(self) -> None:
        self.seconds = time.monotonic() - self.clock
        tensors = {f"model.{name}": whole(tensor) for name, tensor in self.module.state_dict().items()}
        tensors.update({f"ema.{name}": whole(tensor) for name, tensor in self.ema.items()})
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = whole(value)
        for rank, state in enumerate(gather_bytes(torch.get_rng_state())):
            tensors[f"rng.cpu.{rank}"] = state
        if self.device.type == "cuda":
            for rank, state in enumerate(gather_bytes(torch.cuda.get_rng_state(self.device))):
                tensors[f"rng.cuda.{rank}"] = state
        if self.world.rank == 0:
            save_tensors(self.folder / CHECKPOINT_FILE, tensors, self._facts())

    def _restore(self, path: Path) -> None:
        tensors, facts = read_tensors(path)
        check_facts(path, facts, self.stage.name, self.stage.preset)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}, "rng": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        copy_state(self.module.state_dict(), parts["model"], path)
        copy_state(self.ema, parts["ema"], path)
        for name, tensor in parts["optimizer"].items():
            self._restore_moment(name, tensor, path)
        rank = self.world.rank
        if f"cpu.{rank}" in parts["rng"]:
            torch.set_rng_state(parts["rng"][f"cpu.{rank}"])
        if self.device.type == "cuda" and f"cuda.{rank}" in parts["rng"]:
            torch.cuda.set_rng_state(parts["rng"][f"cuda.{rank}"], self.device)
        self.step, self.seconds = facts.step, facts.seconds

    def _restore_moment(self, name: str, tensor: Tensor, path: Path) -> None:
        parameter_name, _, key = name.rpartition(".")
        parameter = self.parameters.get(parameter_name)
        if parameter is None or (key != "step" and tensor.shape != parameter.shape):
            raise FormatError(f"'{path}' holds optimizer state '{name}' that fits no parameter of this stage")
        # AdamW counts steps on the device where it is fused, in one plain number for all shards.
        value = tensor.to(parameter.device) if key == "step" else like(parameter, tensor)
        self.optimizer.state[parameter][key] = value

    def _outcome(self, signal_number: int | None) -> Outcome:
        is_finished = self.step >= self.stage.steps
        return Outcome(self.stage.name, self.step, is_finished, self.seconds, self.metrics, signal_number)


class _StopSignals:
    """A context in which the first SIGTERM or SIGINT only asks the loop to stop; a second one ends as usual."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


def _load_finished(stage: Stage, folder: Path, done: Done) -> Outcome:
    path = folder / WEIGHTS_FILE
    tensors, facts = read_tensors(path)
    check_facts(path, facts, stage.name, stage.preset)
    copy_state(stage.modules().state_dict(), tensors, path)
    return Outcome(stage.name, done.step, True, done.seconds, done.metrics)


def _optimizer(stage: Stage, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, fused=True)


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 products on a GPU; plain float32 on the CPU, where bf16 gains nothing without AMX."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
