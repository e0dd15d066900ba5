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
    gcmf, concat   the student's start with fresh projectors, with and without gated fusion: equal short runs, for the
              comparison in the model card

Export follows when `qat` is done (export.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from autoglm.train.checkpoint import load_stage_weights
from autoglm.train.dataset import Batch, BatchKind, BatchMaker, Sizes, stream
from autoglm.train.evaluate import evaluate
from autoglm.train.folding import folded
from autoglm.train.inference import LoadedPhone, replier
from autoglm.train.losses import (
    CharacterLesson,
    Coordinates,
    NameLesson,
    Names,
    PatchLesson,
    PlaceLesson,
    character_loss,
    feature_loss,
    follow_loss,
    name_loss,
    naming_loss,
    patch_loss,
    placing_loss,
    pointing_loss,
    showing,
    smooth_numbers,
    trust_loss,
    word_logits,
    word_loss,
    writing_loss,
)
from autoglm.train.model import AutoGLMPhone, PhoneConfig, preset
from autoglm.train.model.phone import Embedded
from autoglm.train.pruning import least_useful_ffn, without_ffn
from autoglm.train.quantization import attach_qat
from autoglm.train.tokenizer import load_tokenizer
from autoglm.train.trainer import Stage
from autoglm.train.world.tasks import Task

SMOKE = "smoke"
TRAINABLE = ("nano",)
JOINT_KINDS: tuple[BatchKind, ...] = ("typed", "spoken", "heard", "words")
# How much each micro-batch kind counts, and the encoders' own lessons beside the words.
KIND_WEIGHT: dict[str, float] = {"typed": 1.5, "spoken": 1.2, "heard": 0.8, "words": 0.5}
LESSON_WEIGHT, TRUST_WEIGHT, POINTING_WEIGHT, WRITING_WEIGHT = 0.3, 0.1, 0.3, 0.6
FOLLOW_WEIGHT, FEATURE_WEIGHT = 0.5, 1.0


@dataclass(frozen=True)
class Plan:
    """Optimizer steps of each stage, and how much a step and an evaluation hold."""

    steps: dict[str, int]
    sizes: Sizes
    counts: dict[Task, int]
    workers: int = 1


NANO_PLAN = Plan(
    steps={
        "reading": 3000, "eyes": 1500, "listening": 1500, "ears": 3000, "pictures": 600, "sounds": 900,
        "sight": 813, "teacher": 1000,
        "student": 300, "distilled": 300, "pruned": 100,
        "qat": 200, "gcmf": 200, "concat": 200,
    },
    sizes=Sizes(),
    counts={"typed_action": 60, "spoken_action": 60, "is_here": 30, "transcribe": 30, "identity": 20},
)  # fmt: skip
SMOKE_PLAN = Plan(
    steps=dict.fromkeys(NANO_PLAN.steps, 3),
    sizes=Sizes(soups=1, screens=1, questions=2, spoken_screens=1, spoken_questions=1, sounds=2, words=2),
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


class _Stage(Stage):
    """What all stages share: their context, their numbers and their stream of batches."""

    kinds: tuple[BatchKind, ...] = ()

    def __init__(self, context: RunContext, config: PhoneConfig) -> None:
        self.context, self.model_config = context, config
        self.preset = context.preset
        self.steps = context.plan.steps[self.name]
        self.warmup = min(100, self.steps // 5 + 1)
        self.config = config.to_dict()
        torch.manual_seed(sum(self.name.encode()))

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


# --- the encoders alone -------------------------------------------------------------------------------------


class _Eyes(nn.Module):
    """The vision encoder with its lesson."""

    def __init__(self, config: PhoneConfig) -> None:
        super().__init__()
        self.vision = AutoGLMPhone(config).vision
        self.lesson = PatchLesson(config)


class ReadingStage(_Stage):
    """The stem alone: a patch at a time, nothing looks further than it."""

    name = "reading"
    kinds = ("soup",)
    learning_rate = 4e-3
    weight_decay = 0.05

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, context.teacher)
        self.eyes = _Eyes(self.model_config).to(context.device)

    def modules(self) -> nn.Module:
        return self.eyes

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        batch = self.to_device(batch)
        return patch_loss(self.eyes.lesson, self.eyes.vision.embed_patches(batch.inputs.images), batch)


class EyesStage(_Stage):
    """The whole vision encoder, half on soups and half on screens."""

    name = "eyes"
    kinds = ("soup", "screens")
    learning_rate = 1.5e-3
    weight_decay = 0.05

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, context.teacher)
        self.eyes = _Eyes(self.model_config).to(context.device)
        self.eyes.load_state_dict(context.weights("reading"))

    def modules(self) -> nn.Module:
        return self.eyes

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        batch = self.to_device(batch)
        loss, facts = patch_loss(self.eyes.lesson, self.eyes.vision(batch.inputs.images), batch)
        return loss, {f"{batch.kind}_{name}": value for name, value in facts.items()}


class _Ears(nn.Module):
    """The audio encoder with its lessons."""

    def __init__(self, config: PhoneConfig) -> None:
        super().__init__()
        self.audio = AutoGLMPhone(config).audio
        self.lesson = CharacterLesson(config)
        self.names = NameLesson(config)


class ListeningStage(_Stage):
    """The stem alone: tells names apart, and spells names and commands."""

    name = "listening"
    kinds = ("names", "sounds")
    learning_rate = 2e-3
    weight_decay = 0.02

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, context.teacher)
        self.ears = _Ears(self.model_config).to(context.device)

    def modules(self) -> nn.Module:
        return self.ears

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        batch = self.to_device(batch)
        sound, mask = self.ears.audio.embed_frames(batch.inputs.mel, batch.inputs.frames)
        loss, facts = character_loss(self.ears.lesson, sound, mask, batch)
        if batch.names is not None:
            naming, told = name_loss(self.ears.names, sound, mask, batch)
            loss, facts = 0.3 * loss + naming, facts | told
        return loss, {f"{batch.kind}_{name}": value for name, value in facts.items()}


