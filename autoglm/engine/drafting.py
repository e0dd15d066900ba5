"""Drafts of a decode step: which expected tokens are worth a row of it, so that several are chosen in one step.

A step of a few rows costs less than as many steps of one, since it reads the weights once. So the tokens that prompt
lookup expects are run behind a sequence's last one, each with its logits. Tokens are then chosen row by row as ever;
the first that is not the drafted one ends it, and what was written for the rest is overwritten later. A row's logits do
not depend on how many rows there are: the answer is the same with drafts and without, and only the time it takes
depends on what was measured.

How many: the j-th expected token is taken to come with probability a ** j, a being the sequence's moving mean of
expectations that came true. Rows go to the likeliest drafts of all sequences, as many as make expected tokens / cost of
the step largest, costs by rows as StepSpeed measured them. Steps in which a prompt is read carry no drafts.
"""

from __future__ import annotations

from autoglm.engine.block_manager import BlockManager
from autoglm.engine.scheduler import Scheduled
from autoglm.engine.step_speed import StepSpeed

# Rows of a step with drafts. Beyond some 16 a step is bound by arithmetic and every row costs its full price.
MAX_ROWS = 32


class Drafter:
    """Adds drafts to scheduled steps.

    max_tokens  the most for one sequence in one step; 0: none
    """

    def __init__(
        self, block_manager: BlockManager, speed: StepSpeed, max_tokens: int, max_num_batched_tokens: int
    ) -> None:
        self.max_tokens = max_tokens
        self._manager, self._speed = block_manager, speed
        self._max_rows = min(MAX_ROWS, max_num_batched_tokens)

    def add_drafts(self, scheduled: list[Scheduled]) -> None:
        """Fill in expected and num_drafted where every sequence decodes, with blocks for the drafts in the tables."""
        if not self.max_tokens or not all(item.num_scheduled_tokens == 1 and item.wants_logits for item in scheduled):
            return
        chances: list[tuple[float, Scheduled]] = []
        for item in scheduled:
            sequence = item.sequence
            # The last token of an answer is never run, and one comes out of each step without a draft.
            room = sequence.max_tokens - sequence.num_output_tokens - 1
            item.expected = sequence.lookup.expect(sequence.token_ids, min(self.max_tokens, room))
            chance = acceptance = sequence.lookup.acceptance
            for _ in item.expected:
                chances.append((chance, item))
                chance *= acceptance
        chances.sort(key=lambda pair: -pair[0])
        for _, item in chances[: self._num_paying(len(scheduled), [chance for chance, _ in chances])]:
            item.num_drafted += 1
        for item in scheduled:
            if item.num_drafted:
                item.num_drafted = self._with_blocks(item, num_spare=len(scheduled))

    def _num_paying(self, num_rows: int, chances: list[float]) -> int:
        """How many of the drafts, by falling chance, make the most expected tokens a second."""
        costs = self._speed.decode_costs(num_rows, min(len(chances), max(0, self._max_rows - num_rows)))
        best, num_best, tokens = 0.0, 0, float(num_rows)
        for num_drafts, cost in enumerate(costs):
            tokens += chances[num_drafts - 1] if num_drafts else 0.0
            if tokens > best * cost:
                best, num_best = tokens / max(cost, 1e-9), num_drafts
        return num_best

    def _with_blocks(self, item: Scheduled, num_spare: int) -> int:
        """Make room for the drafts, never at the cost of a block that somebody needs soon; those that have room."""
        sequence, manager = item.sequence, self._manager
        missing = manager.blocks_for(sequence.num_tokens + item.num_drafted) - sequence.num_blocks
        if 0 < missing <= manager.num_free_blocks - num_spare:
            manager.grow(sequence, num_drafted=item.num_drafted)
        return min(item.num_drafted, sequence.num_blocks * manager.block_size - sequence.num_tokens)
