"""Engine: limits, endings, failures of one and of all, thoughts, constraints, text, counters."""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceABC

import numpy as np
import pytest
from numpy.typing import NDArray

from autoglm.engine.sequence import ThinkingControl
from autoglm.errors import CapacityError, ContextLengthError, EngineError, RequestError
from tests.engine.fake_runner import FakeRunner, FakeTokenizer, default_pieces
from tests.engine.harness import Answer, assert_idle, drain, make_engine, make_sequence, serve, step

VOCAB = 64
PIECES = default_pieces(VOCAB)
OPEN, CLOSE = PIECES.index(b"<think>"), PIECES.index(b"</think>")


class ScriptRunner(FakeRunner):
    """Wants given tokens one after the other: script[i] is the i-th token after a prompt of known length."""

    def __init__(self, script: list[int], num_prompt_tokens: int, **options: int) -> None:
        super().__init__(**options)
        self.script, self.start = script, num_prompt_tokens

    def _logits(self, batch, state):  # type: ignore[no-untyped-def]
        logits = super()._logits(batch, state)
        for row, t in enumerate(batch.logits_rows):
            index = int(batch.positions[0, t]) + 1 - self.start
            logits[row, self.script[index % len(self.script)]] = 100.0
        return logits


def play(script: list[int], **options: object):  # type: ignore[no-untyped-def]
    """Serve one prompt of three tokens with a scripted model."""
    engine = make_engine(ScriptRunner(script, 3))
    sequence = make_sequence("r", [5, 6, 7], **options)  # type: ignore[arg-type]
    answer = serve(engine, [sequence])["r"]
    assert_idle(engine)
    return answer


def ids(text: str) -> list[int]:
    """Tokens spelling text letter by letter."""
    return [PIECES.index(bytes([b])) for b in text.encode()]


# --- limits ---


def test_prompt_without_room_is_refused_and_names_the_mend() -> None:
    engine = make_engine(FakeRunner(max_context=20))
    with pytest.raises(ContextLengthError, match="20 tokens.*--ctx-size") as caught:
        engine.add(make_sequence("r", [1] * 20))
    assert caught.value.code == "context_length_exceeded"
    engine.add(make_sequence("r", [1] * 19))
    assert len(drain(engine)["r"].token_ids) == 1


def test_prompt_that_never_fits_the_pool_is_refused() -> None:
    engine = make_engine(FakeRunner(num_blocks=2))
    with pytest.raises(ContextLengthError):
        engine.add(make_sequence("r", [1] * 32))
    answers = serve(engine, [make_sequence("r", [1] * 31, max_tokens=5)])
    assert answers["r"].finish_reason == "length" and len(answers["r"].token_ids) == 1


def test_max_tokens_is_clipped_to_the_room() -> None:
    engine = make_engine(FakeRunner(max_context=32))
    answers = serve(engine, [make_sequence("a", [1] * 10, max_tokens=500), make_sequence("b", [2] * 10, max_tokens=3)])
    assert [len(answers[r].token_ids) for r in "ab"] == [22, 3]
    assert {a.finish_reason for a in answers.values()} == {"length"}


def test_full_line_is_429_with_retry_after() -> None:
    engine = make_engine(max_waiting=3)
    for i in range(3):
        engine.add(make_sequence(str(i), [1, i]))
    with pytest.raises(CapacityError) as caught:
        engine.add(make_sequence("x", [1]))
    assert caught.value.status == 429 and 1 <= caught.value.retry_after_s <= 300
    answers: dict[str, Answer] = {}
    step(engine, answers)
    engine.add(make_sequence("x", [1]))
    assert len(drain(engine, answers)) == 4


def test_ids_outside_the_vocabulary_are_refused() -> None:
    engine = make_engine()
    for bad in ([1, VOCAB], [-1]):
        with pytest.raises(RequestError, match="outside"):
            engine.add(make_sequence("r", bad))
    with pytest.raises(RequestError, match="logit_bias"):
        engine.add(make_sequence("r", [1], logit_bias={VOCAB: 1.0}))
    with pytest.raises(RequestError, match="no tokens"):
        make_sequence("r", [])
    engine.add(make_sequence("r", [1]))
    with pytest.raises(EngineError, match="request_id"):
        engine.add(make_sequence("r", [1]))


