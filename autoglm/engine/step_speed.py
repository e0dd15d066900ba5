"""What steps take on this machine, measured while serving: room for prompts, cost of a decode step by its rows."""

from __future__ import annotations

# What a step in which somebody decodes may take for the prompts of others, the tokens it may have however slow, and
# those it may have before the machine's speed is known.
PREFILL_BESIDE_S, MIN_PREFILL_ROOM, FIRST_PREFILL_ROOM = 0.1, 16, 64
# Decode steps after which a cost that was not measured again is forgotten: the machine may have been busy then.
FORGET_AFTER = 1024


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
        self._costs: dict[int, float] = {}  # s, by rows
        self._fresh: set[int] = set()
        self._num_decode_steps = 0

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

        One never run, or not lately, is taken to cost no more than the next smaller one, so that it is tried once.
        """
        cost = self._costs.get(num_rows)
        if cost is None:
            return []
        costs = [cost]
        for rows in range(num_rows + 1, num_rows + num_more + 1):
            cost = self._costs.get(rows, cost)
            costs.append(cost)
        return costs

    def _note_cost(self, num_rows: int, seconds: float) -> None:
        mean = self._costs.get(num_rows, seconds)
        # What the system took away in the middle of a step must not look like the step's own cost for long.
        self._costs[num_rows] = mean + 0.2 * (min(seconds, 2 * mean) - mean)
        self._fresh.add(num_rows)
        self._num_decode_steps += 1
        if self._num_decode_steps % FORGET_AFTER == 0:
            self._costs = {rows: cost for rows, cost in self._costs.items() if rows in self._fresh}
            self._fresh.clear()
