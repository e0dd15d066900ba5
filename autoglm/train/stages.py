"""The road from nothing to the exported model: what each stage trains, from what, and where it starts.

    reading   the eyes' stem learns to read, from soups of words
    eyes      the whole vision encoder learns to name and place things on soups and screens
    listening the ears' stem learns to tell names apart and to spell (CTC)
    ears      the whole audio encoder learns to spell commands
    pictures  the eyes' tokens come to lie near the decoder's words and numbers for what they show
    sounds    the ears' tokens come to lie near the decoder's words for what was said
    sight     the larger model on typed instructions: eyes and decoder
    teacher   the larger model, on all tasks
    student   every other size from the teacher's layers, learning from the labels alone: the control
    distilled the same start, learning from the labels and from the teacher's logits and features
    pruned    the feed-forward part that contributes least is taken out, and the rest healed
    qat       norms merged, then training on the exact GGUF grids
    gcmf, concat   the student's start with a fresh gated fusion, or with none and wider projectors: equal short runs,
              for the comparison in the model card

Export follows when `qat` is done (export.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from autoglm.train.dataset import BatchMaker, Sizes
from autoglm.train.encoder_stages import EarsStage, EyesStage, ListeningStage, PicturesStage, ReadingStage, SoundsStage
from autoglm.train.folding import folded
from autoglm.train.joint_stage import JOINT_KINDS, JointStage
from autoglm.train.model import AutoGLMPhone, PhoneConfig
from autoglm.train.pruning import least_useful_ffn, without_ffn
from autoglm.train.quantization import attach_qat
from autoglm.train.run_context import RunContext
from autoglm.train.tokenizer import load_tokenizer
from autoglm.train.trainer import Stage
from autoglm.train.world_stage import Pupil, WorldStage, part_of


def chosen_layers(have: int, want: int) -> list[int]:
    """`want` of `have` layers, spread evenly, first and last among them."""
    return [round(i * (have - 1) / max(1, want - 1)) for i in range(want)] if want > 1 else [have - 1]


def pick_layers(model: AutoGLMPhone, part: str, state: dict[str, Tensor], want: int) -> None:
    """Load a deeper part's weights into the model's shallower one, layers chosen by `chosen_layers`."""
    stack = "layers" if part == "text" else "blocks"
    have = 1 + max(int(name.split(".")[1]) for name in state if name.startswith(f"{stack}."))
    place = {layer: index for index, layer in enumerate(chosen_layers(have, want))}
    picked: dict[str, Tensor] = {}
    for name, value in state.items():
        head, _, rest = name.partition(".")
        if head != stack:
            picked[name] = value
        else:
            layer, _, tail = rest.partition(".")
            if int(layer) in place:
                picked[f"{stack}.{place[int(layer)]}.{tail}"] = value
    module: nn.Module = getattr(model, part)
    module.load_state_dict(picked)


class SightStage(JointStage):
    """The larger model on typed instructions, its eyes joined to its words before."""

    name = "sight"
    kinds = ("typed", "words")

    def __init__(self, context: RunContext) -> None:
        pupil = Pupil(context.teacher)
        pupil.load_state_dict(context.weights("pictures"))
        super().__init__(context, pupil)

    def sizes(self) -> Sizes:
        """Finding is the hard part: half of the instructions here touch something, a quarter elsewhere."""
        return replace(super().sizes(), spare_questions=5)


class AllTasksStage(JointStage):
    """Typed, spoken, heard and talked about, in the shares of the plan."""

    def sizes(self) -> Sizes:
        return self.context.plan.mixed


class TeacherStage(AllTasksStage):
    """The larger model on all tasks, its ears joined to its words before."""

    name = "teacher"
    learning_rate = 4e-4  # at 1e-3 what was joined comes apart: writing rose from 0.35 to 0.9 nats in 150 steps

    def __init__(self, context: RunContext) -> None:
        heard = ("model.audio.", "model.audio_projector.", "ears.")
        sounds = {name: value for name, value in context.weights("sounds").items() if name.startswith(heard)}
        pupil = Pupil(context.teacher)
        pupil.load_state_dict(context.weights("sight") | sounds)
        super().__init__(context, pupil)
        self.evaluate_every = max(1, self.steps // 2)


def widen_projector(projector: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the weights of one with fewer hidden units: the same function, the new units not read yet.

    Source: Net2Net, Chen et al. 2016 (arXiv:1511.05641), with zeros where it splits weights.
    """
    wider = projector.state_dict()
    wider["fc2.weight"] = torch.zeros_like(wider["fc2.weight"])
    for name, value in state.items():
        wider[name][tuple(slice(size) for size in value.shape)] = value
    projector.load_state_dict(wider)