# --- endings ---


def test_eos_ends_without_text_and_is_counted() -> None:
    answer = play([*ids("ab"), 0, *ids("c")], ignore_eos=False)
    assert (answer.text, answer.finish_reason, answer.last.stop_reason) == ("ab", "stop", None)
    assert answer.token_ids == [*ids("ab"), 0] and answer.last.num_output_tokens == 3


def test_ignore_eos_goes_on() -> None:
    answer = play([*ids("ab"), 0, *ids("c")], max_tokens=4)
    assert answer.text == "abc" and answer.finish_reason == "length"


def test_visible_eos_is_shown() -> None:
    tokenizer = FakeTokenizer(PIECES, eos=frozenset({CLOSE}))
    tokenizer.eos_visible_token_ids = frozenset({CLOSE})
    engine = make_engine(ScriptRunner([*ids("ab"), CLOSE], 3), tokenizer)
    answer = serve(engine, [make_sequence("r", [5, 6, 7], ignore_eos=False)])["r"]
    assert answer.text == "ab</think>" and answer.finish_reason == "stop"


def test_stop_token_ids_end_without_text_and_are_named() -> None:
    stop = PIECES.index(b"x")
    answer = play(ids("abx"), stop_token_ids=frozenset({stop}))
    assert (answer.text, answer.last.stop_reason) == ("ab", stop)


def test_stop_string_over_tokens_never_shows() -> None:
    answer = play(ids("helloworld"), stop=("low", "owx"), max_tokens=30)
    assert (answer.text, answer.finish_reason, answer.last.stop_reason) == ("hel", "stop", "low")
    assert "".join(answer.pieces) == "hel" and answer.token_ids == ids("hellow")


def test_held_text_comes_out_when_length_ends_it() -> None:
    answer = play(ids("hello"), stop=("lox",), max_tokens=5)
    assert answer.text == "hello" and answer.finish_reason == "length"


def test_held_text_comes_out_at_eos() -> None:
    assert play([*ids("hel"), 0], stop=("lox",), ignore_eos=False).text == "hel"


def test_characters_never_break() -> None:
    answer = play(ids("你你"), max_tokens=6)
    assert answer.text == "你你" and all("\ufffd" not in piece for piece in answer.pieces)
    cut = play(ids("你你"), max_tokens=5)
    assert cut.text == "你\ufffd" and cut.pieces[:-1] == ["", "", "你", ""]


# --- failures ---


def test_nan_ends_one_sequence_only(caplog: pytest.LogCaptureFixture) -> None:
    runner = FakeRunner()
    solo = serve(make_engine(FakeRunner()), [make_sequence("b", [9, 9, 8])])["b"]
    runner.nan_for_token = 33
    engine = make_engine(runner)
    answers = serve(engine, [make_sequence("a", [1, 33]), make_sequence("b", [9, 9, 8])])
    assert answers["a"].finish_reason == "error" and "not finite" in answers["a"].last.error
    assert 33 in solo.token_ids or answers["b"].token_ids == solo.token_ids
    assert_idle(engine)


def test_failing_constraint_ends_one_sequence_and_tells_no_content(caplog: pytest.LogCaptureFixture) -> None:
    words = "secret words of the user"

    class Broken:
        def allowed(self) -> NDArray[np.uint32]:
            raise ValueError(words)

        def forced(self) -> list[int]:
            return []

        def closing(self, token_ids: SequenceABC[int], room: int) -> list[int]:
            return []

        def accept(self, token_id: int) -> None: ...

        def is_stopped(self) -> bool:
            return False

    engine = make_engine()
    with caplog.at_level(logging.DEBUG):
        answers = serve(engine, [make_sequence("a", [1, 2], constraint=Broken()), make_sequence("b", [3])])
    assert answers["a"].finish_reason == "error" and answers["b"].finish_reason == "length"
    assert "ValueError" in answers["a"].last.error and "secret" not in answers["a"].last.error
    assert "secret" not in caplog.text and "request a failed" in caplog.text
    assert_idle(engine)


