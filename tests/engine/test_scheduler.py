"""Who runs: decodes first, prefills by age, nobody starved, youngest preempted, shared prompts computed once."""

from __future__ import annotations

import pytest

from tests.engine.fake_runner import FakeRunner
from tests.engine.harness import Answer, assert_idle, drain, make_engine, make_sequence, serve, step


def chunks(engine):  # type: ignore[no-untyped-def]
    """Step once; {request_id: tokens run}."""
    scheduled = engine.scheduler.schedule
    seen: dict[str, int] = {}

    def spy():  # type: ignore[no-untyped-def]
        items = scheduled()
        seen.update({i.sequence.request_id: i.num_scheduled_tokens for i in items})
        return items

    engine.scheduler.schedule = spy
    engine.step()
    engine.scheduler.schedule = scheduled
    return seen


def prompt(start: int, size: int) -> list[int]:
    return [(start * 7 + i * i + i // 5) % 60 + 1 for i in range(size)]


def test_decodes_come_before_prefill() -> None:
    engine = make_engine(max_num_batched_tokens=32)
    for i in range(3):
        engine.add(make_sequence(f"d{i}", [1 + i], max_tokens=50))
    engine.step()
    engine.add(make_sequence("long", prompt(0, 200)))
    for _ in range(200 // 29):
        assert chunks(engine) == {"d0": 1, "d1": 1, "d2": 1, "long": 29}


def test_budget_is_never_passed_and_never_wasted() -> None:
    runner = FakeRunner()
    engine = make_engine(runner, max_num_batched_tokens=48)
    serve(engine, [make_sequence(str(i), prompt(i, 20 + 37 * i), max_tokens=3) for i in range(5)])
    assert max(runner.batch_sizes) == 48
    first_short = next(i for i, size in enumerate(runner.batch_sizes) if size < 48)
    assert sum(runner.batch_sizes[:first_short]) >= sum(20 + 37 * i for i in range(5)) - 48


def test_runner_budget_limits_too() -> None:
    runner = FakeRunner(max_num_batched_tokens=24)
    serve(make_engine(runner), [make_sequence("r", prompt(0, 100))])
    assert max(runner.batch_sizes) == 24


def test_long_prompt_leaves_a_quarter_to_later_ones() -> None:
    engine = make_engine(FakeRunner(num_blocks=300), max_num_batched_tokens=64)
    engine.add(make_sequence("long", prompt(0, 2000)))
    assert chunks(engine) == {"long": 64}, "alone it has everything"
    engine.add(make_sequence("a", prompt(1, 20)))
    engine.add(make_sequence("b", prompt(2, 12)))
    assert chunks(engine) == {"long": 48, "a": 16}
    assert chunks(engine) == {"long": 48, "a": 4, "b": 12}


def test_later_short_prompts_do_not_starve_a_long_one() -> None:
    """A new short request every step; the long one still takes at most a third longer than its share alone."""
    engine = make_engine(FakeRunner(num_blocks=300), max_num_batched_tokens=64, max_num_seqs=8)
    engine.add(make_sequence("long", prompt(0, 1200), max_tokens=1))
    answers: dict[str, Answer] = {}
    steps = 0
    while "long" not in answers:
        engine.add(make_sequence(f"s{steps}", prompt(steps + 1, 30), max_tokens=2))
        step(engine, answers)
        steps += 1
    assert steps <= 1200 / (64 - 16 - 8) + 1
    drain(engine, answers)


def test_short_prompt_behind_a_long_one_answers_first() -> None:
    engine = make_engine(FakeRunner(num_blocks=300), max_num_batched_tokens=64)
    engine.add(make_sequence("long", prompt(0, 2000), max_tokens=1))
    engine.add(make_sequence("short", prompt(1, 20), max_tokens=1))
    answers: dict[str, Answer] = {}
    for _ in range(3):
        step(engine, answers)
    assert "short" in answers and "long" not in answers


@pytest.mark.parametrize("budget", [1, 2, 4])
def test_a_tiny_budget_still_serves_everybody(budget: int) -> None:
    engine = make_engine(max_num_batched_tokens=budget, max_num_seqs=16)
    answers = serve(engine, [make_sequence(str(i), prompt(i, 5), max_tokens=4) for i in range(7)])
    assert all(len(a.token_ids) == 4 for a in answers.values()) and len(answers) == 7
    assert engine.scheduler.max_num_running == budget


def test_max_num_seqs_is_kept_and_the_line_moves_in_order() -> None:
    runner = FakeRunner()
    engine = make_engine(runner, max_num_seqs=2)
    finished: list[str] = []
    for i in range(6):
        engine.add(make_sequence(str(i), prompt(i, 4), max_tokens=3))
    while engine.has_work():
        finished += [o.request_id for o in engine.step() if o.finish_reason]
    assert finished == list("012345") and max(runner.seqs_per_batch) == 2


def test_a_prompt_that_does_not_fit_yet_holds_its_place() -> None:
    """A big request at the head is not overtaken for ever by small ones that would fit."""
    engine = make_engine(FakeRunner(num_blocks=10), enable_prefix_caching=False)
    engine.add(make_sequence("running", prompt(0, 60), max_tokens=30))
    engine.step()
    engine.add(make_sequence("big", prompt(1, 100), max_tokens=2))
    engine.add(make_sequence("small", prompt(2, 4), max_tokens=2))
    order: list[str] = []
    while engine.has_work():
        order += [o.request_id for o in engine.step() if o.finish_reason]
    assert order.index("running") < order.index("big") <= order.index("small")


def test_youngest_is_preempted_and_the_oldest_never() -> None:
    engine = make_engine(FakeRunner(num_blocks=8), enable_prefix_caching=False)
    sequences = [make_sequence(str(i), prompt(i, 20), max_tokens=60) for i in range(3)]
    answers = serve(engine, sequences)
    assert engine.stats().num_preemptions_total > 0
    assert sequences[0].num_preemptions == 0 and sequences[2].num_preemptions > 0
    assert answers["2"].last.timings["preemptions"] == sequences[2].num_preemptions
    assert all(len(a.token_ids) == 60 for a in answers.values())
    assert_idle(engine)


def test_equal_prompts_are_prefilled_once() -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    answers = serve(engine, [make_sequence(str(i), prompt(0, 100), max_tokens=3) for i in range(8)])
    assert len({tuple(a.token_ids) for a in answers.values()}) == 1
    assert sorted(a.last.num_cached_tokens for a in answers.values()) == [0] + [96] * 7
    assert engine.stats().num_prefill_tokens_total == 100 + 7 * 4


def test_waiting_for_a_shared_prompt_does_not_hold_up_strangers() -> None:
    engine = make_engine(FakeRunner(num_blocks=300), max_num_batched_tokens=64)
    engine.add(make_sequence("first", prompt(0, 1000), max_tokens=1))
    engine.add(make_sequence("twin", prompt(0, 1000), max_tokens=1))
    engine.add(make_sequence("stranger", prompt(3, 30), max_tokens=1))
    order: list[str] = []
    while engine.has_work():
        order += [o.request_id for o in engine.step() if o.finish_reason]
    assert order == ["stranger", "first", "twin"]


def test_the_twin_goes_on_alone_when_the_first_is_cancelled() -> None:
    engine = make_engine(max_num_batched_tokens=16)
    alone = serve(make_engine(), [make_sequence("twin", prompt(0, 100))])["twin"].token_ids
    engine.add(make_sequence("first", prompt(0, 100)))
    engine.add(make_sequence("twin", prompt(0, 100)))
    engine.step()
    engine.step()
    engine.cancel("first")
    answer = drain(engine)["twin"]
    assert answer.token_ids == alone and answer.last.num_cached_tokens == 32
    assert_idle(engine)


def test_other_salt_shares_nothing() -> None:
    engine = make_engine()
    pair = [make_sequence(s, prompt(0, 50), cache_salt=s.encode(), max_tokens=2) for s in "ab"]
    answers = serve(engine, pair)
    assert [answers[s].last.num_cached_tokens for s in "ab"] == [0, 0]
    assert answers["a"].token_ids == answers["b"].token_ids


def test_one_who_waited_for_a_shared_prompt_keeps_its_seniority() -> None:
    """Admitted after a younger stranger, it is still the stranger that is preempted first."""
    engine = make_engine(FakeRunner(num_blocks=20), max_num_batched_tokens=32)
    first, twin = make_sequence("first", prompt(0, 100)), make_sequence("twin", prompt(0, 100), max_tokens=150)
    stranger = make_sequence("stranger", prompt(3, 4), max_tokens=150)
    for sequence in (first, twin, stranger):
        engine.add(sequence)
    answers: dict[str, Answer] = {}
    step(engine, answers)
    assert [s.request_id for s in engine.scheduler.running] == ["first", "stranger"]
    while len(engine.scheduler.running) < 3 and engine.has_work():
        step(engine, answers)
    assert [s.request_id for s in engine.scheduler.running] == ["first", "twin", "stranger"]
    drain(engine, answers)
    assert twin.num_preemptions == 0 and stranger.num_preemptions > 0


def test_a_prompt_beside_a_stream_takes_what_a_tenth_of_a_second_holds() -> None:
    """Slow machine: the step in which somebody decodes stays short; alone again, a prompt has the whole step."""
    engine = make_engine(max_num_batched_tokens=256)
    engine.add(make_sequence("talker", [1, 2], max_tokens=9))
    engine.step()
    seen = []
    engine.add(make_sequence("first", prompt(0, 500)))
    while not seen or "talker" in seen[-1]:
        engine.scheduler.prefill_room = 24
        seen.append(chunks(engine))
    assert len(seen) == 9, seen
    assert all(step["first"] == 24 for step in seen[:-1])
    assert seen[-1]["first"] == 256


@pytest.mark.parametrize(("num_waiting", "shares"), [(1, 1), (2, 2), (4, 4), (6, 4)])
def test_each_who_waits_has_a_share_of_the_step_up_to_four(num_waiting: int, shares: int) -> None:
    engine = make_engine(FakeRunner(num_blocks=256), max_num_batched_tokens=256)
    engine.add(make_sequence("talker", [1, 2], max_tokens=50))
    engine.step()
    for number in range(num_waiting):
        engine.add(make_sequence(str(number), prompt(number, 300)))
    engine.scheduler.prefill_room = 24
    assert sum(chunks(engine).values()) == 1 + 24 * shares


def test_who_has_no_place_yet_has_no_share() -> None:
    engine = make_engine(max_num_batched_tokens=256, max_num_seqs=2)
    engine.add(make_sequence("talker", [1, 2], max_tokens=50))
    engine.step()
    for number in range(4):
        engine.add(make_sequence(str(number), prompt(number, 300)))
    engine.scheduler.prefill_room = 24
    assert chunks(engine) == {"talker": 1, "0": 24}


def test_many_prompts_beside_a_stream_all_move_on() -> None:
    engine = make_engine(FakeRunner(num_blocks=256), max_num_seqs=32)
    engine.add(make_sequence("talker", [1, 2], max_tokens=9))
    engine.step()
    for i in range(20):
        engine.add(make_sequence(str(i), prompt(i, 60)))
    chunks(engine)
    engine.scheduler.prefill_room = 4
    seen = chunks(engine)
    assert all(seen[str(i)] >= 1 for i in range(len(engine.scheduler.running) - 1))