class EarsStage(_Stage):
    """The audio encoder spells commands."""

    name = "ears"
    kinds = ("sounds",)
    learning_rate = 1.5e-3
    weight_decay = 0.02

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, context.teacher)
        self.ears = _Ears(self.model_config).to(context.device)
        self.ears.load_state_dict(context.weights("listening"))

    def modules(self) -> nn.Module:
        return self.ears

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        batch = self.to_device(batch)
        sound, mask = self.ears.audio(batch.inputs.mel, batch.inputs.frames)
        return character_loss(self.ears.lesson, sound, mask, batch)


def _numbers(context: RunContext, config: PhoneConfig) -> Coordinates:
    return Coordinates(load_tokenizer().number_ids, config.text.vocab_size).to(context.device)


# --- the whole model ----------------------------------------------------------------------------------------


class Pupil(nn.Module):
    """A model with the lessons of its encoders."""

    def __init__(self, config: PhoneConfig) -> None:
        super().__init__()
        self.model = AutoGLMPhone(config)
        self.eyes = PatchLesson(config)
        self.ears = CharacterLesson(config)
        self.places = PlaceLesson(config)


class PicturesStage(_Stage):
    """Eyes and their projector: what a picture token shows is named in the decoder's words, its place in its numbers.

    The decoder itself takes no part but for its tables, which keep their random start: a step costs an eighth of a
    step through the decoder.
    """

    name = "pictures"
    kinds = ("screens",)
    learning_rate = 1e-3
    weight_decay = 0.02

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, context.teacher)
        self.pupil, eyes = Pupil(self.model_config), context.weights("eyes")
        smooth_numbers(self.pupil.model.text.lm_head, load_tokenizer().number_ids)
        self.pupil.model.vision.load_state_dict(_part(eyes, "vision."))
        self.pupil.eyes.load_state_dict(_part(eyes, "lesson."))
        self.pupil = self.pupil.to(context.device).requires_grad_(False)
        for part in (self.pupil.model.vision, self.pupil.model.vision_projector, self.pupil.eyes, self.pupil.places):
            part.requires_grad_(True)
        self.coordinates, self.names = _numbers(context, self.model_config), Names(load_tokenizer()).to(context.device)

    def modules(self) -> nn.Module:
        return self.pupil

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        batch = self.to_device(batch)
        model, images = self.pupil.model, batch.inputs.images
        patches = model.vision(images)
        size = self.model_config.vision.patch_size
        projected = model.vision_projector(patches, images.shape[2] // size, images.shape[3] // size)
        loss, facts = patch_loss(self.pupil.eyes, patches, batch)
        here = torch.arange(len(images), device=images.device)
        tokens, labels, places = showing(self.model_config, projected, here, batch)
        if not len(tokens):
            return loss, facts
        naming = naming_loss(tokens, labels, self.names(model.text.embed_tokens))
        placing = placing_loss(model, self.pupil.places, tokens, places, self.coordinates)
        facts |= {"naming": float(naming.detach()), "placing": float(placing.detach())}
        return loss + naming + placing, facts


class SoundsStage(_Stage):
    """Ears and their projector: sound tokens become like the tokens of the words said."""

    name = "sounds"
    kinds = ("sounds",)
    learning_rate = 1e-3
    weight_decay = 0.02

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, context.teacher)
        self.pupil, ears = Pupil(self.model_config), context.weights("ears")
        self.pupil.load_state_dict(context.weights("pictures"))
        self.pupil.model.audio.load_state_dict(_part(ears, "audio."))
        self.pupil.ears.load_state_dict(_part(ears, "lesson."))
        self.pupil = self.pupil.to(context.device).requires_grad_(False)
        for part in (self.pupil.model.audio, self.pupil.model.audio_projector, self.pupil.ears):
            part.requires_grad_(True)
        self.silence = load_tokenizer().id("<|audio|>")

    def sizes(self) -> Sizes:
        return replace(super().sizes(), sounds=12)

    def modules(self) -> nn.Module:
        return self.pupil

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        batch = self.to_device(batch)
        model = self.pupil.model
        sound, mask = model.audio(batch.inputs.mel, batch.inputs.frames)
        loss, facts = character_loss(self.pupil.ears, sound, mask, batch)
        writing = writing_loss(
            model.audio_projector(sound), mask.sum(1), batch.said, batch.said_counts, model.text.embed_tokens.weight,
            self.silence,
        )  # fmt: skip
        return loss + torch.log1p(writing), facts | {"writing": float(writing.detach())}