def test_failing_runner_ends_its_batch_and_nothing_else() -> None:
    """Half-written blocks are not reused: the same prompt afterwards gives the right answer."""
    runner = FakeRunner()
    prompt = list(range(1, 41))
    right = serve(make_engine(FakeRunner()), [make_sequence("r", prompt)])["r"].token_ids
    engine = make_engine(runner, max_num_seqs=2)
    for i in range(3):
        engine.add(make_sequence(str(i), [*prompt[:-1], i + 1]))
    engine.add(make_sequence("late", prompt))
    runner.fail_next = RuntimeError("out of something; prompt was: secret")
    failed = engine.step()
    assert {o.finish_reason for o in failed} == {"error"} and all("secret" not in (o.error or "") for o in failed)
    rest = drain(engine)
    assert rest["late"].token_ids == right
    assert len(failed) + len(rest) == 4
    assert_idle(engine)
    assert engine.stats().num_finished_total["error"] == len(failed)


def test_wrong_shape_of_logits_is_a_runner_failure() -> None:
    class Short(FakeRunner):
        def _logits(self, batch, state):  # type: ignore[no-untyped-def]
            return super()._logits(batch, state)[:, :10]

    engine = make_engine(Short())
    assert "shape" in (serve(engine, [make_sequence("r", [1])])["r"].last.error or "")
    assert_idle(engine)


def test_cancel_frees_blocks_at_once() -> None:
    engine = make_engine(max_num_seqs=1)
    for name in "ab":
        engine.add(make_sequence(name, list(range(1, 40)), max_tokens=100))
    engine.step()
    assert engine.stats().kv_blocks_used > 0
    assert engine.cancel("a") and engine.stats().kv_blocks_used == 0
    assert engine.cancel("b") and not engine.has_work()
    assert not engine.cancel("a") and engine.step() == []
    assert_idle(engine)
    assert engine.stats().num_finished_total == {"cancelled": 2}


# --- thoughts and constraints ---


def thinking(budget: int | None, inside: bool = False) -> ThinkingControl:
    return ThinkingControl(budget, (OPEN,), (CLOSE,), inside)


def test_budget_forces_the_close_and_the_answer_comes() -> None:
    script = [OPEN, *ids("abcdefgh"), *ids("xyz")]
    answer = play(script, thinking=thinking(4), max_tokens=60, logprobs=0)
    assert answer.token_ids[:6] == [OPEN, *ids("abcd"), CLOSE]
    assert answer.text.startswith("<think>abcd</think>")
    assert len(answer.token_ids) == 60 and len(answer.logprobs) == 60
    assert answer.logprobs[5] == (CLOSE, 0.0, [])


def test_budget_zero_gives_no_thought_tokens() -> None:
    opened = play([OPEN, *ids("ab")], thinking=thinking(0), max_tokens=8)
    assert OPEN not in opened.token_ids and opened.last.num_reasoning_tokens == 0
    inside = play(ids("ab"), thinking=thinking(0, inside=True), max_tokens=8)
    assert inside.token_ids[0] == CLOSE and inside.last.num_reasoning_tokens == 0


def test_unlimited_thought_is_left_alone_and_counted() -> None:
    answer = play([OPEN, *ids("abc"), CLOSE, *ids("xy")], thinking=thinking(None), max_tokens=7)
    assert answer.token_ids == [OPEN, *ids("abc"), CLOSE, *ids("xy")] and answer.last.num_reasoning_tokens == 3


def test_thought_near_max_tokens_leaves_an_answer() -> None:
    answer = play([OPEN, *ids("a" * 50)], thinking=thinking(1000), max_tokens=40)
    assert len(answer.token_ids) == 40 and answer.token_ids.index(CLOSE) == 40 - 16 - 1


def test_eos_inside_a_budgeted_thought_closes_it_instead() -> None:
    answer = play([OPEN, *ids("ab"), 0, *ids("xy"), 0], thinking=thinking(9), max_tokens=30, ignore_eos=False)
    assert answer.text == "<think>ab</think>xy" and answer.finish_reason == "stop"


