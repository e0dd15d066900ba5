"""Everything a stage needs to go on bit for bit, in one safetensors file: weights, optimizer, EMA, RNG, position.

One file and one rename: either the old checkpoint is there or the new one, never half of one. The facts (stage,
preset, step, seconds) are JSON in the file's own metadata. Nothing is ever unpickled. Under FSDP2 the file holds whole
tensors, gathered one at a time, so that a run goes on with any number of processes.

    <run_dir>/<stage>/checkpoint.safetensors   model.* optimizer.*.{exp_avg,exp_avg_sq,step} ema.* rng.*
                      weights.safetensors      the finished stage's weights (the EMA's where there is one)
                      done.json                written last: this stage is finished
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoglm.errors import ConfigError, FormatError
from autoglm.train.distributed import like
from autoglm.whole_file import whole_file

CHECKPOINT_FILE = "checkpoint.safetensors"
WEIGHTS_FILE = "weights.safetensors"
DONE_FILE = "done.json"
_FACTS_KEY = "autoglm"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Facts:
    """What a checkpoint or weights file says about itself."""

    stage: str
    preset: str
    step: int
    seconds: float = 0.0  # trained so far, over all resumes
    config: dict[str, Any] = field(default_factory=dict)  # the stage's: what rebuilds the model around the weights
    version: int = _FORMAT_VERSION


@dataclass(frozen=True)
class Done:
    """What a finished stage leaves beside its weights."""

    stage: str
    preset: str
    step: int
    seconds: float
    metrics: dict[str, float]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Facts) -> None:
    """Write the file under a temporary name, push it to the disk, then rename it over the old one."""
    with whole_file(path) as temporary:
        save_file(_without_shared_memory(tensors), temporary, metadata={_FACTS_KEY: json.dumps(asdict(facts))})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Facts]:
    """Every tensor of a checkpoint or weights file, on the CPU, and its facts.

    Raises FormatError if the file is cut short, damaged, or was not written by this package.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = _parse_facts(path, (file.metadata() or {}).get(_FACTS_KEY))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise FormatError(f"'{path}' is not there") from None
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"'{path}' is damaged or cut short ({error}). Mend: {_mend(path)}; finished stages are not touched"
        ) from None


def check_facts(path: Path, facts: Facts, stage: str, preset: str) -> None:
    """Raises ConfigError if the file belongs to another stage or preset."""
    if (facts.stage, facts.preset) != (stage, preset):
        raise ConfigError(
            f"'{path}' is of stage '{facts.stage}', preset '{facts.preset}'; this run is stage '{stage}', preset "
            f"'{preset}'. Mend: give this run its own --run-dir"
        )


def copy_state(target: Mapping[str, Tensor], source: Mapping[str, Tensor], path: Path) -> None:
    """Copy source's values into target's tensors of the same names, in place; sharded targets take their shard.

    Raises ConfigError unless both hold the same names with the same shapes and dtypes: no tensor is ever skipped.
    """
    problems = [f"{name} is not in the file" for name in target if name not in source]
    problems += [f"{name} is not in the model" for name in source if name not in target]
    for name, tensor in target.items():
        other = source.get(name, tensor)
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            problems.append(f"{name} is {_kind(other)} in the file and {_kind(tensor)} in the model")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError(
            f"'{path}' was written by another version of this model: {'; '.join(problems[:3])}{more}. "
            "Mend: train this stage anew in another --run-dir"
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(like(tensor, source[name]))


def save_done(folder: Path, done: Done) -> None:
    """Mark a stage finished; its weights must have been written before."""
    with whole_file(folder / DONE_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(done), indent=2) + "\n", encoding="utf-8")


def read_done(folder: Path) -> Done | None:
    """The finished stage's marker, None while it is not finished. Raises FormatError for a damaged marker."""
    path = folder / DONE_FILE
    try:
        return Done(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(
            f"'{path}' is damaged ({type(error).__name__}). Mend: remove it, then --resume finishes the stage again"
        ) from None


def load_weights(path: Path) -> tuple[dict[str, Tensor], Facts]:
    """The weights alone out of a weights or checkpoint file, or out of a stage's folder (finished or not).

    Of a checkpoint the EMA's weights are taken where it has them. Raises FormatError, ConfigError.
    """
    if path.is_dir():
        found = [path / name for name in (WEIGHTS_FILE, CHECKPOINT_FILE) if (path / name).is_file()]
        if not found:
            raise ConfigError(f"'{path}' holds neither {WEIGHTS_FILE} nor {CHECKPOINT_FILE}; is it a stage's folder?")
        path = found[0]
    tensors, facts = read_tensors(path)
    if not any(name.startswith("rng.") for name in tensors):
        return tensors, facts
    weights = _with_prefix(tensors, "model.")
    weights.update(_with_prefix(tensors, "ema."))
    return weights, facts


def load_stage_weights(run_dir: Path, stage: str, preset: str) -> dict[str, Tensor]:
    """The weights of a finished stage of this run, for a stage that builds on it. Raises ConfigError, FormatError."""
    done = read_done(run_dir / stage)
    if done is None:
        raise ConfigError(
            f"stage '{stage}' is not finished in '{run_dir}', and this stage starts from its weights. "
            f"Mend: run stage '{stage}' first (--stage {stage}, with --resume if it was begun)"
        )
    path = run_dir / stage / WEIGHTS_FILE
    tensors, facts = read_tensors(path)
    check_facts(path, facts, stage, preset)
    return tensors


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _parse_facts(path: Path, text: str | None) -> Facts:
    try:
        facts: dict[str, Any] = json.loads(text or "")
        parsed = Facts(**facts)
    except (ValueError, TypeError):
        raise FormatError(f"'{path}' was not written by autoglm train: its metadata names no stage") from None
    if parsed.version != _FORMAT_VERSION:
        raise FormatError(
            f"'{path}' has checkpoint version {parsed.version}, this build reads {_FORMAT_VERSION}. "
            "Mend: use the build that wrote it"
        )
    return parsed


def _without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights are stored once per name: safetensors refuses two names for one memory."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return own


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _mend(path: Path) -> str:
    if path.name == CHECKPOINT_FILE:
        return "remove it to train this stage from its beginning"
    return f"remove {DONE_FILE} beside it, then --resume finishes the stage again"
