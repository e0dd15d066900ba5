"""Prompt lookup: the tokens expected next are those that followed the last ones where they stood before.

Source: Saxena, Prompt Lookup Decoding, 2023 (github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# The last tokens must have stood there at least so many in a row; of several places the one that agrees for longest,
# up to MAX_MATCH, counts, and of equals the latest.
MIN_MATCH, MAX_MATCH = 2, 8
# Weight of the newest token in the acceptance, and the acceptance before the first. On a phone agent's 20 turns and on
# 14 chats 1/8 and 1/4 did alike, and so did a rate for each length of match; a least match of 3 brought less.
ACCEPTANCE_WEIGHT, FIRST_ACCEPTANCE = 1 / 8, 0.5


class PromptLookup:
    """Expects the tokens of one sequence from its own prompt and answer.

    acceptance  moving mean of how often the model chose the token that was expected, tried or not
    """

    def __init__(self) -> None:
        self.acceptance = FIRST_ACCEPTANCE
        self._ids: NDArray[np.int32] = np.zeros(0, np.int32)
        self._num_ids = 0  # of them filled
        self._size = 0  # tokens there were when last asked
        self._source: int | None = None  # of those, the one expected to come again

    def expect(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """The next num_tokens after token_ids, as far as can be told: all or none. token_ids only ever grows."""
        size = len(token_ids)
        source = self._source
        if source is not None:  # what was expected was written: go on behind it
            written = size - self._size
            source = source + written if token_ids[source : source + written] == token_ids[self._size :] else None
        source = self._search(token_ids) if source is None else source
        self._source, self._size = source, size
        if source is None or num_tokens < 1:
            return []
        found = token_ids[source : source + num_tokens]
        while len(found) < num_tokens:  # the match reaches to the end: the text repeats itself
            found += found[: num_tokens - len(found)]
        return found

    def note(self, is_expected: bool) -> None:
        """Whether the model chose the token that was expected."""
        self.acceptance += ACCEPTANCE_WEIGHT * (is_expected - self.acceptance)

    def _search(self, token_ids: list[int]) -> int | None:
        """Index of the token behind the longest and latest earlier stand of the last tokens."""
        ids, last = self._as_array(token_ids), len(token_ids) - 1
        if last < MIN_MATCH:
            return None
        places = np.flatnonzero(ids[MIN_MATCH - 1 : last] == ids[last]) + (MIN_MATCH - 1)
        for back in range(1, MAX_MATCH):
            places_so_far = places
            places = places[places >= back]
            places = places[ids[places - back] == ids[last - back]]
            if not places.size:
                if back < MIN_MATCH:
                    return None
                places = places_so_far
                break
        return int(places[-1]) + 1

    def _as_array(self, token_ids: list[int]) -> NDArray[np.int32]:
        size = len(token_ids)
        if size > self._ids.size:
            grown = np.empty(max(256, 2 * size), np.int32)
            grown[: self._num_ids] = self._ids[: self._num_ids]
            self._ids = grown
        self._ids[self._num_ids : size] = token_ids[self._num_ids :]
        self._num_ids = size
        return self._ids[:size]
