"""KV blocks: no block lost, none freed twice, prefixes reused only when content, model and salt are equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from autoglm.engine.block_manager import BlockManager, hash_block, hash_tail, root_hash
from autoglm.engine.sampling import SamplingParams
from autoglm.engine.sequence import Sequence
from autoglm.errors import EngineError
from autoglm.media.prompt_media import Encoded, MediaJob, MediaSpan, PromptMedia

BLOCK = 4


def make_sequence(tokens: list[int], salt: bytes = b"") -> Sequence:
    sequence = Sequence("r", tokens, SamplingParams(temperature=0.0), cache_salt=salt)
    sequence.set_max_tokens(1000)
    return sequence


def compute(manager: BlockManager, sequence: Sequence, num_tokens: int | None = None) -> None:
    """Pretend the model ran."""
    sequence.num_computed_tokens = sequence.num_tokens if num_tokens is None else num_tokens
    manager.commit(sequence)


def run_through(manager: BlockManager, tokens: list[int], salt: bytes = b"") -> int:
    """Serve a prompt and free it; the tokens found in the cache."""
    sequence = make_sequence(tokens, salt)
    cached = manager.allocate(sequence)
    compute(manager, sequence)
    manager.free(sequence)
    return cached


def test_second_time_all_but_the_last_block_is_cached() -> None:
    manager = BlockManager(16, BLOCK)
    assert run_through(manager, list(range(12))) == 0
    assert run_through(manager, list(range(12))) == 8, "the last block is never reused whole: one token is computed"
    assert run_through(manager, list(range(13))) == 12
    assert run_through(manager, [*range(6), 99, *range(7, 13)]) == 4, "a block with one other token is not reused"
    assert run_through(manager, list(range(4))) == 0


def test_other_salt_or_model_misses() -> None:
    manager = BlockManager(16, BLOCK)
    run_through(manager, list(range(9)), b"a")
    assert run_through(manager, list(range(9)), b"b") == 0
    assert run_through(manager, list(range(9)), b"a") == 8
    assert root_hash("m", b"xs") != root_hash("mx", b"s")
    assert hash_block(b"p" * 32, b"t" * 16) != hash_block(b"p" * 32, b"t" * 16, b"picture")


def test_equal_hash_with_other_tokens_is_refused() -> None:
    """Even a hash collision must not give one request another's blocks."""
    manager = BlockManager(16, BLOCK)
    run_through(manager, list(range(9)))
    other = make_sequence([50 + i for i in range(9)])
    twin = make_sequence(list(range(9)))
    manager.find_prefix(twin)
    other.block_hashes = list(twin.block_hashes)  # forge the collision
    assert manager.find_prefix(twin) and manager.find_prefix(other) == []


def test_caching_can_be_switched_off() -> None:
    manager = BlockManager(16, BLOCK, enable_prefix_caching=False)
    for num_tokens in (9, 3):
        run_through(manager, list(range(num_tokens)))
        assert run_through(manager, list(range(num_tokens))) == 0 and manager.num_cached_blocks == 0


def test_leaves_and_least_recently_used_go_first() -> None:
    manager = BlockManager(6, BLOCK)
    run_through(manager, list(range(8)))  # chain A: 2 blocks
    run_through(manager, [50 + i for i in range(8)])  # chain B: 2 blocks
    run_through(manager, list(range(8)))  # A is now the younger one, and its last block was computed again
    manager_free = manager.num_free_blocks - manager.num_cached_blocks
    big = make_sequence([900 + i for i in range(4 * (manager_free + 1))])
    manager.allocate(big)  # takes every free block and one cached: B's leaf
    assert len(manager.find_prefix(make_sequence([50 + i for i in range(9)]))) == 1
    assert len(manager.find_prefix(make_sequence(list(range(9))))) == 2


def test_two_who_computed_the_same_block_end_on_one() -> None:
    manager = BlockManager(16, BLOCK)
    a, b = make_sequence(list(range(10))), make_sequence(list(range(10)))
    manager.allocate(a)
    manager.allocate(b)
    assert set(a.block_table.tolist()).isdisjoint(b.block_table.tolist())
    compute(manager, a)
    compute(manager, b)
    assert a.block_table[:2].tolist() == b.block_table[:2].tolist() and a.block_table[2] != b.block_table[2]
    assert manager.num_used_blocks == 4 and manager.num_references(int(a.block_table[0])) == 2


def test_cached_prefix_is_not_evicted_by_its_own_allocation() -> None:
    manager = BlockManager(4, BLOCK)
    run_through(manager, list(range(8)))
    sequence = make_sequence(list(range(16)))
    assert manager.can_allocate(sequence)
    assert manager.allocate(sequence) == 8 and len(set(sequence.block_table.tolist())) == 4


