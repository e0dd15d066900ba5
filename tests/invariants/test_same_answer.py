"""Same request, same answer: whole, chunked, cached, preempted, batched, with other threads; tokens and logits."""

from __future__ import annotations

from typing import Any

import pytest

from autoglm.engine.sampling import SamplingParams
from autoglm.engine.sequence import Sequence, ThinkingControl
from tests.engine.harness import Answer, assert_idle, draft_always, drain, serve, step
from tests.invariants.conftest import Rig

PARAMS = [
    pytest.param({}, id="greedy"),
    pytest.param({"temperature": 0.9, "top_p": 0.95, "seed": 7, "frequency_penalty": 0.2}, id="seeded"),
]


def same(answer: Answer, expected: Answer) -> None:
    """Tokens, text, and log-probabilities to the last bit."""
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert answer.logprobs == expected.logprobs


def alone(rig: Rig, prompt: list[int], params: dict[str, Any], max_tokens: int = 24) -> Answer:
    """Cold, in one chunk, nobody else there."""
    engine = rig.engine(max_num_batched_tokens=512, enable_prefix_caching=False)
    answer = serve(engine, [rig.sequence("r", prompt, max_tokens=max_tokens, **params)])["r"]
    assert len({p.logprob for p in answer.logprobs}) > max_tokens // 2, "an answer this dull would prove nothing"
    return answer


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize(("size", "chunk"), [(100, 1), (100, 7), (100, 16), (100, 50), (470, 16), (470, 129)])
def test_chunked_prefill_equals_whole(rig: Rig, size: int, chunk: int, params: dict[str, Any]) -> None:
    prompt = rig.prompt(1, size)
    engine = rig.engine(max_num_batched_tokens=chunk)
    same(serve(engine, [rig.sequence("r", prompt, max_tokens=24, **params)])["r"], alone(rig, prompt, params))


def test_prebuilt_prefix_equals_cold(rig: Rig) -> None:
    """Built while idle, with a request that breaks into it."""
    prompt = rig.prompt(3, 100)
    engine = rig.engine()
    engine.prebuild(Sequence("next", [*prompt[:90], 5], SamplingParams(), is_prebuild=True))
    for _ in range(3):
        engine.step()
    serve(engine, [rig.sequence("other", rig.prompt(4, 30), max_tokens=2)])
    assert engine.stats().num_prebuilt_tokens_total == 80
    answer = serve(engine, [rig.sequence("r", prompt, max_tokens=24)])["r"]
    assert answer.last is not None and answer.last.num_cached_tokens == 80
    same(answer, alone(rig, prompt, {}))


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("size", [17, 32, 33, 100])
def test_warm_prefix_equals_cold(rig: Rig, size: int, params: dict[str, Any]) -> None:
    """From blocks of an equal prompt, of a longer one, and of a turn that went before."""
    prompt = rig.prompt(2, size)
    expected = alone(rig, prompt, params)
    engine = rig.engine()
    serve(engine, [rig.sequence("longer", [*prompt, 5, 6, 7] * 2, max_tokens=2)])
    for i in range(2):
        answer = serve(engine, [rig.sequence(str(i), prompt, max_tokens=24, **params)])[str(i)]
        assert answer.last is not None and answer.last.num_cached_tokens == (size - 1) // 16 * 16
        same(answer, expected)
    turn = [*prompt, *expected.token_ids, *rig.prompt(9, 20)]
    answer = serve(engine, [rig.sequence("turn", turn, max_tokens=24, **params)])["turn"]
    assert answer.last is not None and answer.last.num_cached_tokens >= (size + 23) // 16 * 16
    same(answer, alone(rig, turn, params))


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("caching", [True, False])
def test_preempted_equals_uninterrupted(rig: Rig, caching: bool, params: dict[str, Any]) -> None:
    prompts = {str(i): rig.prompt(10 + i, 20 + 9 * i) for i in range(4)}
    engine = rig.engine(num_blocks=11, enable_prefix_caching=caching)
    sequences = [rig.sequence(name, prompt, max_tokens=60, **params) for name, prompt in prompts.items()]
    answers = serve(engine, sequences)
    assert sum(s.num_preemptions for s in sequences) > 1
    for name, prompt in prompts.items():
        same(answers[name], alone(rig, prompt, params, max_tokens=60))
    assert_idle(engine)


