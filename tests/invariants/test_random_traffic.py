"""Random traffic: every answer equals the one its sequence gives alone, and no block is ever lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoglm.engine.engine import Engine
from autoglm.engine.sequence import Sequence, ThinkingControl
from tests.engine.fake_runner import FakeRunner, default_pieces
from tests.engine.harness import Answer, assert_idle, draft_always, make_engine, make_sequence, serve, step

PIECES = default_pieces(64)
OPEN, CLOSE = PIECES.index(b"<think>"), PIECES.index(b"</think>")


@dataclass
class Request:
    """A sequence that can be made again for its solo run."""

    name: str
    prompt: list[int]
    options: dict[str, Any]

    def sequence(self) -> Sequence:
        return make_sequence(self.name, self.prompt, **self.options)


def draw_request(rng: np.random.Generator, name: str) -> Request:
    """Prompts share long heads; all kinds of sampling, endings and thoughts."""
    head = [[], list(range(1, 40)), [7] * 33, list(range(1, 20)) + [50] * 20][rng.integers(4)]
    prompt = [*head, *rng.integers(1, 64, rng.integers(1, 30)).tolist()]
    options: dict[str, Any] = {
        "max_tokens": int(rng.integers(1, 50)),
        "temperature": float(rng.choice([0.0, 0.0, 0.8, 1.5])),
        "seed": int(rng.integers(1 << 60)),
        "top_p": float(rng.choice([1.0, 0.8])),
        "top_k": int(rng.choice([0, 10])),
        "frequency_penalty": float(rng.choice([0.0, 0.2])),
        "repetition_penalty": float(rng.choice([1.0, 1.2])),
        "ignore_eos": bool(rng.integers(2)),
        "stop": [(), ("ab",), ("x", "qq", "<1")][rng.integers(3)],
        "logprobs": [None, 2][rng.integers(2)],
        "logit_bias": [{}, {5: 9.0, 6: 9.0, 7: 9.0}][rng.integers(2)],  # of few tokens many were seen before
        "cache_salt": [b"", b"s"][rng.integers(2)],
    }
    if rng.integers(3) == 0:
        budget = [None, 0, 3, 10][rng.integers(4)]
        options["thinking"] = ThinkingControl(budget, (OPEN,), (CLOSE,), bool(rng.integers(2)))
    return Request(name, prompt, options)


def check_books(engine: Engine) -> None:
    manager = engine.block_manager
    held = Counter(b for s in engine.scheduler.running for b in s.block_table.tolist())
    assert all(s.num_blocks == 0 for s in engine.scheduler.waiting)
    assert all(manager.num_references(b) == held[b] for b in range(manager.num_blocks))
    assert manager.num_used_blocks == len(held)
    orders = [s.order for s in engine.scheduler.running]
    assert orders == sorted(orders)
    assert [s.order for s in engine.scheduler.waiting] == sorted(s.order for s in engine.scheduler.waiting)


def assert_same(answer: Answer, solo: Answer) -> None:
    assert answer.token_ids == solo.token_ids
    assert answer.text == solo.text
    assert answer.logprobs == solo.logprobs
    assert answer.last is not None and solo.last is not None
    assert answer.last.finish_reason == solo.last.finish_reason
    assert answer.last.stop_reason == solo.last.stop_reason
    assert answer.last.num_reasoning_tokens == solo.last.num_reasoning_tokens


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 1 << 30),
    num_blocks=st.sampled_from([8, 10, 14, 40]),
    budget=st.sampled_from([3, 16, 33, 512]),
    max_num_seqs=st.sampled_from([1, 3, 8]),
    caching=st.booleans(),
    drafts=st.booleans(),
    cancels=st.booleans(),
    faults=st.booleans(),
)
def test_every_answer_equals_its_solo_run(
    seed: int, num_blocks: int, budget: int, max_num_seqs: int, caching: bool, drafts: bool, cancels: bool, faults: bool
) -> None:
    rng = np.random.default_rng(seed)
    runner = FakeRunner(num_blocks=num_blocks)
    engine = make_engine(
        runner,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=caching,
        draft_max=5 if drafts else 0,
    )
    if drafts:
        draft_always(engine)
    requests = {str(i): draw_request(rng, str(i)) for i in range(14)}
    to_come, answers, gone = list(requests.values()), {}, set()
    for _ in range(5000):
        while to_come and rng.random() < 0.3:
            engine.add(to_come.pop(0).sequence())
        if cancels and rng.random() < 0.03:
            name = str(rng.integers(14))
            if engine.cancel(name):
                gone.add(name)
        if faults and rng.random() < 0.01:
            runner.fail_next = RuntimeError("fault")
        step(engine, answers)
        check_books(engine)
        for name in [name for name, answer in answers.items() if answer.finish_reason and name + "'" not in requests]:
            turn = [*requests[name].prompt, *answers[name].token_ids, *rng.integers(1, 64, 3).tolist()]
            if len(name) < 3 and len(turn) < num_blocks * 16:  # the next turn of a chat
                requests[name + "'"] = Request(name + "'", turn, requests[name].options)
                to_come.append(requests[name + "'"])
        if not to_come and not engine.has_work():
            break
    assert_idle(engine)
    # A solo run in the same room, so that max_tokens is clipped alike; everything else is out of the way.
    for name, request in requests.items():
        if name in gone:
            continue
        if answers[name].finish_reason == "error":
            assert faults
            continue
        solo_engine = make_engine(FakeRunner(num_blocks=num_blocks), enable_prefix_caching=False)
        assert_same(answers[name], serve(solo_engine, [request.sequence()])[name])


def test_streamed_equals_whole() -> None:
    """The pieces sent add up to the decoded tokens, up to the stop string."""
    rng = np.random.default_rng(8)
    engine = make_engine()
    requests = [draw_request(rng, str(i)) for i in range(30)]
    answers = serve(engine, [r.sequence() for r in requests])
    for request in requests:
        answer = answers[request.name]
        tokens = answer.token_ids
        if answer.last is not None and answer.last.finish_reason == "stop" and answer.last.stop_reason is None:
            tokens = tokens[:-1]
        whole = engine.tokenizer.decode(tokens)  # type: ignore[attr-defined]
        for stop in request.options["stop"]:
            assert stop not in answer.text
        if answer.last is not None and isinstance(answer.last.stop_reason, str):
            assert whole.startswith(answer.text + answer.last.stop_reason)
        else:
            assert answer.text == whole
