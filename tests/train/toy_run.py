"""Train the toy stage under torchrun: toy_run.py RUN_DIR [--resume] [--units] [--stop-at STEP]."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoglm.train import trainer
from autoglm.train.distributed import current_world, join_world, leave_world, shard
from autoglm.train.trainer import Pace, train
from tests.train.toy import ToyStage


class Uneven(ToyStage):
    """Rank 1's batches never use the head's bias-like `extra`, and rank 1 alone is sent the signal."""

    stop_at = 0

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.model["extra"] = torch.nn.Linear(self.width, 2, bias=False)
        self.calls = 0

    def loss(self, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        self.calls += 1
        loss, values = super().loss(batch)
        if float(batch[0, 0].detach()) > 0:
            loss = loss + 0.1 * self.model["extra"](batch).square().mean()
        if self.calls == self.stop_at and current_world().rank == current_world().size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss, values


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--units", action="store_true", help="shard even small blocks on their own")
    parser.add_argument("--stop-at", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    if arguments.units:
        trainer.shard = functools.partial(shard, min_unit_parameters=1)  # type: ignore[assignment]
    world = join_world()
    stage = Uneven(micro_batches=4, dropout=0.0, steps=8)
    stage.stop_at = arguments.stop_at * 4 // world.size
    outcome = train(stage, arguments.run_dir, resume=arguments.resume, pace=Pace(log_every=1))
    print(f"rank {world.rank} of {world.size}: step {outcome.step}, error {outcome.metrics.get('error')}")
    leave_world()


if __name__ == "__main__":
    main()
