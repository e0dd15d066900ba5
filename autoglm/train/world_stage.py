"""What all stages that learn from the generated world share: their numbers, their batches, a model with its lessons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autoglm.train.dataset import Batch, BatchKind, BatchMaker, Sizes, stream
from autoglm.train.losses import CharacterLesson, Coordinates, PatchLesson, PlaceLesson
from autoglm.train.model import AutoGLMPhone, PhoneConfig
from autoglm.train.run_context import RunContext
from autoglm.train.tokenizer import load_tokenizer
from autoglm.train.trainer import Stage


class WorldStage(Stage):
    """What all stages share: their context, their numbers and their stream of batches; `pupil` is what learns."""

    kinds: tuple[BatchKind, ...] = ()
    pupil: nn.Module

    def __init__(self, context: RunContext, config: PhoneConfig) -> None:
        self.context, self.model_config = context, config
        self.preset = context.preset
        self.steps = context.plan.steps[self.name]
        self.warmup = min(100, self.steps // 5 + 1)
        self.config = config.to_dict()
        torch.manual_seed(sum(self.name.encode()))

    def modules(self) -> nn.Module:
        return self.pupil

    def batches(self, start_step: int, rank: int, world: int) -> Iterator[list[Batch]]:
        maker = BatchMaker(self.model_config, load_tokenizer(), self.kinds, sizes=self.sizes())
        return stream(maker, start_step, rank=rank, world=world, workers=self.context.plan.workers)

    def sizes(self) -> Sizes:
        return self.context.plan.sizes

    def to_device(self, batch: Batch) -> Batch:
        """The batch on this run's device."""
        device = self.context.device
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(batch).items() if isinstance(v, Tensor)}
        return replace(batch, inputs=batch.inputs.to(device), **moved)


class Pupil(nn.Module):
    """A model with the lessons of its encoders."""

    def __init__(self, config: PhoneConfig) -> None:
        super().__init__()
        self.model = AutoGLMPhone(config)
        self.eyes = PatchLesson(config)
        self.ears = CharacterLesson(config)
        self.places = PlaceLesson(config)


def train_only(module: nn.Module, parts: Iterable[nn.Module]) -> None:
    """All of `module` keeps its weights but for `parts`."""
    module.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


def number_targets(context: RunContext, config: PhoneConfig) -> Coordinates:
    """The soft targets of coordinates, on the run's device."""
    return Coordinates(load_tokenizer().number_ids, config.text.vocab_size).to(context.device)


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of `state` under `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
