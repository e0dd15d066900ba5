"""Which sequences run this step and how many tokens; preemption.

First come, first served, with a token budget per step. In this order:
 1. every running sequence gets the blocks its new tokens need, oldest first; when the pool is empty the youngest is
    preempted: its blocks go, its tokens and generator stay, it returns to the head of the line and is recomputed
    (from the prefix cache where that still holds it), so its answer is the same;
 2. every decoding sequence gets its one token;
 3. prefill chunks by age. While others are waiting for their first token, a prompt that would eat the whole step
    leaves a quarter of it to them: it is slowed by at most a third, they are not locked out for minutes;
 4. waiting sequences are admitted in order of arrival, each with blocks for all its tokens. One that does not fit
    holds up those behind it. One whose next prompt block another prefill is just computing waits for it and is
    passed over meanwhile: n answers to one prompt, or many agents with one system prompt, prefill it once.
A sequence whose media are not encoded yet is passed over like that too, and tokens that see each other both ways are
prefilled in one step. While others decode, prompts take only prefill_room tokens of a step, so that nobody's stream
stands still for a long prompt, and as many times that as people wait for their first token, up to MAX_SHARES: steps of
few tokens are the slow way through many prompts. Tokens that have to be whole take what they need. No more sequences
run than the budget has tokens, so each of them moves on in every step.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable

from msgspec import Struct, field

from autoglm.engine.block_manager import BlockManager
from autoglm.engine.sequence import Sequence, SequenceState

LATER_PROMPTS_SHARE = 4  # 1 / share of the budget
# 16 people at once, half of them with a picture (9B shapes, 8 layers, a model of the step's time): p95 of the time to
# first token 70 s with 1, 55 with 2, 51 with 4, 49 with 8; the worst gap of a stream 0.2, 0.3, 0.6 and 1.0 s.
MAX_SHARES = 4


class Scheduled(Struct):
    """num_scheduled_tokens of the sequence run in this step, from num_computed_tokens on.

    expected     what prompt lookup expects to follow; the first num_drafted of it are run behind them (drafting.py)
    """

    sequence: Sequence
    num_scheduled_tokens: int
    expected: list[int] = field(default_factory=list)
    num_drafted: int = 0

    @property
    def num_run_tokens(self) -> int:
        """Rows of the step."""
        return self.num_scheduled_tokens + self.num_drafted

    @property
    def wants_logits(self) -> bool:
        """Whether the step reaches the sequence's last token, so that the next one can be chosen."""
        return self.num_scheduled_tokens == self.sequence.num_pending_tokens