def test_queries_change_nothing() -> None:
    manager = BlockManager(4, BLOCK)
    run_through(manager, list(range(8)))
    before = (list(manager._free), list(manager._cached), list(manager._num_references), dict(manager._by_hash))
    sequence = make_sequence(list(range(30)))
    assert not manager.can_allocate(sequence) and not manager.can_grow(sequence)
    assert len(manager.find_prefix(sequence)) == 2
    assert manager.can_allocate(make_sequence(list(range(16)))) and manager.can_allocate(
        make_sequence([7]), num_spare=3
    )
    assert not manager.can_allocate(make_sequence([7]), num_spare=4)
    assert before == (list(manager._free), list(manager._cached), list(manager._num_references), dict(manager._by_hash))


def test_misuse_is_an_error() -> None:
    manager = BlockManager(2, BLOCK)
    sequence = make_sequence(list(range(5)))
    manager.allocate(sequence)
    with pytest.raises(EngineError, match="allocated again"):
        manager.allocate(sequence)
    with pytest.raises(EngineError, match="than are free"):
        manager.allocate(make_sequence([1]))
    for token in range(4):
        sequence.append(token)
    with pytest.raises(EngineError, match="than are free"):
        manager.grow(sequence)
    stolen = int(sequence.block_table[0])
    manager.free(sequence)
    with pytest.raises(EngineError, match="freed twice"):
        manager._release(stolen)


# --- tails: the partly filled last block of a sequence that ended; of TEN tokens it holds two ---

TEN = list(range(10))


def tail_of(manager: BlockManager, tokens: list[int] = TEN) -> int:
    """Serve a prompt; the block its last tokens lie in."""
    sequence = make_sequence(tokens)
    manager.allocate(sequence)
    compute(manager, sequence)
    block_id = int(sequence.block_table[-1])
    manager.free(sequence)
    return block_id


@pytest.mark.parametrize(
    ("tokens", "cached"),
    [
        ([*TEN, 10, 11, 12, 13], 10),
        ([*TEN, 10], 10),
        (TEN, 9),  # one token is computed
        (TEN[:9], 8),
        ([*TEN[:9], 50, 51], 9),
        ([*TEN[:8], 50, 9], 8),
        ([*TEN[:7], 50, 8, 9, 10], 4),  # another parent
    ],
)
def test_the_next_turn_goes_on_in_the_block_the_last_one_ended_in(tokens: list[int], cached: int) -> None:
    manager = BlockManager(16, BLOCK)
    tail = tail_of(manager)
    sequence = make_sequence(tokens)
    assert manager.allocate(sequence) == sequence.num_computed_tokens == cached
    assert (tail in sequence.block_table.tolist()) == (cached > 8)
    assert sequence.num_blocks == manager.num_used_blocks == manager.blocks_for(len(tokens))


def test_a_block_filled_from_a_tail_is_shared_like_any() -> None:
    manager = BlockManager(16, BLOCK)
    tail = tail_of(manager)
    sequence = make_sequence(list(range(13)))
    manager.allocate(sequence)
    compute(manager, sequence)
    twin = make_sequence(list(range(13)))
    assert manager.allocate(twin) == 12
    assert twin.block_table[2] == sequence.block_table[2] == tail and manager.num_references(tail) == 2


def test_a_tail_has_one_owner() -> None:
    manager = BlockManager(16, BLOCK)
    tail = tail_of(manager)
    first, second = make_sequence([*TEN, 10]), make_sequence([*TEN, 10])
    assert (manager.allocate(first), manager.allocate(second)) == (10, 8)
    assert first.block_table[2] == tail != second.block_table[2] and manager.num_references(tail) == 1
    manager.free(first)
    assert run_through(manager, [*TEN, 10]) == 10, "what the first had of it is a tail again"


def test_the_newest_tail_takes_the_place_of_an_older_one() -> None:
    manager = BlockManager(16, BLOCK)
    older = tail_of(manager)
    newer = tail_of(manager, [*TEN[:8], 50, 51])
    assert older in manager._free and newer in manager._cached and manager.num_cached_blocks == 3
    assert run_through(manager, [*TEN[:8], 50, 51, 52]) == 10
    assert run_through(manager, [*TEN[:8], 7]) == 8
    assert manager.num_evictions == 0


def test_a_tail_is_evicted_before_its_parents() -> None:
    manager = BlockManager(3, BLOCK)
    tail_of(manager)
    manager.allocate(other := make_sequence([50]))
    manager.free(other)
    assert manager.num_evictions == 1 and len(manager.find_prefix(make_sequence(TEN))) == 2
    assert run_through(manager, [*TEN, 10]) == 8


