"""Prefixes built while idle: the next request finds them, is answered as by a cold engine, and waits for nobody."""

from __future__ import annotations

import pytest

from autoglm.engine.engine import PREBUILD_CHUNK, Engine
from autoglm.engine.prebuild import MAX_WAITING
from autoglm.engine.sampling import SamplingParams
from autoglm.engine.sequence import Sequence
from tests.engine.fake_runner import FakeRunner
from tests.engine.harness import Answer, assert_idle, drain, make_engine, make_sequence, serve, step

BLOCK = 16
PREFIX = [1 + (i * i + i // 3) % 60 for i in range(6 * BLOCK + 5)]
PROMPT = [*PREFIX[:-1], *range(20, 50)]


def prefix(token_ids: list[int] | None = None, salt: bytes = b"") -> Sequence:
    ids = PREFIX if token_ids is None else token_ids
    return Sequence("next", ids, SamplingParams(max_tokens=1), cache_salt=salt, is_prebuild=True)


def build(engine: Engine, *sequences: Sequence) -> None:
    for sequence in sequences:
        engine.prebuild(sequence)
    assert drain(engine) == {}, "a prefix gives no output"


def ask(engine: Engine, salt: bytes = b"") -> Answer:
    return serve(engine, [make_sequence("one", PROMPT, cache_salt=salt)])["one"]


def cold() -> list[int]:
    return ask(make_engine()).token_ids


def test_the_next_request_computes_only_what_is_new() -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    build(engine, prefix())
    assert max(runner.batch_sizes) <= PREBUILD_CHUNK and sum(runner.batch_sizes) == 6 * BLOCK
    stats = engine.stats()
    assert (stats.num_prebuilt_tokens_total, stats.num_prebuilt_hit_tokens_total) == (6 * BLOCK, 0)
    assert stats.num_prefill_tokens_total == 0 and stats.num_requests_total == 0
    assert_idle(engine)
    answer = ask(engine)
    assert answer.token_ids == cold()
    assert answer.last is not None and answer.last.num_cached_tokens == 6 * BLOCK
    stats = engine.stats()
    assert stats.num_prebuilt_hit_tokens_total == 6 * BLOCK
    assert stats.num_prefill_tokens_total == len(PROMPT) - 6 * BLOCK
    ask(engine)
    assert engine.stats().num_prebuilt_hit_tokens_total == 6 * BLOCK, "what was used once is cached like all else"


def test_a_chat_goes_on_behind_what_was_built() -> None:
    """From the partly filled block its last turn ended in, whose parent was built ahead."""
    engine = make_engine()
    build(engine, prefix())
    turn = [*PREFIX[: 6 * BLOCK], 7, 8]
    turn += serve(engine, [make_sequence("last", turn, max_tokens=5)])["last"].token_ids
    answer, alone = (serve(e, [make_sequence("next", [*turn, 9])])["next"] for e in (engine, make_engine()))
    assert answer.token_ids == alone.token_ids
    assert answer.last is not None and answer.last.num_cached_tokens == len(turn) - 1
    assert engine.stats().num_prebuilt_hit_tokens_total == 6 * BLOCK
    assert_idle(engine)


def test_a_wrong_guess_changes_nothing() -> None:
    engine = make_engine()
    build(engine, prefix([*PREFIX[:40], *range(1, 50)]), prefix(salt=b"another's"))
    answer = ask(engine)
    assert answer.token_ids == cold()
    assert engine.stats().num_prebuilt_hit_tokens_total == 2 * BLOCK
    assert_idle(engine)


def test_it_gives_way_within_a_slice_and_goes_on_later() -> None:
    """A request that comes in the middle of the second chunk is scheduled in the very next step."""
    runner = FakeRunner()
    runner.slices_per_batch = 3
    engine = make_engine(runner)
    engine.prebuild(prefix())
    for _ in range(4):
        engine.step()
    assert engine.stats().num_prebuilt_tokens_total == PREBUILD_CHUNK and engine.stats().kv_blocks_used > 0
    engine.add(make_sequence("other", [5] * 20, max_tokens=3))
    answers: dict[str, Answer] = {}
    step(engine, answers)
    assert list(answers) == ["other"]
    assert engine.stats().kv_blocks_used == 2, "the prefix holds no block while somebody is served"
    drain(engine, answers)
    assert engine.stats().num_prebuilt_tokens_total == 6 * BLOCK, "nothing that was whole is computed twice"
    assert_idle(engine)
    assert ask(engine).token_ids == cold()


def test_the_request_itself_may_come_while_it_is_built() -> None:
    runner = FakeRunner()
    runner.slices_per_batch = 3
    engine = make_engine(runner)
    engine.prebuild(prefix())
    for _ in range(5):
        engine.step()
    answer = ask(engine)
    assert answer.token_ids == cold()
    assert answer.last is not None and answer.last.num_cached_tokens == PREBUILD_CHUNK
    assert engine.stats().num_prebuilt_tokens_total == PREBUILD_CHUNK, "the rest was there when it went on"
    assert_idle(engine)


def test_what_has_no_room_is_passed_over() -> None:
    small = make_engine(FakeRunner(num_blocks=4))
    build(small, prefix())
    uncached = make_engine(enable_prefix_caching=False)
    build(uncached, prefix())
    for engine in (small, uncached):
        assert engine.stats().num_prebuilt_tokens_total == 0


def test_only_cached_blocks_make_room() -> None:
    """A pool full of old prompts: the oldest go, and the prefix is there in the end."""
    engine = make_engine(FakeRunner(num_blocks=12))
    serve(engine, [make_sequence(f"old {i}", [i + 1] * 60, max_tokens=2) for i in range(3)])
    build(engine, prefix())
    assert ask(engine).token_ids == cold()
    assert engine.stats().num_prebuilt_hit_tokens_total == 6 * BLOCK


def test_evicted_blocks_are_no_hits() -> None:
    engine = make_engine(FakeRunner(num_blocks=12))
    build(engine, prefix())
    serve(engine, [make_sequence(f"other {i}", [i + 1] * 100, max_tokens=2) for i in range(4)])
    assert ask(engine).token_ids == cold()
    assert engine.stats().num_prebuilt_hit_tokens_total == 0


def test_the_line_is_bounded() -> None:
    engine = make_engine(FakeRunner(num_blocks=256))
    for start in range(MAX_WAITING + 3):
        engine.prebuild(prefix([start + 1] * (BLOCK + 1)))
    engine.step()
    for start in range(3):
        engine.prebuild(prefix([start + 30] * (BLOCK + 1)))
    drain(engine)
    assert engine.stats().num_prebuilt_tokens_total == (MAX_WAITING + 1) * BLOCK
    assert_idle(engine)


def test_a_failure_costs_the_prefix_alone(caplog: pytest.LogCaptureFixture) -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    runner.fail_next = RuntimeError("secret words")
    build(engine, prefix())
    assert "RuntimeError" in caplog.text and "secret" not in caplog.text
    assert_idle(engine)
    assert ask(engine).token_ids == cold()
