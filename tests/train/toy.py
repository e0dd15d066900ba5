"""A stage small enough to train in milliseconds: a two-layer network with dropout learns a fixed linear map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autoglm.train.trainer import Stage


class ToyStage(Stage):
    """Each rank takes its share of the step's micro-batches; batches depend on the step alone."""

    def __init__(self, *, steps: int = 6, name: str = "toy", preset: str = "small", micro_batches: int = 1,
                 width: int = 8, dropout: float = 0.1, **settings: Any) -> None:  # fmt: skip
        self.name, self.preset, self.steps, self.micro_batches = name, preset, steps, micro_batches
        self.learning_rate, self.warmup, self.ema_decay, self.evaluate_every = 0.05, 2, 0.9, 3
        for key, value in settings.items():
            setattr(self, key, value)
        torch.manual_seed(3)
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout)) for _ in range(2))
        self.model = nn.ModuleDict({"blocks": blocks, "head": nn.Linear(width, 2, bias=False)})
        self.target = torch.randn(width, 2)
        self.width = width
        self.first_steps: list[int] = []

    def modules(self) -> nn.Module:
        return self.model

    def batches(self, start_step: int, rank: int, world: int) -> Iterator[Any]:
        self.first_steps.append(start_step)
        torch.rand(1)  # as a DataLoader does
        for step in range(start_step, 10**9):
            generator = torch.Generator().manual_seed(step)
            everything = [torch.randn(4, self.width, generator=generator) for _ in range(self.micro_batches)]
            yield everything[rank::world]

    def loss(self, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        loss = (self.output(batch) - batch @ self.target).square().mean()
        return loss, {"samples": float(len(batch)), "twice": 2 * float(loss.detach())}

    def evaluate(self) -> dict[str, float]:
        batch = torch.randn(16, self.width, generator=torch.Generator().manual_seed(99))
        return {"error": float((self.output(batch) - batch @ self.target).square().mean())}

    def output(self, batch: Tensor) -> Tensor:
        hidden = batch
        for block in self.model["blocks"]:  # type: ignore[attr-defined]
            hidden = hidden + torch.tanh(block(hidden))
        return self.model["head"](hidden)  # type: ignore[no-any-return]
