"""Measured speeds: the prompts' room, and what a decode step of n rows is taken to cost."""

from __future__ import annotations

import pytest

from autoglm.engine.step_speed import FORGET_AFTER, StepSpeed


def test_the_room_follows_the_speed_of_the_machine() -> None:
    """A tenth of a second's tokens, but a KV block however slow, and a step's at most; decode steps tell nothing."""
    for run_s, room in ((0.512, 50), (5.0, 16), (1e-4, 512)):
        speed = StepSpeed(512)
        speed.note(256, 1, run_s)
        speed.note(8, 8, 1.0)
        speed.note(8, 1, 1.0, num_drafted=7)
        speed.note(32, 4, 1.0, num_drafted=28)
        assert speed.prefill_room == room


def test_a_decode_step_never_run_costs_as_little_as_it_can() -> None:
    speed = StepSpeed(512)
    assert speed.decode_costs(1, 3) == []
    speed.note(300, 1, 9.0)
    assert speed.decode_costs(1, 3) == []
    speed.note(2, 2, 10.0)
    assert speed.decode_costs(1, 3) == [] and speed.decode_costs(2, 2) == [10, 10, 10]
    speed.note(5, 1, 24.0, num_drafted=4)
    assert speed.decode_costs(2, 4) == pytest.approx([10, 24 / 5 * 3, 24 / 5 * 4, 24, 24])
    speed.note(4, 1, 12.0, num_drafted=3)
    assert speed.decode_costs(2, 2) == [10, 10, 12]


def test_a_decode_cost_is_a_moving_mean_that_a_pause_hardly_moves() -> None:
    speed = StepSpeed(512)
    speed.note(1, 1, 1.0)
    speed.note(1, 1, 1000.0)
    assert speed.decode_s == 1000.0
    assert speed.decode_costs(1, 0) == pytest.approx([1.2])
    for _ in range(40):
        speed.note(1, 1, 3.0)
    assert speed.decode_costs(1, 0) == pytest.approx([3.0], rel=0.01)


def test_a_decode_cost_not_measured_lately_is_forgotten() -> None:
    """A step that took 3 s is tried again when FORGET_AFTER times that went by, and not sooner."""
    speed = StepSpeed(512)
    speed.note(8, 1, 3.0, num_drafted=7)
    for _ in range(3 * FORGET_AFTER):
        speed.note(1, 1, 1.0)
    assert speed.decode_costs(1, 7)[7] == pytest.approx(3.0)
    speed.note(1, 1, 1.0)
    assert speed.decode_costs(1, 7) == pytest.approx([1.0] * 8)
    for _ in range(FORGET_AFTER + 1):
        speed.note(4, 1, 1.0, num_drafted=3)
    assert speed.decode_costs(1, 3) == []
