"""KV blocks: allocate, share by prefix hash, evict, free; no arrays.

A full block is known by a SHA-256 chain: hash(parent hash, token ids, hashes of the media in it), whose root is the
hash of the model id and the request's salt. Equal hashes therefore mean equal keys and values (kernels are
row-invariant), and the token ids are compared as well. A block is in one of three places:

    used       at least one sequence holds it (reference count = number of tables it is in)
    cached     nobody holds it, its content is known: least recently used first to go
    free       nobody holds it, content unknown

The last block of a sequence is seldom full when it ends. It stays as the *tail* of the blocks before it, known with the
tokens computed in it: one tail to a parent, the newest. The next sequence that goes on from that parent with some of
these tokens takes the block for its own and writes on behind those that are equal. So full blocks are shared and only
read, and a partly filled one has one owner, or none. A tail holds text alone, and what is there of drafts that were not
taken is no part of it.

A sequence frees its last block first, so among blocks freed together children go before parents. Whoever holds a
block holds its parents, hence a cached block is always evicted before its parent is: leaves first, no orphans. That
needs one block per content, so two sequences that computed the same block are put on one (commit).
Left out: blocks on disk, and copying the head of a block that others go on with.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import sha256

from autoglm.engine.sequence import Sequence
from autoglm.errors import EngineError


def hash_block(parent: bytes, token_bytes: bytes, mm_hash: bytes = b"") -> bytes:
    """One link of the chain: 32 bytes.

    token_bytes  the block's ids as int32, native order
    mm_hash      identity of the media whose placeholders lie in the block; b"" for text
    """
    digest = sha256(parent)
    digest.update(token_bytes)
    digest.update(mm_hash)  # parent and tokens have fixed sizes: no two inputs run together
    return digest.digest()


def hash_tail(parent: bytes) -> bytes:
    """Under which a parent's tail is known, whatever its tokens; full blocks are hashed with theirs."""
    return hash_block(parent, b"")


def root_hash(model_id: str, salt: bytes) -> bytes:
    """Where the chains of one model and salt start."""
    name = model_id.encode()
    return sha256(len(name).to_bytes(8, "little") + name + salt).digest()


