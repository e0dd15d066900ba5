"""One request inside the engine: tokens, state, block_table; and what a step gives back for it."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceABC
from enum import Enum
from typing import Literal, Protocol

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from autoglm.engine.prompt_lookup import PromptLookup
from autoglm.engine.sampling import SamplerState, SamplingParams, TokenLogprob
from autoglm.engine.stop_strings import StopStrings
from autoglm.engine.thinking import ThinkingControl, ThoughtTracker
from autoglm.errors import RequestError
from autoglm.media.prompt_media import PromptMedia, TurnFusion

__all__ = ["Sequence", "SequenceOutput", "SequenceState", "TextStream", "ThinkingControl", "TokenConstraint"]

FinishReason = Literal["stop", "length", "error"]


class TokenConstraint(Protocol):
    """A grammar over tokens. The engine asks it only outside a thought and tells it only what was written there."""

    def allowed(self) -> NDArray[np.uint32] | None:
        """uint32 [ceil(vocab / 32)], bit i % 32 of word i // 32 set where token i may come next; None: all may."""

    def forced(self) -> SequenceABC[int]:
        """The tokens that must come next, none where there is a choice; allowed() holds just the first of them."""

    def closing(self, token_ids: SequenceABC[int], room: int) -> SequenceABC[int]:
        """What to write instead of token_ids so that the answer is complete within room tokens; none where it can
        still be completed after them, or where completing it is not this grammar's business."""

    def accept(self, token_id: int) -> None:
        """Move on by one token."""

    def is_stopped(self) -> bool:
        """Whether the text is complete and nothing may follow."""


class TextStream(Protocol):
    """What Tokenizer.stream() gives: ids to text, whole UTF-8 only."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class SequenceState(Enum):
    """A sequence waits for a place, runs, may be preempted back to waiting, and finishes once."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class SequenceOutput(Struct):
    """What one step added to one sequence.

    token_ids             new tokens of the answer, the one that ended it included
    text                  new text, safe to send: whole UTF-8, no part of a stop string
    logprobs              one per token of token_ids, if they were asked for
    finish_reason         None while the answer goes on
    stop_reason           the stop string, or the id out of stop_token_ids, that ended it
    num_cached_tokens     prompt tokens that came out of the prefix cache
    num_reasoning_tokens  tokens written inside a thought so far, its tags not counted
    timings               on the last output: queue_ms, encode_ms, prefill_ms, decode_ms, preemptions, forced_tokens,
                          draft_n, draft_n_accepted
    fusions               on the last output, where the prompt's media tell it: how each turn was fused
    error                 one sentence, with finish_reason "error"
    """

    request_id: str
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_reasoning_tokens: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    fusions: list[TurnFusion] = field(default_factory=list)
    error: str | None = None


