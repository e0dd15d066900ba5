"""A trained model out of any file it may lie in, and its replies to examples: what `autoglm eval` asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoglm.errors import ConfigError, FormatError
from autoglm.train.checkpoint import load_weights
from autoglm.train.checkpoint_gguf import load_pair
from autoglm.train.dataset import BatchMaker
from autoglm.train.model import AutoGLMPhone, PhoneConfig
from autoglm.train.quantization import GRID_PREFIX, attach_qat
from autoglm.train.tokenizer import NanoTokenizer, load_tokenizer
from autoglm.train.world.split import Split, rng_for
from autoglm.train.world.tasks import Example

# The longest right reply (a description with its thought) has about 50 tokens.
MAX_REPLY_TOKENS = 96
# Every model has this one; what stands before it in a stage's file stands before all the model's names.
_ANCHOR = "text.embed_tokens.weight"


@dataclass(frozen=True)
class LoadedPhone:
    """A model in eval mode on its device, with the tokenizer it was trained with."""

    model: AutoGLMPhone
    tokenizer: NanoTokenizer


def load_phone(path: Path, *, mmproj: Path | None = None, device: torch.device | None = None) -> LoadedPhone:
    """A model from a text GGUF (and its mmproj), a checkpoint or weights file, or a stage's folder.

    mmproj  None: the one mmproj-*.gguf beside the text file
    Raises ConfigError (not there, no mmproj, a stage that keeps no model) and FormatError (damaged).
    """
    if not path.exists():
        raise ConfigError(f"'{path}' is not there; name a text GGUF, a checkpoint, or the folder of a stage")
    if path.suffix == ".gguf":
        model, tokenizer = load_pair(path, mmproj or _mmproj_beside(path))
    else:
        model, tokenizer = _from_checkpoint(path), load_tokenizer()
    return LoadedPhone(model.to(device or torch.device("cpu")).eval(), tokenizer)


def replier(
    phone: LoadedPhone, *, split: Split = "test", seed: int = 0, batch_size: int = 20, snr: float | None = None
) -> Callable[[list[Example]], list[str]]:
    """A function from examples to the model's greedy replies, in order: evaluate's `generate`.

    Sounds are spoken by voices of `split`; which voice and which noise depends on seed and on how often the function
    was called, so two models asked the same examples in the same order hear the same.
    snr  the signal-to-noise ratio of every sound, in dB; None draws it
    """
    model, tokenizer = phone.model, phone.tokenizer
    maker = BatchMaker(model.config, tokenizer, (), split=split, snr=snr)
    device = next(model.parameters()).device
    stop = frozenset({tokenizer.id("<|endoftext|>")})
    num_calls = 0

    def generate(examples: list[Example]) -> list[str]:
        nonlocal num_calls
        replies = [""] * len(examples)
        for group, rng in heard_groups(examples, num_calls, split=split, seed=seed, batch_size=batch_size):
            batch = maker.batch("typed", [examples[index] for index in group], rng, with_answer=False)
            written = model.generate(batch.inputs.to(device), MAX_REPLY_TOKENS, stop)
            for index, ids in zip(group, written, strict=True):
                replies[index] = tokenizer.decode(ids)
        num_calls += 1
        return replies

    return generate


def heard_groups(
    examples: Sequence[Example], call: int, *, split: Split = "test", seed: int = 0, batch_size: int = 20
) -> Iterator[tuple[list[int], np.random.Generator]]:
    """Indices of examples that fit one batch (pictures of one size, or none), each with what draws its sounds.

    call  how often examples were asked before; whoever asks the same ones in the same order hears the same
    """
    by_size: dict[tuple[int, int] | None, list[int]] = {}
    for index, example in enumerate(examples):
        by_size.setdefault(None if example.screen is None else example.screen.image.size, []).append(index)
    groups = [group[at : at + batch_size] for group in by_size.values() for at in range(0, len(group), batch_size)]
    for number, group in enumerate(groups):
        yield group, rng_for(split, "replies", seed, call, number)


def _mmproj_beside(path: Path) -> Path:
    found = sorted(path.parent.glob("mmproj-*.gguf"))
    if len(found) != 1:
        raise ConfigError(f"{len(found)} files mmproj-*.gguf lie beside '{path}'; name the right one with --mmproj")
    return found[0]


def _from_checkpoint(path: Path) -> AutoGLMPhone:
    tensors, facts = load_weights(path)
    anchors = [name for name in tensors if name == _ANCHOR or name.endswith("." + _ANCHOR)]
    if not facts.config or len(anchors) != 1:
        raise ConfigError(f"'{path}' is of stage '{facts.stage}', which keeps no whole model to ask")
    model = AutoGLMPhone(PhoneConfig.from_dict(dict(facts.config)))
    prefix = anchors[0].removesuffix(_ANCHOR)
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if any(GRID_PREFIX in name.rpartition(".")[2] for name in state):
        attach_qat(model, "fast")  # only for the buffers' shapes; the file's grids follow
    wanted = model.state_dict()
    if prefix == "":  # training's own heads may lie beside the model's parts
        state = {name: tensor for name, tensor in state.items() if name in wanted}
    _load_strictly(model, wanted, state, path)
    return model


def _load_strictly(model: AutoGLMPhone, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    wrong = [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]
    wrong += [name for name in state if name not in wanted]
    if wrong:
        raise FormatError(
            f"'{path}' does not fit the model its header describes: {', '.join(wrong[:3])}"
            f"{' and more' if len(wrong) > 3 else ''}. Mend: it was written by another version; train the stage again"
        )
    model.load_state_dict(dict(state))
