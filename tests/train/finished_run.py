"""A run folder whose stages are finished, of untrained models of the smoke preset: what reports are made from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from autoglm.train.checkpoint import WEIGHTS_FILE, Done, Facts, save_done, save_tensors
from autoglm.train.export import export_pair
from autoglm.train.folding import folded
from autoglm.train.model import AutoGLMPhone, PhoneConfig
from autoglm.train.quantization import attach_qat
from autoglm.train.report import EXPORT_FOLDER
from autoglm.train.run_context import RunContext
from autoglm.train.stages import concatenating
from autoglm.train.tokenizer import load_tokenizer
from tests.train.phones import make_phone

WHOLE = ("teacher", "student", "distilled", "pruned", "qat", "gcmf", "concat")
SECONDS = 90.0


def finish(context: RunContext, stages: Iterable[str] = WHOLE) -> RunContext:
    """Leave each stage's weights and marker, and the pair where `qat` is among them."""
    for number, name in enumerate(stages):
        model = _model(context, name)
        # As the stages keep them: the model beside the lessons of its encoders.
        tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
        tensors["eyes.x"] = torch.zeros(1)
        folder = context.run_dir / name
        facts = Facts(name, context.preset, 3 + number, SECONDS, model.config.to_dict())
        save_tensors(folder / WEIGHTS_FILE, tensors, facts)
        save_done(folder, Done(name, context.preset, 3 + number, SECONDS, {}))
        if name == "qat":
            (context.run_dir / EXPORT_FOLDER).mkdir()
            tokenizer = load_tokenizer().gguf_metadata()
            export_pair(model.state_dict(), model.config, tokenizer, context.run_dir / EXPORT_FOLDER)
    return context


def _model(context: RunContext, name: str) -> AutoGLMPhone:
    if name == "teacher":
        return make_phone(context.teacher)
    if name == "concat":
        return make_phone(concatenating(context.student))
    if name in ("pruned", "qat"):
        model = make_phone(_pruned(context.student))
        return _quantized(model) if name == "qat" else model
    return make_phone(context.student, seed=2)


def _pruned(config: PhoneConfig) -> PhoneConfig:
    return replace(config, text=replace(config.text, pruned_ffn=(1,)))


def _quantized(model: AutoGLMPhone) -> AutoGLMPhone:
    return attach_qat(folded(model))
