"""Drafts in the engine: equal answers in fewer steps whatever an answer is made of, and only where they pay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from autoglm.engine.block_manager import BlockManager
from autoglm.engine.drafting import Drafter
from autoglm.engine.engine import Engine
from autoglm.engine.scheduler import Scheduled
from autoglm.engine.sequence import Sequence, ThinkingControl
from autoglm.engine.step_speed import StepSpeed
from tests.engine.fake_runner import FakeRunner, default_pieces
from tests.engine.harness import Answer, assert_idle, draft_always, drain, make_engine, make_sequence, serve

PIECES = default_pieces(64)
OPEN, CLOSE = PIECES.index(b"<think>"), PIECES.index(b"</think>")
LETTERS = [PIECES.index(bytes([c])) for c in b"abcdef"]
TEXT = [LETTERS[i] for i in (0, 1, 2, 3, 4, 5, 3, 1, 0, 2)]
AROUND = [*TEXT, 40, *TEXT, 41]
PROMPT = [*AROUND, *TEXT[:3]]


class EchoRunner(FakeRunner):
    """Wants to write AROUND over and over, but at the last place of every `slip` it wants nothing."""

    def __init__(self, *, slip: int = 7, **options: int) -> None:
        super().__init__(**options)
        self.slip = slip

    def _logits(self, batch: Any, state: NDArray[np.uint64]) -> NDArray[np.float32]:
        logits = super()._logits(batch, state)
        for row, t in enumerate(batch.logits_rows):
            place = int(batch.positions[0, t]) + 1
            if place % self.slip != self.slip - 1:
                logits[row, AROUND[place % len(AROUND)]] += 20
        return logits


class Spell:
    """A grammar of one word over and over: two tokens of six are forced, at the others there is one more to choose."""

    def __init__(self, word: list[int], times: int) -> None:
        self.left = word * times

    def allowed(self) -> NDArray[np.uint32] | None:
        mask = np.zeros(2, np.uint32)
        for token_id in {self.left[0], LETTERS[0]} if len(self.left) % 6 else {self.left[0]}:
            mask[token_id // 32] |= np.uint32(1 << (token_id % 32))
        return mask

    def forced(self) -> list[int]:
        return self.left[:2] if len(self.left) % 6 == 0 else []

    def closing(self, token_ids: Any, room: int) -> list[int]:
        return []

    def accept(self, token_id: int) -> None:
        del self.left[0]

    def is_stopped(self) -> bool:
        return not self.left


def engines(runner: Any = EchoRunner, **config: Any) -> tuple[Engine, Engine]:
    """With all drafts there are, and without."""
    return draft_always(make_engine(runner(), draft_max=15, **config)), make_engine(runner(), **config)


def assert_same(answer: Answer, plain: Answer) -> None:
    assert (answer.token_ids, answer.text, answer.logprobs) == (plain.token_ids, plain.text, plain.logprobs)
    assert answer.last is not None and plain.last is not None
    for name in ("finish_reason", "stop_reason", "error", "num_output_tokens", "num_reasoning_tokens"):
        assert getattr(answer.last, name) == getattr(plain.last, name), name
    assert answer.last.timings["forced_tokens"] == plain.last.timings["forced_tokens"]


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "logprobs": {"temperature": 1.0, "seed": 4, "logprobs": 4},
    "penalties": {"frequency_penalty": 0.3, "presence_penalty": 0.2, "repetition_penalty": 1.1, "logprobs": 0},
    "bias": {"logit_bias": {LETTERS[2]: -100.0, LETTERS[4]: 6.0}, "logprobs": 0},
    "stop string": {"stop": ("fdb",)},
    "stop string over two words": {"stop": ("cab<40>a", "zz")},
    "stop token": {"stop_token_ids": frozenset({40})},
    "end": {"logit_bias": {0: 19.0}, "ignore_eos": False, "temperature": 1.0, "seed": 2},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
    "thought budget": {"thinking": ThinkingControl(9, (OPEN,), (CLOSE, 40), True)},
    "thought to the end": {"thinking": ThinkingControl(None, (OPEN,), (CLOSE,), True), "logit_bias": {CLOSE: 18.0}},
    "thought that must close": {
        "thinking": ThinkingControl(30, (OPEN,), (CLOSE,), True), "ignore_eos": False, "logit_bias": {0: 18.0}
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_the_same_with_drafts(case: str) -> None:
    options = {"max_tokens": 60, **CASES[case]}
    drafting, plain = engines()
    answers = [serve(engine, [make_sequence("r", PROMPT, **options)])["r"] for engine in (drafting, plain)]
    assert_same(*answers)
    assert_idle(drafting)
    stats = drafting.stats()
    last = answers[0].last
    assert last is not None
    assert last.timings["draft_n"] == stats.num_drafted_tokens_total
    assert last.timings["draft_n_accepted"] == stats.num_accepted_tokens_total
    if len(answers[0].token_ids) > 15:
        assert stats.num_accepted_tokens_total > 0
        assert stats.num_steps_total < plain.stats().num_steps_total


def test_every_accepted_token_saves_a_step() -> None:
    drafting, plain = engines()
    for engine in (drafting, plain):
        serve(engine, [make_sequence("r", PROMPT, max_tokens=60)])
    stats = drafting.stats()
    assert plain.stats().num_steps_total == 60 == stats.num_steps_total + stats.num_accepted_tokens_total
    assert 20 < stats.num_accepted_tokens_total < stats.num_drafted_tokens_total
    assert stats.num_prefill_tokens_total == len(PROMPT) and stats.num_generation_tokens_total == 60


def test_a_grammar_and_its_forced_tokens_are_the_same_with_drafts() -> None:
    answers, steps = [], []
    for engine in engines():
        constraint = Spell(TEXT[:6], 8)
        answers.append(serve(engine, [make_sequence("r", PROMPT, constraint=constraint, max_tokens=60)])["r"])
        steps.append(engine.stats().num_steps_total)
    assert_same(*answers)
    assert answers[0].last is not None and answers[0].last.timings["forced_tokens"] > 10
    assert steps[0] < steps[1]


def test_logits_that_are_not_finite_end_the_answer_where_they_do_without_drafts() -> None:
    answers = []
    for engine in engines():
        engine.runner.nan_for_token = LETTERS[5]  # type: ignore[attr-defined]
        answers.append(serve(engine, [make_sequence("r", PROMPT[:-1], max_tokens=60)])["r"])
        assert_idle(engine)
    assert_same(*answers)
    assert answers[0].finish_reason == "error" and len(answers[0].token_ids) > 2


def test_a_failed_step_leaves_no_draft_behind() -> None:
    """Its sequence ends; the next one, to the same prompt, finds nothing wrong in the cache."""
    drafting, plain = engines()
    drafting.add(make_sequence("broken", PROMPT, max_tokens=60))
    answers: dict[str, Answer] = {}
    for _ in range(5):
        for output in drafting.step():
            answers.setdefault(output.request_id, Answer()).take(output)
    drafting.runner.fail_next = RuntimeError("fault")  # type: ignore[attr-defined]
    drain(drafting, answers)
    assert answers["broken"].finish_reason == "error"
    sequence = make_sequence("r", [*PROMPT, *answers["broken"].token_ids, 5], max_tokens=30)
    again = make_sequence("r", sequence.token_ids, max_tokens=30)
    assert_same(serve(drafting, [sequence])["r"], serve(plain, [again])["r"])


def test_drafts_end_where_the_answer_must() -> None:
    """The answer fills the context to the last token, and no draft is run for what may not follow."""
    runner = EchoRunner(max_context=64)
    engine = draft_always(make_engine(runner, draft_max=15))
    answer = serve(engine, [make_sequence("r", PROMPT, max_tokens=500)])["r"]
    assert answer.finish_reason == "length" and len(answer.token_ids) == 64 - len(PROMPT)
    assert engine.stats().num_drafted_tokens_total > 0


@pytest.mark.parametrize(("num_blocks", "drafted"), [(4, [3, 3]), (6, [3, 3]), (7, [15, 3]), (8, [15, 15])])
def test_a_draft_takes_no_block_that_somebody_needs_next(num_blocks: int, drafted: list[int]) -> None:
    """Two sequences of 29 tokens and two blocks each: a third block for drafts leaves each of them one."""
    manager, speed = BlockManager(num_blocks, 16), StepSpeed(512)
    speed.note(2, 2, 1.0)
    drafter = Drafter(manager, speed, 15, 512)
    scheduled = []
    for name in "ab":
        sequence = make_sequence(name, (PROMPT * 2)[:29], max_tokens=40)
        manager.allocate(sequence)
        sequence.set_max_tokens(40)
        sequence.num_computed_tokens = 28
        sequence.lookup.acceptance = 0.99
        scheduled.append(Scheduled(sequence, 1))
    drafter.add_drafts(scheduled)
    assert [item.num_drafted for item in scheduled] == drafted
    assert [item.sequence.num_blocks for item in scheduled] == [2 + (count > 3) for count in drafted]


def costing(engine: Engine, *costs: float) -> Engine:
    """An engine that measured these costs of 1, 2, ... rows; all further ones cost as the last and as much again."""
    table = [*costs, *(costs[-1] * n for n in range(2, 99))]
    engine.speed.decode_costs = lambda rows, more: table[rows - 1 : rows + more]  # type: ignore[method-assign]
    return engine


def rows_run(*sequences: Sequence, costs: tuple[float, ...], acceptance: float = 0.5) -> list[int]:
    """Rows of each decode step."""
    runner = EchoRunner()
    engine = costing(make_engine(runner, draft_max=15), *costs)
    for sequence in sequences:
        sequence.lookup.acceptance = acceptance
        engine.add(sequence)
    drain(engine)
    return runner.batch_sizes[1:]


def test_as_many_drafts_are_run_as_pay() -> None:
    def sequence() -> Sequence:
        return make_sequence("r", PROMPT, max_tokens=40)

    assert set(rows_run(sequence(), costs=(1.0, 2.0, 3.0, 4.0))) == {1}  # as dear as a step each
    assert max(rows_run(sequence(), costs=(1.0, 1.01, 1.02, 5.0), acceptance=0.9)) == 3
    assert rows_run(sequence(), costs=(1.0, 1.7), acceptance=0.5)[0] == 1
    assert 2 in rows_run(sequence(), costs=(1.0, 1.7), acceptance=0.5)  # once it has seen that they come true
    assert rows_run(sequence(), costs=(1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0), acceptance=0.9)[0] == 8


def test_the_likeliest_drafts_of_all_sequences_are_run() -> None:
    """Rows are handed out over sequences; a step in which each row costs its price has none."""
    likely, unlikely = (make_sequence(name, PROMPT, max_tokens=40, cache_salt=name.encode()) for name in "ab")
    engine = costing(make_engine(EchoRunner(), draft_max=15), 1.0, 1.0, 1.0, 1.0, 9.0)
    for sequence in (unlikely, likely):
        engine.add(sequence)
    engine.step()
    likely.lookup.acceptance, unlikely.lookup.acceptance = 0.9, 0.2
    engine.step()
    assert (likely.num_drafted_tokens, unlikely.num_drafted_tokens) == (2, 0)
    sequences = [make_sequence(str(i), PROMPT, max_tokens=20, cache_salt=b"%d" % i) for i in range(3)]
    assert set(rows_run(*sequences, costs=(1.0, 2.0, 3.0, 4.0, 5.0))) == {3}


def test_no_drafts_before_the_plain_step_is_measured_or_beside_a_prompt() -> None:
    runner = EchoRunner()
    engine = make_engine(runner, draft_max=15)
    engine.add(make_sequence("r", PROMPT, max_tokens=40))
    engine.step()
    engine.step()
    assert runner.batch_sizes == [len(PROMPT), 1]
    draft_always(engine)
    engine.add(make_sequence("other", [60] * 30, max_tokens=1))
    engine.step()
    assert runner.batch_sizes[-1] == 31
    while engine.has_work():
        engine.step()
    assert max(runner.batch_sizes[3:]) > 1