class Scheduler:
    """The line of waiting sequences and the set of running ones, both in order of arrival."""

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        is_encoded: Callable[[Sequence], bool] = lambda sequence: True,
    ) -> None:
        """is_encoded: whether a waiting sequence has the embeddings it needs; it asks for them if not."""
        self.block_manager = block_manager
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_running = min(max_num_seqs, max_num_batched_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefill_room = max_num_batched_tokens  # a share of a step in which somebody decodes
        self._num_arrived = 0
        self._is_encoded = is_encoded
        self._refused: tuple[Sequence, int, int] | None = None

    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self.running or self.waiting)

    @property
    def num_shares(self) -> int:
        """Shares of a step that go to prompts and media: one for each who waits for the first token and has a place."""
        num_decoding = sum(sequence.num_pending_tokens == 1 for sequence in self.running)
        num_places = self.max_num_running - len(self.running)
        num_unanswered = len(self.running) - num_decoding + min(len(self.waiting), num_places)
        return min(max(num_unanswered, 1), MAX_SHARES)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the line."""
        sequence.order = self._num_arrived
        self._num_arrived += 1
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks at once."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED
        self.block_manager.free(sequence)

    def schedule(self) -> list[Scheduled]:
        """Choose this step's work; the blocks for it are in the tables when this returns."""
        self._grow_running()
        budget = self.max_num_batched_tokens
        scheduled: list[Scheduled] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            if sequence.num_pending_tokens == 1:
                scheduled.append(Scheduled(sequence, 1))
            else:
                prefilling.append(sequence)
        budget -= len(scheduled)
        if prefilling or self.waiting:
            self._schedule_prefills(scheduled, prefilling, budget)
        return scheduled

    def _grow_running(self) -> None:
        """Step 1: blocks for new tokens, preempting from the young end."""
        manager, index = self.block_manager, 0
        while index < len(self.running):
            sequence = self.running[index]
            if sequence.num_tokens > sequence.num_blocks * manager.block_size:
                while not manager.can_grow(sequence) and self.running[-1] is not sequence:
                    self._preempt(self.running[-1])
                if not manager.can_grow(sequence):
                    self._preempt(sequence)
                    return
                manager.grow(sequence)
            index += 1

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.block_manager.free(sequence)
        sequence.state = SequenceState.WAITING
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        place = sum(1 for other in self.waiting if other.order < sequence.order)
        self.waiting.insert(place, sequence)

    def _schedule_prefills(self, scheduled: list[Scheduled], prefilling: list[Sequence], budget: int) -> None:
        """Steps 3 and 4."""
        limit = self.max_num_batched_tokens
        if scheduled:
            limit = min(self.prefill_room * self.num_shares, limit)
        spare = max(0, budget - max(limit, len(prefilling) + 1))  # for what has to be whole alone
        budget -= spare
        later_prompts = limit // LATER_PROMPTS_SHARE
        first: Scheduled | None = None
        for served, sequence in enumerate(prefilling, start=1):
            unserved = len(prefilling) - served  # each keeps a token of the budget
            others_wait = unserved > 0 or (bool(self.waiting) and len(self.running) < self.max_num_running)
            left = later_prompts if first is None and others_wait else 0
            chunk = self._chunk(sequence, budget - unserved, left, spare)
            if not chunk:  # its next tokens see each other both ways and have no room in this step
                continue
            item = Scheduled(sequence, chunk)
            first = first or item
            scheduled.append(item)
            budget -= chunk
        index = 0
        while budget > 0 and index < min(len(self.waiting), self.max_num_running):
            if len(self.running) >= self.max_num_running:
                break
            sequence = self.waiting[index]
            if self._is_being_computed(sequence, prefilling) or not self._is_encoded(sequence):
                index += 1
                continue
            if not self._can_admit(sequence):
                break
            del self.waiting[index]
            self._admit(sequence)
            prefilling.append(sequence)
            others_wait = bool(self.waiting) and len(self.running) < self.max_num_running
            left = later_prompts if first is None and others_wait else 0
            chunk = self._chunk(sequence, budget, left, spare)
            if not chunk:
                continue
            item = Scheduled(sequence, chunk)
            first = first or item
            scheduled.append(item)
            budget -= chunk
        if first is not None and budget > 0:  # nobody took the share: the oldest goes on with it
            first.num_scheduled_tokens = self._chunk(first.sequence, first.num_scheduled_tokens + budget, 0, spare)

    def _chunk(self, sequence: Sequence, room: int, left: int, spare: int) -> int:
        """Tokens of a prefill to run now. left: of the room, for others; spare: beyond it, for what has to be whole."""
        if room < 1:
            return 0
        if sequence.num_pending_tokens <= room:
            return sequence.num_pending_tokens
        start, media = sequence.num_computed_tokens, sequence.media
        for share in (room - min(left, room - 1), room):
            count = share if media is None else media.whole_spans(start, start + share) - start
            if count:
                return count
        assert media is not None
        count = media.whole_end(start) - start
        return count if count <= room + spare else 0

    def _is_being_computed(self, sequence: Sequence, prefilling: list[Sequence]) -> bool:
        """Whether another prefill will soon put the next block this one lacks into the prefix cache."""
        manager = self.block_manager
        if not prefilling or not manager.enable_prefix_caching:
            return False
        index = manager.num_known_blocks(sequence)
        if index >= (sequence.num_tokens - 1) // manager.block_size:
            return False
        wanted = manager.chain_hash(sequence, index)
        return any(
            other.num_hashed_blocks <= index < other.num_tokens // manager.block_size
            and manager.chain_hash(other, index) == wanted
            for other in prefilling
        )

    def _can_admit(self, sequence: Sequence) -> bool:
        """Whether the head of the line fits now. Looking its prefix up costs O(prompt), so a refusal stands until
        there are more free blocks or fewer running sequences than at that time."""
        num_free, num_running = self.block_manager.num_free_blocks, len(self.running)
        refused = self._refused
        if refused is not None and refused[0] is sequence and num_free <= refused[1] and num_running >= refused[2]:
            return False
        can = self.block_manager.can_allocate(sequence, num_spare=num_running)
        self._refused = None if can else (sequence, num_free, num_running)
        return can

    def _admit(self, sequence: Sequence) -> None:
        num_cached = self.block_manager.allocate(sequence)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = num_cached
        sequence.state = SequenceState.RUNNING
        bisect.insort(self.running, sequence, key=lambda other: other.order)
