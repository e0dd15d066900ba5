"""Stop strings over streamed text: no part of one is ever let out, and nothing else is kept back for long.

One Knuth-Morris-Pratt automaton per string, so a character costs O(1) whatever the strings look like. Matching is by
character, hence independent of how the text was cut into tokens: the answer ends where the first stop string is
completed; of several completed by the same character the longest counts.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Feed text, get back what is safe to send."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._patterns = tuple(stop)
        self._failures = [_failure_table(pattern) for pattern in self._patterns]
        self._matched = [0] * len(self._patterns)  # characters of each pattern the text ends with
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take text in, return what can be sent; `found` names the stop string once one is complete."""
        if not self._patterns or not text:
            return text
        buffer = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            longest = 0
            for i, pattern in enumerate(self._patterns):
                k = self._matched[i]
                while k and pattern[k] != char:
                    k = self._failures[i][k - 1]
                if pattern[k] == char:
                    k += 1
                if k == len(pattern):
                    if k > longest:
                        longest, self.found = k, pattern
                    k = 0
                self._matched[i] = k
            if longest:
                self._held = ""
                return buffer[: position - longest]
        keep = len(buffer) - max(self._matched)
        self._held = buffer[keep:]
        return buffer[:keep]

    def flush(self) -> str:
        """What was held back, when the answer ended for another reason."""
        held, self._held = self._held, ""
        return held


def _failure_table(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is a prefix too."""
    table = [0] * len(pattern)
    k = 0
    for i in range(1, len(pattern)):
        while k and pattern[i] != pattern[k]:
            k = table[k - 1]
        if pattern[i] == pattern[k]:
            k += 1
        table[i] = k
    return table
