"""Where a run lies, what it trains, and how many steps each stage of it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoglm.train.checkpoint import load_stage_weights
from autoglm.train.dataset import Sizes
from autoglm.train.model import PhoneConfig, preset
from autoglm.train.world.tasks import Task

SMOKE = "smoke"
TRAINABLE = ("nano",)


@dataclass(frozen=True)
class Plan:
    """Optimizer steps of each stage, and how much a step (one of all tasks: `mixed`) and an evaluation hold."""

    steps: dict[str, int]
    sizes: Sizes
    mixed: Sizes
    counts: dict[Task, int]
    workers: int = 1


NANO_PLAN = Plan(
    steps={
        "reading": 3000, "eyes": 1500, "listening": 1500, "ears": 3000, "pictures": 600, "sounds": 4000,
        "sight": 1000, "teacher": 1100,
        "student": 180, "distilled": 180, "pruned": 40,
        "qat": 90, "gcmf": 120, "concat": 120,
    },
    sizes=Sizes(),
    # Mostly sounds: typing was learned before, and what is said is harder to learn.
    mixed=Sizes(screens=2, questions=9, spoken_screens=1, spoken_questions=8, sounds=20),
    counts={"typed_action": 40, "spoken_action": 40, "is_here": 20, "transcribe": 20, "identity": 12},
)  # fmt: skip
_SMOKE_SIZES = Sizes(soups=1, screens=1, questions=2, spoken_screens=1, spoken_questions=1, sounds=2, words=2)
SMOKE_PLAN = Plan(
    steps=dict.fromkeys(NANO_PLAN.steps, 3),
    sizes=_SMOKE_SIZES,
    mixed=_SMOKE_SIZES,
    counts={"typed_action": 2, "spoken_action": 2, "identity": 2},
    workers=0,
)


@dataclass(frozen=True)
class RunContext:
    """Where and what a run trains: the preset's name, its folder and the device."""

    preset: str
    run_dir: Path
    device: torch.device

    @property
    def plan(self) -> Plan:
        return SMOKE_PLAN if self.preset == SMOKE else NANO_PLAN

    @property
    def student(self) -> PhoneConfig:
        """The sizes of what is shipped."""
        return preset(self.preset)

    @property
    def teacher(self) -> PhoneConfig:
        """The sizes of what the student learns from."""
        return preset("smoke-teacher" if self.preset == SMOKE else f"{self.preset}-teacher")

    def weights(self, stage: str) -> dict[str, Tensor]:
        """The finished weights of an earlier stage. Raises ConfigError that names the stage when it is not done."""
        return load_stage_weights(self.run_dir, stage, self.preset)
