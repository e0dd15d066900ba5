"""Run sequences through an engine to the end and gather what each was sent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from autoglm.config import EngineConfig
from autoglm.engine.engine import Engine
from autoglm.engine.sampling import SamplingParams, TokenLogprob
from autoglm.engine.sequence import Sequence, SequenceOutput
from tests.engine.fake_runner import FakeRunner, FakeTokenizer, default_pieces


@dataclass
class Answer:
    """All outputs of one sequence, joined."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: SequenceOutput | None = None

    @property
    def finish_reason(self) -> str | None:
        return None if self.last is None else self.last.finish_reason

    def take(self, output: SequenceOutput) -> None:
        assert self.finish_reason is None, "output after the end"
        self.token_ids += output.token_ids
        self.text += output.text
        self.pieces.append(output.text)
        if output.logprobs is not None:
            self.logprobs += output.logprobs
        assert output.finish_reason == "error" or output.num_output_tokens == len(self.token_ids)
        self.last = output


def make_engine(runner: Any = None, tokenizer: Any = None, **config: Any) -> Engine:
    """Without drafts unless told otherwise: how many there are depends on the machine, and tests count steps."""
    runner = runner or FakeRunner()
    settings = EngineConfig(**{"draft_max": 0, **config})
    return Engine(runner, tokenizer or FakeTokenizer(default_pieces(runner.vocab_size)), settings)


def draft_always(engine: Engine) -> Engine:
    """Let it believe that rows cost nothing, so that it drafts all it can."""
    assert engine.config.draft_max
    engine.speed.decode_costs = lambda num_rows, num_more: [1.0] * (num_more + 1)  # type: ignore[method-assign]
    return engine


def make_sequence(request_id: str, prompt: list[int], *, max_tokens: int = 12, **options: Any) -> Sequence:
    """Greedy and deaf to eos unless told otherwise."""
    own = {name: options.pop(name) for name in ("thinking", "constraint", "cache_salt") if name in options}
    params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **options}
    return Sequence(request_id, prompt, SamplingParams(**params), **own)


def step(engine: Engine, answers: dict[str, Answer]) -> None:
    """One step, its outputs added to the answers."""
    for output in engine.step():
        answers.setdefault(output.request_id, Answer()).take(output)


def drain(engine: Engine, answers: dict[str, Answer] | None = None, *, max_steps: int = 20_000) -> dict[str, Answer]:
    """Step until nothing is left."""
    answers = {} if answers is None else answers
    for _ in range(max_steps):
        if not engine.has_work():
            return answers
        step(engine, answers)
    raise AssertionError("the engine never came to an end")


def serve(engine: Engine, sequences: Iterable[Sequence]) -> dict[str, Answer]:
    """Add all, then drain."""
    for sequence in sequences:
        engine.add(sequence)
    return drain(engine)


def assert_idle(engine: Engine) -> None:
    """Nothing running, and every block back."""
    manager = engine.block_manager
    assert not engine.has_work() and engine._sequences == {}
    assert manager.num_used_blocks == 0 and manager.num_free_blocks == manager.num_blocks
    assert all(manager.num_references(b) == 0 for b in range(manager.num_blocks))
    known = sum(1 for h in manager._hashes if h is not None)
    assert manager.num_cached_blocks == known
