"""The thought budget on token ids alone."""

from __future__ import annotations

import pytest

from autoglm.engine.thinking import ThinkingControl, ThoughtTracker
from autoglm.errors import ConfigError

OPEN, CLOSE = 90, 91


def tracker(
    budget: int | None, *, inside: bool = False, max_tokens: int = 1000, close: tuple[int, ...] = (CLOSE,)
) -> ThoughtTracker:
    return ThoughtTracker(ThinkingControl(budget, (OPEN,), close, inside), max_tokens)


def test_counts_only_between_the_tags() -> None:
    t = tracker(None)
    for token in (1, OPEN, 2, 3, 4, CLOSE, 5, 6):
        t.observe(token)
    assert t.num_thought_tokens == 3 and not t.is_inside


def test_budget_closes_at_its_last_token() -> None:
    t = tracker(3)
    assert t.tokens_to_force(0) == ()
    for i, token in enumerate((OPEN, 1, 2)):
        t.observe(token)
        assert t.tokens_to_force(i + 1) == ()
    t.observe(3)
    assert t.tokens_to_force(4) == (CLOSE,)
    t.observe(CLOSE)
    assert t.num_thought_tokens == 3 and t.tokens_to_force(5) == ()


def test_starting_inside_with_no_budget_closes_at_once() -> None:
    assert tracker(0, inside=True).tokens_to_force(0) == (CLOSE,)
    assert tracker(None, inside=True).tokens_to_force(999) == ()


def test_a_half_written_closing_tag_is_completed_not_repeated() -> None:
    t = tracker(3, inside=True, close=(7, 8, 9))
    for token in (1, 7, 8):
        t.observe(token)
    assert t.tokens_to_force(3) == (9,)
    t.observe(9)
    assert not t.is_inside and t.num_thought_tokens == 1
    other = tracker(3, inside=True, close=(7, 7, 9))
    for token in (7, 7, 7):
        other.observe(token)
    assert other.tokens_to_force(3) == (9,)


def test_a_long_opening_tag_is_seen() -> None:
    t = ThoughtTracker(ThinkingControl(5, (1, 2, 3), (4, 5)), 100)
    for token in (1, 1, 2, 3):
        t.observe(token)
    assert t.is_inside and t.may_open_next is None


@pytest.mark.parametrize(("max_tokens", "reserve"), [(10, 16), (64, 16), (400, 100), (3000, 256)])
def test_near_max_tokens_room_is_left_for_an_answer(max_tokens: int, reserve: int) -> None:
    t = tracker(100_000, inside=True, max_tokens=max_tokens)
    num = 0
    while not t.tokens_to_force(num):
        t.observe(1)
        num += 1
    assert t.reserve == reserve and num == max(0, max_tokens - reserve - 1)


def test_a_second_thought_shares_the_budget() -> None:
    t = tracker(2)
    for token in (OPEN, 1, 2, CLOSE, 5, OPEN):
        t.observe(token)
    assert t.tokens_to_force(6) == (CLOSE,)


def test_which_token_may_open() -> None:
    assert tracker(5).may_open_next == OPEN
    assert tracker(0).may_open_next is None
    assert tracker(5, inside=True).may_open_next is None
    t = tracker(5)
    t.observe(OPEN, may_open=False)
    assert not t.is_inside


@pytest.mark.parametrize("arguments", [(-1, (1,), (2,)), (1, (1,), ()), (1, (), (2,))])
def test_impossible_controls_are_refused(arguments: tuple[int, tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match="thinking"):
        ThinkingControl(*arguments)
