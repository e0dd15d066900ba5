"""Stages that train eyes and ears without the decoder: cheap steps, on lessons of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autoglm.train.dataset import Sizes
from autoglm.train.losses import (
    CharacterLesson,
    NameLesson,
    Names,
    PatchLesson,
    character_loss,
    name_loss,
    patch_loss,
    shown_loss,
    smooth_numbers,
    token_scores,
    writing_loss,
)
from autoglm.train.model import AutoGLMPhone, PhoneConfig
from autoglm.train.run_context import RunContext
from autoglm.train.tokenizer import load_tokenizer
from autoglm.train.world_stage import Pupil, WorldStage, number_targets, part_of, train_only


class _Eyes(nn.Module):
    """The vision encoder with its lesson."""

    def __init__(self, config: PhoneConfig) -> None:
        super().__init__()
        self.vision = AutoGLMPhone(config).vision
        self.lesson = PatchLesson(config)


class ReadingStage(WorldStage):
    """The stem alone: a patch at a time, nothing looks further than it."""

    name = "reading"
    kinds = ("soup",)
    learning_rate = 4e-3
    weight_decay = 0.05
    pupil: _Eyes

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, context.teacher)
        self.pupil = _Eyes(self.model_config).to(context.device)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        batch = self.to_device(batch)
        return patch_loss(self.pupil.lesson, self.pupil.vision.embed_patches(batch.inputs.images), batch)


class EyesStage(WorldStage):
    """The whole vision encoder, half on soups and half on screens."""

    name = "eyes"
    kinds = ("soup", "screens")
    learning_rate = 1.5e-3
    weight_decay = 0.05
    pupil: _Eyes

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, context.teacher)
        self.pupil = _Eyes(self.model_config).to(context.device)
        self.pupil.load_state_dict(context.weights("reading"))

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        batch = self.to_device(batch)
        loss, facts = patch_loss(self.pupil.lesson, self.pupil.vision(batch.inputs.images), batch)
        return loss, {f"{batch.kind}_{name}": value for name, value in facts.items()}


class _Ears(nn.Module):
    """The audio encoder with its lessons."""

    def __init__(self, config: PhoneConfig) -> None:
        super().__init__()
        self.audio = AutoGLMPhone(config).audio
        self.lesson = CharacterLesson(config)
        self.names = NameLesson(config)


class ListeningStage(WorldStage):
    """The stem alone: tells names apart, and spells names and commands."""

    name = "listening"
    kinds = ("names", "sounds")
    learning_rate = 2e-3
    weight_decay = 0.02
    pupil: _Ears

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, context.teacher)
        self.pupil = _Ears(self.model_config).to(context.device)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        batch = self.to_device(batch)
        sound, mask = self.pupil.audio.embed_frames(batch.inputs.mel, batch.inputs.frames)
        loss, facts = character_loss(self.pupil.lesson, sound, mask, batch)
        if batch.names is not None:
            naming, told = name_loss(self.pupil.names, sound, mask, batch)
            loss, facts = 0.3 * loss + naming, facts | told
        return loss, {f"{batch.kind}_{name}": value for name, value in facts.items()}


class EarsStage(WorldStage):
    """The audio encoder spells commands."""

    name = "ears"
    kinds = ("sounds",)
    learning_rate = 1.5e-3
    weight_decay = 0.02
    pupil: _Ears

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, context.teacher)
        self.pupil = _Ears(self.model_config).to(context.device)
        self.pupil.load_state_dict(context.weights("listening"))

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        batch = self.to_device(batch)
        sound, mask = self.pupil.audio(batch.inputs.mel, batch.inputs.frames)
        return character_loss(self.pupil.lesson, sound, mask, batch)


class PicturesStage(WorldStage):
    """Eyes and their projector: what a picture token shows is named in the decoder's words, its place in its numbers.

    The decoder itself takes no part but for its tables, which keep their random start: a step costs an eighth of a
    step through the decoder.
    """

    name = "pictures"
    kinds = ("screens",)
    learning_rate = 1e-3
    weight_decay = 0.02
    pupil: Pupil

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, context.teacher)
        self.pupil, eyes = Pupil(self.model_config), context.weights("eyes")
        smooth_numbers(self.pupil.model.text.lm_head, load_tokenizer().number_ids)
        self.pupil.model.vision.load_state_dict(part_of(eyes, "vision."))
        self.pupil.eyes.load_state_dict(part_of(eyes, "lesson."))
        model = self.pupil.to(context.device).model
        train_only(self.pupil, (model.vision, model.vision_projector, self.pupil.eyes, self.pupil.places))
        self.coordinates = number_targets(context, self.model_config)
        self.names = Names(load_tokenizer()).to(context.device)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        batch = self.to_device(batch)
        model = self.pupil.model
        patches, tokens = model.see(batch.inputs.images)
        loss, facts = patch_loss(self.pupil.eyes, patches, batch)
        every = torch.arange(len(tokens), device=tokens.device)
        shown, told = shown_loss(model, self.pupil.places, tokens, every, batch, self.names, self.coordinates)
        return loss + shown, facts | told


class SoundsStage(WorldStage):
    """Ears and their projector: sound tokens become like the tokens of the words said."""

    name = "sounds"
    kinds = ("sounds",)
    learning_rate = 1e-3
    weight_decay = 0.02
    pupil: Pupil

    def __init__(self, context: RunContext) -> None:
        super().__init__(context, context.teacher)
        self.pupil, ears = Pupil(self.model_config), context.weights("ears")
        self.pupil.load_state_dict(context.weights("pictures"))
        self.pupil.model.audio.load_state_dict(part_of(ears, "audio."))
        self.pupil.ears.load_state_dict(part_of(ears, "lesson."))
        model = self.pupil.to(context.device).model
        train_only(self.pupil, (model.audio, model.audio_projector, self.pupil.ears))
        self.silence = load_tokenizer().id("<|audio|>")

    def sizes(self) -> Sizes:
        """Few sounds and more steps: CTC over a vocabulary learns by the step, and stands still for long at first."""
        return replace(super().sizes(), sounds=12)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        batch = self.to_device(batch)
        model = self.pupil.model
        sound, mask = model.audio(batch.inputs.mel, batch.inputs.frames)
        loss, facts = character_loss(self.pupil.ears, sound, mask, batch)
        scores = token_scores(model.audio_projector(sound), model.text.embed_tokens.weight)
        writing = writing_loss(scores, mask.sum(1), batch.said, batch.said_counts, self.silence)
        return loss + torch.log1p(writing), facts | {"writing": float(writing.detach())}