def _small_of_teacher(context: RunContext, config: PhoneConfig, *, fuses_anew: bool = False) -> Pupil:
    """`config`'s model of the teacher's parts with every so many layers left out; fuses_anew: but for its fusion."""
    pupil, state = Pupil(config), context.weights("teacher")
    assert config.audio is not None
    for part, layers in (
        ("text", config.text.num_layers),
        ("vision", config.vision.num_layers),
        ("audio", config.audio.num_layers),
    ):
        pick_layers(pupil.model, part, part_of(state, f"model.{part}."), layers)
    for projector in ("vision_projector", "audio_projector"):
        widen_projector(getattr(pupil.model, projector), part_of(state, f"model.{projector}."))
    if not fuses_anew:
        pupil.model.fusion.load_state_dict(part_of(state, "model.fusion."))
    for lesson in ("eyes", "ears", "places"):
        getattr(pupil, lesson).load_state_dict(part_of(state, f"{lesson}."))
    return pupil


def _teacher(context: RunContext) -> AutoGLMPhone:
    """The finished teacher, frozen."""
    model = AutoGLMPhone(context.teacher)
    model.load_state_dict(part_of(context.weights("teacher"), "model."))
    return model.to(context.device).eval().requires_grad_(False)


class StudentStage(AllTasksStage):
    """The control: the student's start, learning from labels alone."""

    name = "student"
    learning_rate = 6e-4

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, _small_of_teacher(context, context.student))


class DistilledStage(AllTasksStage):
    """The student's start, learning from labels and teacher."""

    name = "distilled"
    learning_rate = 6e-4

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, _small_of_teacher(context, context.student))
        self.teacher = _teacher(context)


class PrunedStage(AllTasksStage):
    """One feed-forward part less, healed."""

    name = "pruned"
    learning_rate = 4e-4

    def __init__(self, context: RunContext) -> None:
        whole = Pupil(context.student)
        whole.load_state_dict(context.weights("distilled"))
        maker = BatchMaker(context.student, load_tokenizer(), JOINT_KINDS, sizes=context.plan.mixed, seed=1)
        layer = least_useful_ffn(whole.to(context.device).model, [b for i in range(4) for b in maker[i]])
        pupil = Pupil(context.student.with_text(pruned_ffn=(layer,)))
        pupil.load_state_dict(without_ffn(whole.state_dict(), (layer,)))
        super().__init__(context, pupil)
        self.teacher = _teacher(context)


class QatStage(AllTasksStage):
    """Norms merged, then training on the grids of the files."""

    name = "qat"
    learning_rate = 2e-4

    def __init__(self, context: RunContext) -> None:
        pupil = _pruned(context)
        pupil.model = folded(pupil.model)
        attach_qat(pupil.model)
        super().__init__(context, pupil)
        self.teacher = _teacher(context)


def _pruned(context: RunContext) -> Pupil:
    """The finished pruned model."""
    state = context.weights("pruned")
    layers = {int(name.split(".")[3]) for name in state if name.startswith("model.text.layers.") and ".mlp." in name}
    missing = tuple(layer for layer in range(context.student.text.num_layers) if layer not in layers)
    pupil = Pupil(context.student.with_text(pruned_ffn=missing))
    pupil.load_state_dict(state)
    return pupil


class GcmfStage(AllTasksStage):
    """The student's start with a fresh fusion, for a short run."""

    name = "gcmf"

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, _small_of_teacher(context, context.student, fuses_anew=True))


class ConcatStage(AllTasksStage):
    """The same run without fusion; its projectors are wider, so that the models weigh the same."""

    name = "concat"

    def __init__(self, context: RunContext) -> None:
        config = concatenating(context.student)
        super().__init__(context, _small_of_teacher(context, config, fuses_anew=True))


def concatenating(config: PhoneConfig) -> PhoneConfig:
    """`config` without fusion, its projectors widened to the same number of parameters (within a part in a hundred)."""
    assert config.audio is not None
    width = config.text.hidden_size
    spared = 2 * (6 * width * width + 5 * width) + 7 * width
    per_channel = config.vision.hidden_size * config.vision.merge_size**2 + config.audio.hidden_size + 2 * width + 2
    wider = config.fusion.projector_size + round(spared / per_channel / 32) * 32
    return replace(config, fusion=replace(config.fusion, mode="concat", projector_size=wider))


_CLASSES: Sequence[type[WorldStage]] = (
    ReadingStage, EyesStage, ListeningStage, EarsStage, PicturesStage, SoundsStage, SightStage, TeacherStage,
    StudentStage, DistilledStage, PrunedStage, QatStage, GcmfStage, ConcatStage,
)  # fmt: skip
STAGES: dict[str, Callable[[RunContext], Stage]] = {stage.name: stage for stage in _CLASSES}