def test_a_tail_is_not_evicted_by_its_own_allocation() -> None:
    """It is one of the two blocks this sequence lacks, and the least recently used of a full pool."""
    manager = BlockManager(4, BLOCK)
    tail = tail_of(manager)
    run_through(manager, [50, 51, 52])
    sequence = make_sequence(list(range(16)))
    assert manager.can_allocate(sequence) and not manager.can_allocate(sequence, num_spare=1)
    assert manager.allocate(sequence) == 10 and sequence.block_table[2] == tail
    assert len(set(sequence.block_table.tolist())) == 4
    assert manager.num_free_blocks == 0 and manager.num_evictions == 1


def test_short_prompts_have_the_root_for_a_parent_each_salt_its_own() -> None:
    manager = BlockManager(16, BLOCK)
    run_through(manager, [1, 2, 3], b"a")
    assert run_through(manager, [1, 2, 3, 4], b"b") == 0
    assert run_through(manager, [1, 2, 3, 4], b"a") == 3


def test_only_what_was_computed_is_claimed() -> None:
    """Neither tokens that are still to be run nor what drafts left in the block."""
    manager = BlockManager(16, BLOCK)
    sequence = make_sequence([*TEN, 10, 11])
    manager.allocate(sequence)
    compute(manager, sequence, 9)
    manager.free(sequence)
    assert run_through(manager, [*TEN, 10, 11]) == 9
    uncommitted = make_sequence([70, 71, 72, 73, 74, 75])
    manager.allocate(uncommitted)
    uncommitted.num_computed_tokens = 6  # its first block was not made known
    num_cached = manager.num_cached_blocks
    manager.free(uncommitted)
    assert manager.num_cached_blocks == num_cached and run_through(manager, [70, 71, 72]) == 0


def test_a_preempted_sequence_takes_its_own_tail_back() -> None:
    manager = BlockManager(16, BLOCK)
    sequence = make_sequence(TEN)
    manager.allocate(sequence)
    compute(manager, sequence, 7)
    manager.free(sequence)
    assert manager.allocate(sequence) == 7 and sequence.num_hashed_blocks == 1


def test_a_prefix_that_is_built_ahead_leaves_tails_alone() -> None:
    manager = BlockManager(16, BLOCK)
    tail_of(manager)
    ahead = Sequence("next", [*TEN, 10, 11, 12], SamplingParams(), is_prebuild=True)
    assert manager.allocate(ahead) == 8
    compute(manager, ahead, 8)
    manager.free(ahead)
    assert run_through(manager, [*TEN, 10]) == 10


def with_picture(tokens: list[int], start: int, end: int, number: int = 1) -> Sequence:
    """Of its tokens start to end stand for a picture."""

    def encode(slice_s: float) -> Generator[None, float | None, Encoded]:
        raise NotImplementedError
        yield

    sequence = make_sequence(tokens)
    job = MediaJob(bytes([number]) * 32, (MediaSpan(start, end),), encode)
    sequence.media = PromptMedia([job], np.zeros((3, len(tokens)), np.int32))
    return sequence


def served(manager: BlockManager, sequence: Sequence) -> int:
    cached = manager.allocate(sequence)
    compute(manager, sequence)
    manager.free(sequence)
    return cached


def test_no_tail_holds_a_picture() -> None:
    """Not even the words that stand with it in the block: its key is not theirs, and where they stand hangs on it."""
    for start, end in ((8, 9), (9, 10), (6, 9)):
        manager = BlockManager(16, BLOCK)
        served(manager, with_picture(TEN, start, end))
        assert served(manager, with_picture([*TEN, 10], start, end)) == min(start, 8) // BLOCK * BLOCK + 4 * (start < 8)
        assert manager.num_cached_blocks < 4
        assert served(manager, make_sequence([*TEN, 10])) == start // BLOCK * BLOCK


def test_words_behind_a_picture_and_before_the_next_are_a_tail_like_others() -> None:
    manager = BlockManager(16, BLOCK)
    served(manager, with_picture(TEN, 2, 7))
    assert served(manager, with_picture([*TEN, 10], 2, 7, number=2)) == 0, "of another picture"
    manager = BlockManager(16, BLOCK)
    served(manager, with_picture(TEN, 2, 7))
    assert served(manager, with_picture([*TEN, 10], 2, 7)) == 10
    manager = BlockManager(16, BLOCK)
    served(manager, make_sequence(TEN))
    assert served(manager, with_picture([*TEN, 9, 9, 9, 11], 10, 13)) == 10