class Sequence:
    """One prompt and its growing answer.

    request_id   unique among the engine's sequences
    cache_salt   sequences share cached blocks only with those of the same salt
    arrival_s    time.monotonic() when the request came in; None: now
    media        pictures and sounds among the prompt's tokens; None: it is all text
    is_prebuild  nobody asked for it yet: see engine/prebuild.py
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        thinking: ThinkingControl | None = None,
        constraint: TokenConstraint | None = None,
        cache_salt: bytes = b"",
        arrival_s: float | None = None,
        media: PromptMedia | None = None,
        is_prebuild: bool = False,
    ) -> None:
        if not prompt_token_ids:
            raise RequestError("the prompt has no tokens; send at least one", param="messages")
        self.request_id = request_id
        self.params = params
        self.thinking = thinking
        self.constraint = constraint
        self.cache_salt = cache_salt
        self.media = media
        self.is_prebuild = is_prebuild
        self.arrival_s = time.monotonic() if arrival_s is None else arrival_s

        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.max_tokens = params.max_tokens or 0  # the engine clips it to the room there is
        self.sampler = SamplerState(params, prompt_token_ids)
        self.stop_strings = StopStrings(params.stop)
        self.thought: ThoughtTracker | None = None
        self.text_stream: TextStream | None = None  # set by the engine

        self.state = SequenceState.WAITING
        self.order = -1  # place in the line of arrivals, given by the scheduler
        self.num_computed_tokens = 0  # tokens whose keys and values are in the cache
        self.num_cached_tokens = 0
        self.num_hashed_blocks = 0  # leading blocks of block_table that are in the prefix cache
        self.block_hashes: list[bytes] = []  # chain over the full blocks of token_ids, as far as it was needed
        self._blocks: NDArray[np.int32] = np.zeros(16, np.int32)
        self._num_blocks = 0

        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.error: str | None = None
        self.is_cut = False  # the grammar ended the answer early, for max_tokens
        self.num_forced_tokens = 0  # written without being sampled
        self.lookup = PromptLookup()
        self.num_drafted_tokens = 0  # run before they were chosen
        self.num_accepted_tokens = 0  # of these, then chosen
        self.encode_s = 0.0  # spent on its media by the encoders
        self.num_preemptions = 0
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens the model has not run on yet: 1 in plain decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_blocks(self) -> int:
        """Blocks held."""
        return self._num_blocks

    @property
    def block_table(self) -> NDArray[np.int32]:
        """i32 [num_blocks], a view: the block ids in order."""
        return self._blocks[: self._num_blocks]

    @property
    def num_reasoning_tokens(self) -> int:
        """Thought tokens so far, tags not counted."""
        return 0 if self.thought is None else self.thought.num_thought_tokens

    @property
    def is_in_thought(self) -> bool:
        """Whether the next token belongs to a thought."""
        return self.thought is not None and self.thought.is_inside

    @property
    def must_close_thought(self) -> bool:
        """Whether an answer is still owed when the model wants to end inside its thought."""
        if self.thought is None or not self.thought.is_inside or self.params.ignore_eos:
            return False
        return self.constraint is not None or self.thought.control.budget is not None

    def set_max_tokens(self, max_tokens: int) -> None:
        """Fix how long the answer may be; called once, before it starts."""
        self.max_tokens = max_tokens
        if self.thinking is not None:
            self.thought = ThoughtTracker(self.thinking, max_tokens)
            if self.thinking.budget == 0 and len(self.thinking.open_ids) == 1:
                self.sampler.ban(self.thinking.open_ids[0])

    def append(self, token_id: int) -> None:
        """Add one token to the answer and to everything that counts tokens."""
        if self.thought is not None:
            # Under a grammar a thought opens before its first token or never: later the tag is text inside a string.
            self.thought.observe(token_id, may_open=self.constraint is None or self.num_output_tokens == 0)
        self.token_ids.append(token_id)
        self.sampler.observe(token_id)

    def token_mask(self) -> NDArray[np.uint32] | None:
        """The bitmask of tokens that may come next, None when all may."""
        if self.constraint is None or self.is_in_thought:
            return None
        mask = self.constraint.allowed()
        opening = self._thought_opening
        if mask is None or opening is None or opening // 32 >= mask.size:
            return mask
        widened: NDArray[np.uint32] = mask.copy()
        widened[opening // 32] |= np.uint32(1 << (opening % 32))
        return widened

    def tokens_to_force(self) -> SequenceABC[int]:
        """Tokens to write next without asking the model: the thought's close, or all the grammar leaves."""
        if self.is_in_thought:
            assert self.thought is not None
            return self.thought.tokens_to_force(self.num_output_tokens)
        if self.constraint is None or self._thought_opening is not None:
            return ()
        forced = self.constraint.forced()
        return () if forced and self._closing(forced) else forced

    def tokens_instead_of(self, token_id: int) -> SequenceABC[int]:
        """Tokens to write in place of a sampled one, after which the grammar could not end within max_tokens."""
        if self.constraint is None or self.is_in_thought or token_id == self._thought_opening:
            return ()
        return self._closing((token_id,))

    def _closing(self, token_ids: SequenceABC[int]) -> SequenceABC[int]:
        assert self.constraint is not None
        return self.constraint.closing(token_ids, self.max_tokens - self.num_output_tokens)

    @property
    def _thought_opening(self) -> int | None:
        """The tag that may open a thought in place of the constrained answer's first token."""
        return self.thought.may_open_next if self.thought is not None and self.num_output_tokens == 0 else None

    def append_blocks(self, block_ids: list[int]) -> None:
        """Add blocks at the end of the table."""
        end = self._num_blocks + len(block_ids)
        if end > self._blocks.size:
            grown = np.zeros(max(end, 2 * self._blocks.size), np.int32)
            grown[: self._num_blocks] = self.block_table
            self._blocks = grown
        self._blocks[self._num_blocks : end] = block_ids
        self._num_blocks = end

    def replace_block(self, index: int, block_id: int) -> None:
        """Point one entry of the table at another block of the same content."""
        self._blocks[index] = block_id

    def clear_blocks(self) -> None:
        """Forget all blocks: nothing is computed any more."""
        self._num_blocks = 0
        self.num_computed_tokens = 0
        self.num_hashed_blocks = 0
