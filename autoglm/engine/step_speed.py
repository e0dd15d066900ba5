"""What steps take on this machine, measured while serving: room for prompts, cost of a decode step by its rows."""

from __future__ import annotations

# What a step in which somebody decodes may take for the prompts of others, the tokens it may have however slow, and
# those it may have before the machine's speed is known.
PREFILL_BESIDE_S, MIN_PREFILL_ROOM, FIRST_PREFILL_ROOM = 0.1, 16, 64
# A cost is forgotten after so many times its own time spent in other decode steps: the machine may have been busy when
# it was measured, and trying it again takes at most that share.
FORGET_AFTER = 64


class StepSpeed:
    """Moving means over the steps of one engine.

    prefill_room  tokens that prompts may have of a step in which somebody decodes
    decode_s      what the last step without prompts took
    """

    def __init__(self, max_num_batched_tokens: int) -> None:
        self.prefill_room = min(FIRST_PREFILL_ROOM, max_num_batched_tokens)
        self.decode_s = 0.0
        self._max_num_batched_tokens = max_num_batched_tokens
        self._token_s: float | None = None
        self._costs: dict[int, tuple[float, float]] = {}  # by rows: mean, and when measured on the clock below
        self._clock_s = 0.0  # spent in decode steps

    def note(self, num_tokens: int, num_seqs: int, seconds: float, *, num_drafted: int = 0) -> None:
        """A step of num_tokens, num_drafted of them drafts, for num_seqs sequences took so long."""
        if num_tokens - num_drafted == num_seqs:
            self.decode_s = seconds
            self._note_cost(num_tokens, seconds)
        if num_drafted or num_tokens < MIN_PREFILL_ROOM:
            return
        if self._token_s is None:
            self._token_s = seconds / num_tokens
        self._token_s += 0.3 * (seconds / num_tokens - self._token_s)
        fitted = int(PREFILL_BESIDE_S / max(self._token_s, 1e-9))
        self.prefill_room = min(max(MIN_PREFILL_ROOM, fitted), self._max_num_batched_tokens)

    def decode_costs(self, num_rows: int, num_more: int) -> list[float]:
        """Seconds of a decode step of num_rows rows, and of up to num_more more; [] if no such step is known.

        One never run, or not lately, is taken to be as cheap as it can be, so that it is tried: it costs no less than
        the next smaller one known, and a row of it no less than one of the next larger.
        """
        known = [self._known_cost(rows) for rows in range(num_rows, num_rows + num_more + 1)]
        if known[0] is None:
            return []
        costs: list[float] = []
        for cost in known:
            costs.append(costs[-1] if cost is None else cost)
        row_s = 0.0
        for index in range(num_more, 0, -1):
            cost = known[index]
            if cost is None:
                costs[index] = max(costs[index], row_s * (num_rows + index))
            else:
                row_s = cost / (num_rows + index)
        return costs

    def _known_cost(self, num_rows: int) -> float | None:
        mean, measured_s = self._costs.get(num_rows, (0.0, -1.0))
        return mean if self._clock_s - measured_s <= FORGET_AFTER * mean else None

    def _note_cost(self, num_rows: int, seconds: float) -> None:
        mean = self._known_cost(num_rows)
        mean = seconds if mean is None else mean
        # What the system took away in the middle of a step must not look like the step's own cost for long.
        mean += 0.2 * (min(seconds, 2 * mean) - mean)
        self._clock_s += seconds
        self._costs[num_rows] = (mean, self._clock_s)