class JointStage(_Stage):
    """All tasks at once; with a teacher also its logits and features."""

    kinds = JOINT_KINDS
    learning_rate = 1e-3
    weight_decay = 0.02
    teacher: AutoGLMPhone | None = None

    def __init__(self, context: RunContext, pupil: Pupil) -> None:
        super().__init__(context, pupil.model.config)
        self.pupil = pupil.to(context.device)
        self.coordinates = _numbers(context, self.model_config)
        self.names = Names(load_tokenizer()).to(context.device)
        self.silence = load_tokenizer().id("<|audio|>")

    def modules(self) -> nn.Module:
        return self.pupil

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        batch = self.to_device(batch)
        model = self.pupil.model
        embedded = model.embed(batch.inputs)
        layer_inputs = [embedded.embeddings]
        hidden = model.hidden(batch.inputs, embedded, layer_inputs)
        logits, targets, is_coordinate = word_logits(model, hidden, batch)
        loss, facts = word_loss(logits, targets, is_coordinate, self.coordinates)
        pointing = pointing_loss(model, batch.inputs, layer_inputs, batch)
        if pointing is not None:
            loss = loss + POINTING_WEIGHT * pointing
            facts["pointing"] = float(pointing.detach())
        if embedded.patches is not None:
            tokens, labels, places = showing(self.model_config, *_picture_tokens(embedded, batch), batch)
            if len(tokens):
                naming = naming_loss(tokens, labels, self.names(model.text.embed_tokens))
                placing = placing_loss(model, self.pupil.places, tokens, places, self.coordinates)
                loss = loss + LESSON_WEIGHT * (naming + placing)
                facts |= {"naming": float(naming.detach()), "placing": float(placing.detach())}
            lesson, told = patch_loss(self.pupil.eyes, embedded.patches, batch)
            loss = loss + LESSON_WEIGHT * lesson
            facts["patch_acc"] = told["patch_acc"]
        if embedded.sound is not None and embedded.sound_mask is not None:
            lesson, told = character_loss(self.pupil.ears, embedded.sound, embedded.sound_mask, batch)
            loss = loss + LESSON_WEIGHT * lesson
            facts["heard"] = told["heard"]
            assert batch.said is not None and batch.said_counts is not None and batch.inputs.sound_of is not None
            tokens, of = _sound_tokens(embedded, batch)
            writing = writing_loss(
                tokens, embedded.sound_mask.sum(1)[of], batch.said[of], batch.said_counts[of],
                model.text.embed_tokens.weight, self.silence,
            )  # fmt: skip
            # Its logarithm: a hundred nats at first would drown everything else.
            loss = loss + WRITING_WEIGHT * torch.log1p(writing)
            facts["writing"] = float(writing.detach())
            if embedded.fused is not None:
                loss = loss + TRUST_WEIGHT * trust_loss(embedded, batch)
        if self.teacher is not None:
            loss = loss + self._following(batch, embedded, hidden, logits)
        named = {f"{batch.kind}_{name}": value for name, value in facts.items()}
        return loss * KIND_WEIGHT[batch.kind], named | {"samples": float(len(batch.inputs.tokens))}

    def _following(self, batch: Batch, embedded: Any, hidden: Tensor, logits: Tensor) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad():
            seen = self.teacher.embed(batch.inputs)
            taught = self.teacher.hidden(batch.inputs, seen)
            wanted, _, _ = word_logits(self.teacher, taught, batch)
        loss = FOLLOW_WEIGHT * follow_loss(logits, wanted)
        loss = loss + FEATURE_WEIGHT * feature_loss(hidden, taught, batch.inputs.valid)
        if embedded.patches is not None and seen.patches is not None:
            loss = loss + FEATURE_WEIGHT * feature_loss(embedded.patches, seen.patches)
        if embedded.sound is not None and seen.sound is not None:
            loss = loss + FEATURE_WEIGHT * feature_loss(embedded.sound, seen.sound, embedded.sound_mask)
        return loss

    def evaluate(self) -> dict[str, float]:
        """Shares right on a small part of the held-out set; `autoglm eval` asks all of it."""
        generate = replier(LoadedPhone(self.pupil.model, load_tokenizer()))
        counts = self.context.plan.counts
        if not {"spoken", "heard"} & set(self.kinds):
            counts = {task: count for task, count in counts.items() if task not in ("spoken_action", "transcribe")}
        rates = evaluate(generate, counts=counts)
        return {name: round(rate.share, 4) for name, rate in rates.items()}


