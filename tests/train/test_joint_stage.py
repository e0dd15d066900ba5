"""The joint step: every lesson is part of what is minimized, each with its weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from autoglm.train import joint_stage
from autoglm.train.dataset import Batch, BatchKind, BatchMaker
from autoglm.train.joint_stage import (
    COPYING_WEIGHT,
    KIND_WEIGHT,
    LESSON_WEIGHT,
    POINTING_WEIGHT,
    TRUST_WEIGHT,
    JointStage,
)
from autoglm.train.run_context import RunContext
from autoglm.train.tokenizer import load_tokenizer
from autoglm.train.world_stage import Pupil


class _Step(JointStage):
    name = "student"


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> _Step:
    torch.manual_seed(3)
    context = RunContext("smoke", tmp_path_factory.mktemp("run"), torch.device("cpu"))
    made = _Step(context, Pupil(context.student))
    made.pupil.eval()
    return made


@pytest.fixture
def batch(hum: None, step: _Step) -> Callable[[BatchKind], Batch]:
    def make(kind: BatchKind) -> Batch:
        maker = BatchMaker(step.model_config, load_tokenizer(), (kind,), sizes=step.context.plan.mixed)
        return next(batch for number in range(5) for batch in maker[number] if batch.kind == kind)

    return make


@pytest.mark.parametrize(
    ("lesson", "kind", "weight"),
    [
        ("word_loss", "words", 1.0),
        ("pointing_loss", "typed", POINTING_WEIGHT),
        ("shown_loss", "typed", LESSON_WEIGHT),
        ("patch_loss", "typed", LESSON_WEIGHT),
        ("character_loss", "heard", LESSON_WEIGHT),
        ("copying_loss", "heard", COPYING_WEIGHT),
        ("trust_loss", "spoken", TRUST_WEIGHT),
    ],
)
def test_a_lesson_that_costs_more_makes_the_step_cost_more(
    lesson: str,
    kind: BatchKind,
    weight: float,
    step: _Step,
    batch: Callable[[BatchKind], Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = batch(kind)
    with torch.no_grad():
        before, _ = step.loss(one)
        real = getattr(joint_stage, lesson)

        def dearer(*arguments: object) -> object:
            found = real(*arguments)
            assert found is not None
            return (found[0] + 1.0, *found[1:]) if isinstance(found, tuple) else found + 1.0

        monkeypatch.setattr(joint_stage, lesson, dearer)
        after, _ = step.loss(one)
    assert float(after - before) == pytest.approx(KIND_WEIGHT[kind] * weight, abs=2e-4)


def test_what_is_written_is_copied_from_the_sound_it_was_aligned_to(
    step: _Step, batch: Callable[[BatchKind], Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alignment reaches the lesson at the places of the sound tokens, and nowhere else."""
    one, seen = batch("heard"), []
    real = joint_stage.copying_loss

    def watched(*arguments: object) -> object:
        seen.append(arguments[-1])
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(joint_stage, "copying_loss", watched)
    with torch.no_grad():
        step.loss(one)
    (aligned,) = seen
    assert not aligned[one.inputs.media != 2].any()
    assert one.said_counts is not None and one.inputs.sound_of is not None
    for row, sound in enumerate(one.inputs.sound_of.tolist()):
        if sound >= 0:
            assert set(aligned[row].unique().tolist()) - {0} == set(range(1, int(one.said_counts[sound]) + 1))