class BlockManager:
    """Owns the numbers of all KV blocks; who holds which, and which content is worth keeping."""

    def __init__(
        self, num_blocks: int, block_size: int, *, model_id: str = "", enable_prefix_caching: bool = True
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_evictions = 0
        self.peak_used_blocks = 0
        self.num_prebuilt_hits = 0  # blocks computed ahead of any request that one then came for
        self._model_id = model_id
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._num_references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._tokens: list[bytes] = [b""] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._prebuilt: set[int] = set()  # those nobody came for yet

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now, those with cached content included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks nobody holds whose content is kept for reuse."""
        return len(self._cached)

    @property
    def num_used_blocks(self) -> int:
        """Blocks held by sequences."""
        return self.num_blocks - self.num_free_blocks

    def num_references(self, block_id: int) -> int:
        """Tables the block is in."""
        return self._num_references[block_id]

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold num_tokens."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks whose content equals the head of the sequence; at least its last token is left to compute."""
        if not self.enable_prefix_caching:
            return []
        found: list[int] = []
        for index in range((sequence.num_tokens - 1) // self.block_size):
            block_id = self._by_hash.get(self.chain_hash(sequence, index))
            if block_id is None or self._tokens[block_id] != self._token_bytes(sequence, index):
                break
            found.append(block_id)
        return found

    def num_known_blocks(self, sequence: Sequence) -> int:
        """Length of find_prefix by hashes alone, in O(log blocks): a known block's parent is known too."""
        low, high = 0, (sequence.num_tokens - 1) // self.block_size if self.enable_prefix_caching else 0
        while low < high:
            middle = (low + high) // 2
            if self.chain_hash(sequence, middle) in self._by_hash:
                low = middle + 1
            else:
                high = middle
        return low

    def can_allocate(self, sequence: Sequence, *, num_spare: int = 0) -> bool:
        """Whether allocate would work and leave num_spare blocks to hand out."""
        num_needed = self.blocks_for(sequence.num_tokens) + num_spare
        if num_needed <= self.num_free_blocks:
            return True
        if num_needed > self.num_blocks:
            return False
        shared = sum(1 for block_id in self.find_prefix(sequence) if self._num_references[block_id])
        return num_needed - shared <= self.num_free_blocks

    def allocate(self, sequence: Sequence) -> int:
        """Give the sequence blocks for all its tokens, the cached head of it shared; tokens that need no computing.

        Raises EngineError if there are not enough blocks (ask can_allocate first) or it holds some already.
        """
        if sequence.num_blocks:
            raise EngineError("a sequence that holds KV blocks was allocated again")
        prefix = self.find_prefix(sequence)
        num_new = self.blocks_for(sequence.num_tokens) - len(prefix)
        if num_new > self.num_free_blocks - sum(1 for b in prefix if not self._num_references[b]):
            raise EngineError("more KV blocks were asked for than are free")
        for block_id in prefix:  # first, so that taking new blocks cannot evict them
            self._hold(block_id)
        tail, num_equal = self._find_tail(sequence, len(prefix))
        for block_id in tail:  # likewise
            self._claim(block_id)
        if not sequence.is_prebuild:
            self.num_prebuilt_hits += len(self._prebuilt.intersection(prefix))
            self._prebuilt.difference_update(prefix)
        sequence.append_blocks(prefix + tail + [self._take() for _ in range(num_new - len(tail))])
        sequence.num_hashed_blocks = len(prefix)
        sequence.num_computed_tokens = len(prefix) * self.block_size + num_equal
        self.peak_used_blocks = max(self.peak_used_blocks, self.num_used_blocks)
        return sequence.num_computed_tokens

    def can_grow(self, sequence: Sequence) -> bool:
        """Whether grow would work."""
        return self.blocks_for(sequence.num_tokens) - sequence.num_blocks <= self.num_free_blocks

    def grow(self, sequence: Sequence, *, num_drafted: int = 0) -> None:
        """Add the blocks that the sequence's tokens need by now, and so many drafts behind them."""
        num_new = self.blocks_for(sequence.num_tokens + num_drafted) - sequence.num_blocks
        if num_new > self.num_free_blocks:
            raise EngineError("more KV blocks were asked for than are free")
        if num_new > 0:
            sequence.append_blocks([self._take() for _ in range(num_new)])
            self.peak_used_blocks = max(self.peak_used_blocks, self.num_used_blocks)

    def commit(self, sequence: Sequence) -> None:
        """Make the blocks that were filled by a step that succeeded known to later sequences.

        A block another sequence filled alike in the meantime takes the place of this one's own.
        """
        if not self.enable_prefix_caching:
            return
        num_full = sequence.num_computed_tokens // self.block_size
        while sequence.num_hashed_blocks < num_full:
            index = sequence.num_hashed_blocks
            block_hash = self.chain_hash(sequence, index)
            own = int(sequence.block_table[index])
            known = self._by_hash.get(block_hash)
            if known is None:
                self._know(own, block_hash, self._token_bytes(sequence, index))
                if sequence.is_prebuild:
                    self._prebuilt.add(own)
            elif known != own and self._tokens[known] == self._token_bytes(sequence, index):
                self._hold(known)
                sequence.replace_block(index, known)
                self._release(own)
            sequence.num_hashed_blocks += 1

    def free(self, sequence: Sequence) -> None:
        """Take all blocks from the sequence, last first; known content stays for reuse until the room is needed."""
        self._keep_tail(sequence)
        for block_id in reversed(sequence.block_table.tolist()):
            self._release(block_id)
        sequence.clear_blocks()

    def chain_hash(self, sequence: Sequence, index: int) -> bytes:
        """The hash of block `index` of the sequence; links are computed once and kept with it."""
        hashes = sequence.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            media = _media(sequence, start, start + self.block_size)
            hashes.append(
                hash_block(self._parent(sequence, len(hashes)), self._token_bytes(sequence, len(hashes)), media)
            )
        return hashes[index]

    def _parent(self, sequence: Sequence, index: int) -> bytes:
        """The hash that block `index` of the sequence follows."""
        return self.chain_hash(sequence, index - 1) if index else root_hash(self._model_id, sequence.cache_salt)

    def _find_tail(self, sequence: Sequence, index: int) -> tuple[list[int], int]:
        """The tail behind `index` cached blocks of the sequence, and how many of its tokens go on alike, the last one
        not counted; no block if none do. A prebuilt prefix leaves it to the request that is likelier to come."""
        tail = self._by_hash.get(hash_tail(self._parent(sequence, index)))
        if tail is None or sequence.is_prebuild:
            return [], 0
        start, num_equal = index * self.block_size, 0
        for known, token_id in zip(array("i", self._tokens[tail]), sequence.token_ids[start:-1], strict=False):
            if known != token_id:
                break
            num_equal += 1
        is_found = num_equal > 0 and not _media(sequence, start, start + num_equal)
        return ([tail], num_equal) if is_found else ([], 0)

    def _keep_tail(self, sequence: Sequence) -> None:
        """Make the last block of a sequence that ends known by the tokens computed in it, if it is not full."""
        index, end = sequence.num_hashed_blocks, sequence.num_computed_tokens
        start = index * self.block_size
        if not self.enable_prefix_caching or not start < end < start + self.block_size or _media(sequence, start, end):
            return
        tail_hash = hash_tail(self._parent(sequence, index))
        older = self._by_hash.get(tail_hash)
        if older is not None:
            self._claim(older)
            self._release(older)
        self._know(int(sequence.block_table[index]), tail_hash, array("i", sequence.token_ids[start:end]).tobytes())

    def _token_bytes(self, sequence: Sequence, index: int) -> bytes:
        start = index * self.block_size
        return array("i", sequence.token_ids[start : start + self.block_size]).tobytes()

    def _hold(self, block_id: int) -> None:
        if self._num_references[block_id] == 0:
            del self._cached[block_id]
        self._num_references[block_id] += 1

    def _claim(self, block_id: int) -> None:
        """Hold a tail alone: nobody else finds it from now on."""
        self._hold(block_id)
        self._forget(block_id)

    def _take(self) -> int:
        """A block with one reference and no known content; evicts the least recently used one if none is free."""
        if self._free:
            block_id = self._free.pop()
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._forget(block_id)
            self.num_evictions += 1
        self._num_references[block_id] = 1
        return block_id

    def _release(self, block_id: int) -> None:
        if self._num_references[block_id] < 1:
            raise EngineError("a KV block was freed twice")
        self._num_references[block_id] -= 1
        if self._num_references[block_id] == 0:
            if self._hashes[block_id] is None:
                self._free.append(block_id)
            else:
                self._cached[block_id] = None

    def _know(self, block_id: int, block_hash: bytes, token_bytes: bytes) -> None:
        self._by_hash[block_hash] = block_id
        self._hashes[block_id] = block_hash
        self._tokens[block_id] = token_bytes

    def _forget(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hashes[block_id] = None
            self._tokens[block_id] = b""
            self._prebuilt.discard(block_id)


def _media(sequence: Sequence, start: int, end: int) -> bytes:
    return b"" if sequence.media is None else sequence.media.identity(start, end)