# Four tokens to choose from: what comes next was often seen before, and often something else comes.
FEW = {"logit_bias": dict.fromkeys((5, 6, 7, 8), 100.0)}


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(FEW, id="greedy"),
        pytest.param({**FEW, "temperature": 0.9, "seed": 7, "frequency_penalty": 0.2}, id="seeded"),
    ],
)
def test_drafted_equals_plain(rig: Rig, params: dict[str, Any]) -> None:
    """Drafts taken, not taken, and in part; put out of a small pool among others; and what they left in the cache."""
    prompts = {str(i): rig.prompt(30 + i, 14 + 9 * i) for i in range(3)}
    engine = draft_always(rig.engine(num_blocks=9, draft_max=15))
    answers = serve(engine, [rig.sequence(name, prompt, max_tokens=50, **params) for name, prompt in prompts.items()])
    stats = engine.stats()
    assert 10 < stats.num_accepted_tokens_total < stats.num_drafted_tokens_total - 10
    assert stats.num_preemptions_total > 0
    assert_idle(engine)
    for name, prompt in prompts.items():
        same(answers[name], serve(rig.engine(), [rig.sequence("r", prompt, max_tokens=50, **params)])["r"])
    turn = [*prompts["0"], *answers["0"].token_ids[:40], *rig.prompt(8, 5)]
    serve(engine, [rig.sequence("0", prompts["0"], max_tokens=50, **params)])
    answer = serve(engine, [rig.sequence("turn", turn, max_tokens=8)])["turn"]
    assert answer.last is not None and answer.last.num_cached_tokens == 54
    same(answer, alone(rig, turn, {}, max_tokens=8))


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("drafts", [False, True])
def test_a_chat_goes_on_in_the_block_its_last_turn_ended_in(rig: Rig, drafts: bool, params: dict[str, Any]) -> None:
    """Two chats with one system prompt, a turn of each in turn, against an engine that remembers nothing."""
    engine, plain = (rig.engine(draft_max=15 * drafts, enable_prefix_caching=caching) for caching in (True, False))
    if drafts:
        draft_always(engine)
        params = {**params, **FEW}
    system = rig.prompt(51, 21)
    chats = {name: [*system, *rig.prompt(52 + i, 3 + 10 * i)] for i, name in enumerate("ab")}
    known = {"a": 0, "b": 16}
    for turn in range(5):
        for name, tokens in chats.items():
            answers = [serve(e, [rig.sequence(name, tokens, max_tokens=9, **params)])[name] for e in (engine, plain)]
            same(*answers)
            assert [a.last.num_cached_tokens for a in answers if a.last] == [known[name], 0]
            tokens += answers[0].token_ids
            known[name] = len(tokens) - 1  # an answer's last token is not run
            tokens += rig.prompt(60 + turn, 4 + 3 * turn)
    stats = engine.stats()
    assert not drafts or 0 < stats.num_accepted_tokens_total < stats.num_drafted_tokens_total
    assert_idle(engine)


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("budget", [19, 512])
def test_batch_equals_single(rig: Rig, budget: int, params: dict[str, Any]) -> None:
    """Twelve that come one after the other, of all lengths, mixed prefill and decode."""
    prompts = {str(i): rig.prompt(20 + i, 3 + 17 * i % 90) for i in range(12)}
    engine = rig.engine(num_blocks=200, max_num_batched_tokens=budget, max_num_seqs=12)
    answers: dict[str, Answer] = {}
    for name, prompt in prompts.items():
        engine.add(rig.sequence(name, prompt, max_tokens=24, **params))
        step(engine, answers)
    drain(engine, answers)
    for name, prompt in prompts.items():
        same(answers[name], alone(rig, prompt, params))


def test_n_answers_to_one_prompt_equal_their_solo_runs(rig: Rig) -> None:
    """As the server does it: n sequences with the seeds s, s + 1, ... whose prompt is computed once."""
    prompt = rig.prompt(40, 70)
    engine = rig.engine()
    answers = serve(
        engine, [rig.sequence(str(i), prompt, max_tokens=20, temperature=1.0, seed=100 + i) for i in range(5)]
    )
    assert len({tuple(a.token_ids) for a in answers.values()}) == 5
    assert [a.last.num_cached_tokens for _, a in sorted(answers.items()) if a.last] == [0, 64, 64, 64, 64]
    for i in range(5):
        same(answers[str(i)], alone(rig, prompt, {"temperature": 1.0, "seed": 100 + i}, max_tokens=20))


def test_threads_do_not_matter(rig: Rig) -> None:
    prompt = rig.prompt(50, 60)
    expected = alone(rig, prompt, {})
    if rig.name == "fake":
        pytest.skip("the fake runner has no threads")
    for num_threads in (1, 3):
        engine = rig.engine(num_threads=num_threads)
        same(serve(engine, [rig.sequence("r", prompt, max_tokens=24)])["r"], expected)


def test_forced_close_of_a_thought_is_computed_like_any_token(rig: Rig) -> None:
    """After the budget forces its tokens, the rest is what the model says to exactly that text."""
    prompt, close = rig.prompt(60, 30), (5, 9, 11)
    control = ThinkingControl(4, (3,), close, starts_in_thought=True)
    answer = serve(rig.engine(), [rig.sequence("r", prompt, max_tokens=40, thinking=control)])["r"]
    head = answer.token_ids[: 4 + len(close)]
    assert tuple(head[4:]) == close
    rest = serve(rig.engine(), [rig.sequence("r", [*prompt, *head], max_tokens=40 - len(head))])["r"]
    assert answer.token_ids[len(head) :] == rest.token_ids and answer.logprobs[len(head) :] == rest.logprobs


def test_cancel_frees_all_blocks(rig: Rig) -> None:
    """In prefill, in decode and in line; those who stay are not disturbed."""
    engine = rig.engine(max_num_batched_tokens=32, max_num_seqs=3)
    prompts = {str(i): rig.prompt(70 + i, 50 + i) for i in range(5)}
    answers: dict[str, Answer] = {}
    for name, prompt in prompts.items():
        engine.add(rig.sequence(name, prompt, max_tokens=24))
    for name in "014":
        step(engine, answers)
        step(engine, answers)
        used = engine.stats().kv_blocks_used
        assert engine.cancel(name)
        assert engine.stats().kv_blocks_used < used or name == "4"
    drain(engine, answers)
    for name in "23":
        same(answers[name], alone(rig, prompts[name], {}))
    assert_idle(engine)