def _picture_tokens(embedded: Embedded, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the decoder gets of the pictures: tokens [rows with a picture, t, D], and which picture each row's is."""
    assert batch.inputs.image_of is not None
    has = batch.inputs.image_of >= 0
    tokens = embedded.embeddings[has][batch.inputs.media[has] == 1]
    return tokens.view(int(has.sum()), -1, tokens.shape[-1]), batch.inputs.image_of[has]


def _sound_tokens(embedded: Embedded, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the decoder gets of the sounds: tokens [rows with a sound, t, D] padded, and which sound each row's is."""
    assert batch.inputs.sound_of is not None
    rows = batch.inputs.sound_of >= 0
    is_sound = batch.inputs.media[rows] == 2
    return pad_sequence([e[s] for e, s in zip(embedded.embeddings[rows], is_sound, strict=True)], batch_first=True), (
        batch.inputs.sound_of[rows]
    )


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


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


class TeacherStage(JointStage):
    """The larger model on all tasks, its ears joined to its words before."""

    name = "teacher"

    def __init__(self, context: RunContext) -> None:
        pupil, sounds = Pupil(context.teacher), context.weights("sounds")
        pupil.load_state_dict(context.weights("sight"))
        for part in ("audio", "audio_projector"):
            getattr(pupil.model, part).load_state_dict(_part(sounds, f"model.{part}."))
        pupil.ears.load_state_dict(_part(sounds, "ears."))
        super().__init__(context, pupil)
        self.evaluate_every = max(1, self.steps // 2)

    def sizes(self) -> Sizes:
        """Still somewhat more to find than a user would ask for."""
        return replace(super().sizes(), spare_questions=3)


def _small_of_teacher(context: RunContext, config: PhoneConfig, *, is_joined: bool = True) -> Pupil:
    """`config`'s model of the teacher's parts with every so many layers left out.

    is_joined: what joins the encoders to the decoder, projectors and fusion, is the teacher's too; else it is fresh.
    """
    pupil, state = Pupil(config), context.weights("teacher")
    assert config.audio is not None
    for part, layers in (
        ("text", config.text.num_layers),
        ("vision", config.vision.num_layers),
        ("audio", config.audio.num_layers),
    ):
        pick_layers(pupil.model, part, _part(state, f"model.{part}."), layers)
    if is_joined:
        for part in ("vision_projector", "audio_projector", "fusion"):
            getattr(pupil.model, part).load_state_dict(_part(state, f"model.{part}."))
    for lesson in ("eyes", "ears", "places"):
        getattr(pupil, lesson).load_state_dict(_part(state, f"{lesson}."))
    return pupil


def _teacher(context: RunContext) -> AutoGLMPhone:
    """The finished teacher, frozen."""
    model = AutoGLMPhone(context.teacher)
    model.load_state_dict(_part(context.weights("teacher"), "model."))
    return model.to(context.device).eval().requires_grad_(False)


class StudentStage(JointStage):
    """The control: the student's start, learning from labels alone."""

    name = "student"
    learning_rate = 6e-4

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, _small_of_teacher(context, context.student))


class DistilledStage(JointStage):
    """The student's start, learning from labels and teacher."""

    name = "distilled"
    learning_rate = 6e-4

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, _small_of_teacher(context, context.student))
        self.teacher = _teacher(context)


class PrunedStage(JointStage):
    """One feed-forward part less, healed."""

    name = "pruned"
    learning_rate = 4e-4

    def __init__(self, context: RunContext) -> None:
        whole = Pupil(context.student)
        whole.load_state_dict(context.weights("distilled"))
        maker = BatchMaker(context.student, load_tokenizer(), JOINT_KINDS, sizes=context.plan.sizes, seed=1)
        layer = least_useful_ffn(whole.to(context.device).model, [b for i in range(4) for b in maker[i]])
        pupil = Pupil(context.student.with_text(pruned_ffn=(layer,)))
        pupil.load_state_dict(without_ffn(whole.state_dict(), (layer,)))
        super().__init__(context, pupil)
        self.teacher = _teacher(context)


class QatStage(JointStage):
    """Norms merged, then training on the grids of the files."""

    name = "qat"
    learning_rate = 1.5e-4

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


class GcmfStage(JointStage):
    """The student's start with fresh projectors and fusion, for a short run."""

    name = "gcmf"

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, _small_of_teacher(context, context.student, is_joined=False))


