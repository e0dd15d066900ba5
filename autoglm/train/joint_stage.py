"""One step of the whole model: the words of all tasks, the encoders' lessons beside them, the teacher's example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from autoglm.train.dataset import Batch, BatchKind
from autoglm.train.evaluate import evaluate
from autoglm.train.inference import LoadedPhone, replier
from autoglm.train.losses import (
    Names,
    align,
    character_loss,
    copying_loss,
    feature_loss,
    follow_loss,
    patch_loss,
    pointing_loss,
    shown_loss,
    token_scores,
    trust_loss,
    word_logits,
    word_loss,
    writing_loss,
)
from autoglm.train.model import AutoGLMPhone
from autoglm.train.model.phone import Embedded
from autoglm.train.run_context import RunContext
from autoglm.train.tokenizer import load_tokenizer
from autoglm.train.world_stage import Pupil, WorldStage, number_targets

JOINT_KINDS: tuple[BatchKind, ...] = ("typed", "spoken", "heard", "words")
# How much each micro-batch kind counts, and the encoders' own lessons beside the words.
KIND_WEIGHT: dict[str, float] = {"typed": 1.5, "spoken": 1.2, "heard": 0.8, "words": 0.5}
LESSON_WEIGHT, TRUST_WEIGHT, POINTING_WEIGHT, COPYING_WEIGHT, WRITING_WEIGHT = 0.3, 0.5, 0.3, 0.3, 0.6
FOLLOW_WEIGHT, FEATURE_WEIGHT = 0.5, 1.0


class JointStage(WorldStage):
    """All tasks at once; with a teacher also its logits and features."""

    kinds = JOINT_KINDS
    learning_rate = 1e-3
    weight_decay = 0.02
    pupil: Pupil
    teacher: AutoGLMPhone | None = None

    def __init__(self, context: RunContext, pupil: Pupil) -> None:
        super().__init__(context, pupil.model.config)
        self.pupil = pupil.to(context.device)
        self.coordinates = number_targets(context, self.model_config)
        self.names = Names(load_tokenizer()).to(context.device)
        self.silence = load_tokenizer().id("<|audio|>")

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
            tokens, of = _picture_tokens(embedded, batch)
            shown, told = shown_loss(model, self.pupil.places, tokens, of, batch, self.names, self.coordinates)
            lesson, read = patch_loss(self.pupil.eyes, embedded.patches, batch)
            loss = loss + LESSON_WEIGHT * (shown + lesson)
            facts |= told | {"patch_acc": read["patch_acc"]}
        if embedded.sound is not None and embedded.sound_mask is not None:
            lesson, told = character_loss(self.pupil.ears, embedded.sound, embedded.sound_mask, batch)
            loss = loss + LESSON_WEIGHT * lesson
            facts["heard"] = told["heard"]
            assert batch.said is not None and batch.said_counts is not None and batch.inputs.sound_of is not None
            tokens, of = _sound_tokens(embedded, batch)
            scores = token_scores(tokens, model.text.embed_tokens.weight)
            heard = embedded.sound_mask.sum(1)[of], batch.said[of], batch.said_counts[of], self.silence
            writing = writing_loss(scores, *heard)
            # Its logarithm: a hundred nats at first would drown everything else.
            loss = loss + WRITING_WEIGHT * torch.log1p(writing)
            facts["writing"] = float(writing.detach())
            spoken, aligned = batch.inputs.media == 2, torch.zeros_like(batch.inputs.media)
            found = align(scores, *heard)
            aligned[spoken] = torch.cat([row[:count] for row, count in zip(found, heard[0], strict=True)])
            copying = copying_loss(model, batch.inputs, layer_inputs, batch, aligned)
            if copying is not None:
                loss = loss + COPYING_WEIGHT * copying
                facts["copying"] = float(copying.detach())
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
