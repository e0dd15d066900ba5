"""What prompt lookup expects, against a plain search; and its record of what came true."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm.engine.prompt_lookup import FIRST_ACCEPTANCE, PromptLookup


def reference(token_ids: list[int]) -> int | None:
    """Where the next token comes from: behind the latest earlier place of the last two."""
    size = len(token_ids)
    for end in range(size - 1, 1, -1):
        if token_ids[end - 2 : end] == token_ids[size - 2 :]:
            return end
    return None


@given(token_ids=st.lists(st.integers(0, 3), min_size=1, max_size=80), count=st.integers(1, 20))
def test_it_expects_what_followed_the_last_two_tokens_before(token_ids: list[int], count: int) -> None:
    found = PromptLookup().expect(token_ids, count)
    source = reference(token_ids)
    if source is None:
        assert found == []
        return
    repeated = list(token_ids)  # as if each expected token came
    for i in range(count):
        repeated.append(repeated[source + i])
    assert found == repeated[len(token_ids) :]


@given(token_ids=st.lists(st.integers(0, 3), min_size=1, max_size=300), steps=st.lists(st.integers(1, 9), max_size=40))
def test_a_growing_sequence_is_followed_as_long_as_it_comes_true(token_ids: list[int], steps: list[int]) -> None:
    lookup = PromptLookup()
    source: int | None = None
    asked, size = 0, 1
    for grown in [0, *steps]:
        size = min(size + grown, len(token_ids))
        now = token_ids[:size]
        if source is not None and all(now[source + i] == now[asked + i] for i in range(size - asked)):
            source += size - asked
        else:
            source = reference(now)
        asked = size
        found = lookup.expect(now, 3)
        assert found[:1] == ([] if source is None else [now[source]])


@pytest.mark.parametrize("token_ids", [[5], [5, 5], [5, 6], [1, 2, 3, 2], [7, 7, 8, 7]])
def test_one_token_alike_is_no_match(token_ids: list[int]) -> None:
    assert PromptLookup().expect(token_ids, 4) == []


def test_no_tokens_are_expected_where_none_were_asked_for() -> None:
    assert PromptLookup().expect([1, 2, 3, 1, 2], 0) == []


def test_the_acceptance_follows_what_comes_true() -> None:
    lookup = PromptLookup()
    assert lookup.acceptance == FIRST_ACCEPTANCE
    for _ in range(60):
        lookup.note(True)
    assert lookup.acceptance > 0.99
    hits = np.random.default_rng(0).random(4000) < 0.3
    seen = []
    for hit in hits:
        lookup.note(bool(hit))
        seen.append(lookup.acceptance)
    assert np.mean(seen[100:]) == pytest.approx(0.3, abs=0.03)