class ConcatStage(JointStage):
    """The same run without fusion; its projectors are wider, so that the models weigh the same."""

    name = "concat"

    def __init__(self, context: RunContext) -> None:
        config = concatenating(context.student)
        super().__init__(context, _small_of_teacher(context, config, is_joined=False))


def concatenating(config: PhoneConfig) -> PhoneConfig:
    """`config` without fusion, its projectors widened to the same number of parameters (within a part in a hundred)."""
    assert config.audio is not None
    width = config.text.hidden_size
    spared = 2 * (6 * width * width + 5 * width) + 7 * width
    per_channel = config.vision.hidden_size * config.vision.merge_size**2 + config.audio.hidden_size + 2 * width + 2
    wider = config.fusion.projector_size + round(spared / per_channel / 32) * 32
    return replace(config, fusion=replace(config.fusion, mode="concat", projector_size=wider))


_CLASSES: Sequence[type[_Stage]] = (
    ReadingStage, EyesStage, ListeningStage, EarsStage, PicturesStage, SoundsStage, SightStage, TeacherStage,
    StudentStage, DistilledStage, PrunedStage, QatStage, GcmfStage, ConcatStage,
)  # fmt: skip
STAGES: dict[str, Callable[[RunContext], Stage]] = {stage.name: stage for stage in _CLASSES}