def test_equal_ids_that_stand_for_a_picture_are_no_words() -> None:
    manager = BlockManager(16, BLOCK)
    served(manager, make_sequence(TEN))
    assert served(manager, with_picture([*TEN, 11], 9, 10)) == 8


class Traffic(RuleBasedStateMachine):
    """Random sequences over few tokens, so that prefixes meet often, in a pool that is always short.

    written  what lies in each slot: all tokens up to the one that wrote it; of a draft that was not taken, none
    """

    @initialize(num_blocks=st.integers(3, 14))
    def start(self, num_blocks: int) -> None:
        self.manager = BlockManager(num_blocks, BLOCK)
        self.live: list[Sequence] = []
        self.written: dict[tuple[int, int], tuple[bytes, list[int]]] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=30), salt=st.sampled_from([b"", b"s"]))
    def allocate(self, tokens: list[int], salt: bytes) -> None:
        sequence = make_sequence(tokens, salt)
        prefix = self.manager.find_prefix(sequence)
        assert self.manager.num_known_blocks(sequence) == len(prefix)
        if not self.manager.can_allocate(sequence):
            needed = self.manager.blocks_for(len(tokens))
            shared = sum(1 for b in prefix if self.manager.num_references(b))
            assert needed - shared > self.manager.num_free_blocks or needed > self.manager.num_blocks
            return
        cached = self.manager.allocate(sequence)
        assert len(prefix) * BLOCK <= cached < min(len(tokens), (len(prefix) + 1) * BLOCK)
        assert sequence.block_table[: len(prefix)].tolist() == prefix
        self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def compute_some(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        if sequence.num_pending_tokens:
            more = data.draw(st.integers(1, sequence.num_pending_tokens))
            end = sequence.num_computed_tokens + more
            for place in range(sequence.num_computed_tokens, sequence.num_blocks * BLOCK):
                content = sequence.token_ids[: place + 1] if place < end else []
                self.written[int(sequence.block_table[place // BLOCK]), place % BLOCK] = sequence.cache_salt, content
            compute(self.manager, sequence, end)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        sequence.append(token)
        if self.manager.can_grow(sequence):
            self.manager.grow(sequence)
        else:  # preempted
            self.manager.free(sequence)
            self.live.remove(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self.manager.free(sequence)
        assert sequence.num_blocks == 0 and sequence.num_computed_tokens == 0
        self.live.remove(sequence)

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "manager"):
            return
        manager = self.manager
        held = Counter(b for s in self.live for b in s.block_table.tolist())
        assert [manager.num_references(b) for b in range(manager.num_blocks)] == [
            held[b] for b in range(manager.num_blocks)
        ]
        free, cached = list(manager._free), list(manager._cached)
        assert sorted([*free, *cached, *held]) == list(range(manager.num_blocks)), "each block in exactly one place"
        assert manager.num_free_blocks == len(free) + len(cached)
        assert manager.num_used_blocks + manager.num_free_blocks == manager.num_blocks
        assert sorted(manager._by_hash.values()) == [b for b in range(manager.num_blocks) if manager._hashes[b]]
        assert all(manager._hashes[b] is None for b in free) and all(manager._hashes[b] for b in cached)
        assert all(len(manager._tokens[b]) == 4 * BLOCK for b in manager._by_hash.values() if held[b]), "a tail is held"

    @invariant()
    def what_counts_as_computed_lies_there(self) -> None:
        """Nobody claims what was never written, is another's, or was overwritten since."""
        for sequence in getattr(self, "live", []):
            for place in range(sequence.num_computed_tokens):
                slot = int(sequence.block_table[place // BLOCK]), place % BLOCK
                assert self.written[slot] == (sequence.cache_salt, sequence.token_ids[: place + 1])

    @invariant()
    def every_known_block_has_its_parent(self) -> None:
        """No orphans: what is cached can be found from its root, and children leave before parents."""
        if not hasattr(self, "manager"):
            return
        manager, age = self.manager, {b: i for i, b in enumerate(self.manager._cached)}
        roots = {root_hash("", salt) for salt in (b"", b"s")}
        for block in manager._by_hash.values():
            parents = [
                p
                for p in (*roots, *manager._by_hash)
                if manager._hashes[block] in (hash_block(p, manager._tokens[block]), hash_tail(p))
            ]
            assert parents, "an orphan"
            parent = manager._by_hash.get(parents[0])
            if parent in age:
                assert block in age and age[block] < age[parent]

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            for sequence in self.live:
                self.manager.free(sequence)
            assert self.manager.num_free_blocks == self.manager.num_blocks


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
