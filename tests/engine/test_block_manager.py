"""KV blocks: no block lost, none freed twice, prefixes shared only when content, model and salt are equal."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from autoglm.engine.block_manager import BlockManager, hash_block, root_hash
from autoglm.engine.sampling import SamplingParams
from autoglm.engine.sequence import Sequence
from autoglm.errors import EngineError

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
    run_through(manager, list(range(9)))
    assert run_through(manager, list(range(9))) == 0 and manager.num_cached_blocks == 0


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


class Traffic(RuleBasedStateMachine):
    """Random sequences over few tokens, so that prefixes meet often, in a pool that is always short."""

    @initialize(num_blocks=st.integers(3, 14))
    def start(self, num_blocks: int) -> None:
        self.manager = BlockManager(num_blocks, BLOCK)
        self.live: list[Sequence] = []

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
        assert cached == len(prefix) * BLOCK < len(tokens)
        assert sequence.block_table[: len(prefix)].tolist() == prefix
        self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def compute_some(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        if sequence.num_pending_tokens:
            more = data.draw(st.integers(1, sequence.num_pending_tokens))
            compute(self.manager, sequence, sequence.num_computed_tokens + more)

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
                if hash_block(p, manager._tokens[block]) == manager._hashes[block]
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