class Spell:
    """Allows exactly one text, then stops."""

    def __init__(self, tokens: list[int]) -> None:
        self.left = list(tokens)

    def allowed(self) -> NDArray[np.uint32]:
        words = np.zeros(VOCAB // 32, np.uint32)
        words[self.left[0] // 32] = 1 << (self.left[0] % 32)
        return words

    def forced(self) -> list[int]:
        return []

    def closing(self, token_ids: SequenceABC[int], room: int) -> list[int]:
        return []

    def accept(self, token_id: int) -> None:
        assert token_id == self.left.pop(0), "told of a token that was not asked for"

    def is_stopped(self) -> bool:
        return not self.left


def test_constraint_alone() -> None:
    answer = play(ids("zzzz"), constraint=Spell(ids("json")))
    assert answer.text == "json" and answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("script", "control", "text"),
    [
        ([OPEN, *ids("abc"), CLOSE], thinking(None), "<think>abc</think>json"),
        ([OPEN, *ids("abcdef")], thinking(2), "<think>ab</think>json"),
        ([OPEN, *ids("ab"), 0], thinking(None), "<think>ab</think>json"),
        (ids("zzz"), thinking(None), "json"),
        ([OPEN, *ids("z")], thinking(0), "json"),
        ([*ids("ab"), CLOSE], thinking(None, inside=True), "ab</think>json"),
        (ids("ab"), thinking(0, inside=True), "</think>json"),
    ],
    ids=["closed by itself", "budget", "eos in thought", "no thought", "off", "starts inside", "starts inside, off"],
)
def test_constraint_waits_for_the_end_of_the_thought(script: list[int], control: ThinkingControl, text: str) -> None:
    answer = play(script, constraint=Spell(ids("json")), thinking=control, ignore_eos=False, max_tokens=30)
    assert (answer.text, answer.finish_reason) == (text, "stop")


def test_thinking_tag_inside_a_constrained_answer_is_text() -> None:
    spelled = [*ids("a"), OPEN, *ids("b")]
    answer = play(ids("z"), constraint=Spell(spelled), thinking=thinking(None))
    assert answer.text == "a<think>b" and answer.last.num_reasoning_tokens == 0


# --- counters ---


def test_outputs_carry_counts_and_timings() -> None:
    engine = make_engine()
    prompt = list(range(1, 40))
    serve(engine, [make_sequence("a", prompt)])
    answer = serve(engine, [make_sequence("b", prompt, max_tokens=5)])["b"]
    last = answer.last
    assert (last.num_prompt_tokens, last.num_cached_tokens, last.num_output_tokens) == (39, 32, 5)
    times = {"queue_ms", "encode_ms", "prefill_ms", "decode_ms"}
    assert set(last.timings) == {*times, "preemptions", "forced_tokens", "draft_n", "draft_n_accepted"}
    assert all(value >= 0 for value in last.timings.values()) and last.timings["decode_ms"] > 0


def test_stats_add_up() -> None:
    engine = make_engine()
    prompt = list(range(1, 40))
    serve(engine, [make_sequence("a", prompt, max_tokens=4)])
    engine.add(make_sequence("b", prompt, max_tokens=4))
    answers: dict[str, Answer] = {}
    step(engine, answers)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_blocks_total) == (1, 0, 64)
    assert stats.kv_blocks_used == 3 and stats.kv_pool["used"] + stats.kv_pool["cached"] + stats.kv_pool["free"] == 64
    drain(engine, answers)
    stats = engine.stats()
    assert (stats.num_prompt_tokens_total, stats.num_generation_tokens_total) == (78, 8)
    assert stats.num_prefill_tokens_total == 39 + 1
    assert (stats.prefix_cache_query_tokens, stats.prefix_cache_hit_tokens) == (78, 38)
    assert stats.num_requests_total == 2 and stats.num_finished_total == {"length": 2}
    assert 0 < stats.runner_s < stats.step_s


def test_padding_rows_of_the_output_matrix_are_never_sampled() -> None:
    """A model may have more rows than the tokenizer has ids, and the reverse."""
    runner = ScriptRunner([60, *ids("ab")], 3)
    engine = make_engine(runner, FakeTokenizer(PIECES[:50]))
    answer = serve(engine, [make_sequence("r", [5, 6, 7], max_tokens=30)])["r"]
    assert answer.finish_reason == "length" and max(answer.token_ids) < 50
    with pytest.raises(RequestError, match="49"):
        engine.add(make_sequence("bias", [1], logit_bias={50: 1.0}))
    longer = make_engine(FakeRunner(), FakeTokenizer(default_pieces(200)))
    banned = frozenset({1, 2, 150})
    assert set(serve(longer, [make_sequence("r", [5], max_tokens=50, banned_token_ids=banned)])["r"].token_ids) - banned
