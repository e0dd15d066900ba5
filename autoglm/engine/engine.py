"""Engine.step: schedule, build batch, run, sample, finish.

One thread calls everything here. A failure while handling one sequence (its constraint, its logits, its text) ends
that sequence with finish_reason "error". A failure of the runner ends the sequences of that batch: whatever the step
half wrote lies in blocks that are theirs alone and that were not yet made known to the prefix cache, so the rest of
the KV state is certain and the engine goes on. A failure of our own book-keeping is not caught: then nothing is
certain and the driver must stop.
"""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections import Counter
from typing import Protocol

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from autoglm.config import EngineConfig
from autoglm.engine.batch import Batch, BatchBuilder
from autoglm.engine.block_manager import BlockManager
from autoglm.engine.drafting import Drafter
from autoglm.engine.encoder_queue import EncoderQueue
from autoglm.engine.prebuild import PrebuildQueue
from autoglm.engine.scheduler import Scheduled, Scheduler
from autoglm.engine.sequence import FinishReason, Sequence, SequenceOutput, SequenceState, TextStream
from autoglm.engine.step_speed import StepSpeed
from autoglm.engine.token_choice import TokenChooser
from autoglm.errors import CapacityError, ContextLengthError, EngineError, RequestError

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 300
# How long encoding a medium may hold up those who are being served, and those who just arrive. Where a decode step is
# long it takes half of one more: the 9B's takes 0.3 s, and a picture would take fifteen times its own time beside it.
ENCODE_SLICE_S, ENCODE_ALONE_S = 0.02, 0.1
# How long a prefix that is built ahead may hold up who arrives, and how many tokens of it are lost then. Steps of 16,
# 32, 64 and 256 tokens do 119, 154, 183 and 201 tokens/s (8 layers of the 9B's, 2 cores).
PREBUILD_SLICE_S, PREBUILD_CHUNK = 0.02, 32


class Runner(Protocol):
    """The part of engine.model_runner.ModelRunner that the engine calls."""

    block_size: int
    num_blocks: int
    vocab_size: int
    max_num_batched_tokens: int
    max_context: int

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """f32 [L, vocab], valid until the next run."""

    def start(self, batch: Batch) -> None: ...

    def advance(self, slice_s: float) -> bool: ...


class EngineTokenizer(Protocol):
    """The part of chat.tokenizer.Tokenizer that the engine calls; eos_visible_token_ids is optional."""

    eos_token_ids: frozenset[int]

    def stream(self) -> TextStream: ...


class EngineStats(Struct, frozen=True):
    """Counters since start (num_*_total, *_s) and the present state (the others).

    prefix_cache_query_tokens, prefix_cache_hit_tokens   tokens looked up at admission, and those found
    kv_pool       blocks: total, used, cached, free, peak_used, block_size, evictions; bytes where the runner tells
    runner_s      time inside the runner
    sampling_s    time inside the sampler
    step_s        time inside step, the runner included
    """

    num_running: int
    num_waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_blocks_cached: int
    prefix_cache_query_tokens: int
    prefix_cache_hit_tokens: int
    num_preemptions_total: int
    num_prompt_tokens_total: int
    num_prefill_tokens_total: int
    num_generation_tokens_total: int
    num_reasoning_tokens_total: int
    num_prebuilt_tokens_total: int  # computed ahead of any request
    num_prebuilt_hit_tokens_total: int  # of these, found by one that came
    num_forced_tokens_total: int  # written without being sampled: a thought's close, what a grammar left no choice in
    num_drafted_tokens_total: int  # run before they were chosen (engine/drafting.py)
    num_accepted_tokens_total: int  # of these, then chosen
    num_encoded_total: int  # encoder jobs done: a picture, or for gcmf all media of a turn
    num_steps_total: int
    num_requests_total: int
    num_finished_total: dict[str, int]  # by finish reason, "cancelled" too
    runner_s: float
    sampling_s: float
    step_s: float
    kv_pool: dict[str, int] = field(default_factory=dict)


class _Counters(Struct):
    query_tokens: int = 0
    hit_tokens: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    generation_tokens: int = 0
    reasoning_tokens: int = 0
    forced_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    requests: int = 0
    runner_s: float = 0.0
    step_s: float = 0.0
    mean_service_s: float = 1.0  # from admission to the end, a moving mean


class Engine:
    """Serves sequences on one runner: continuous batching over a paged KV cache."""

    def __init__(self, runner: Runner, tokenizer: EngineTokenizer, config: EngineConfig) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.config = config
        budget = min(config.token_budget, runner.max_num_batched_tokens)
        self.block_manager = BlockManager(
            runner.num_blocks,
            runner.block_size,
            model_id=getattr(runner, "model_id", ""),
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.encoders = EncoderQueue(config.media_cache_bytes)
        self.scheduler = Scheduler(
            self.block_manager,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=budget,
            is_encoded=self._is_encoded,
        )
        self.speed = StepSpeed(budget)
        self.scheduler.prefill_room = self.speed.prefill_room
        self._builder = BatchBuilder(
            max_num_batched_tokens=budget, max_num_seqs=config.max_num_seqs, block_size=runner.block_size
        )
        self._prebuilds = PrebuildQueue(runner, self.block_manager, self._builder, min(PREBUILD_CHUNK, budget))
        # Rows of the output matrix past the tokenizer's last id are padding; they stand for no text.
        self._num_known_ids = min(runner.vocab_size, getattr(tokenizer, "vocab_size", runner.vocab_size))
        self.drafter = Drafter(self.block_manager, self.speed, config.draft_max, budget)
        self._chooser = TokenChooser(
            self._num_known_ids,
            frozenset(tokenizer.eos_token_ids),
            frozenset(getattr(tokenizer, "eos_visible_token_ids", ())),
        )
        self._sequences: dict[str, Sequence] = {}
        self._counters = _Counters()
        self._finished: Counter[str] = Counter()
        self._unencodable: list[tuple[Sequence, Exception]] = []

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens one sequence, prompt and answer, may have: the context, or the KV pool if that is smaller."""
        return min(self.runner.max_context, self.runner.num_blocks * self.runner.block_size)

    def has_work(self) -> bool:
        """Whether step would do anything."""
        return self.scheduler.has_work() or self._prebuilds.has_work()

    def prebuild(self, sequence: Sequence) -> None:
        """Compute the full blocks of a prefix before its last token when nobody else has work; see engine/prebuild.py.

        It gives no output. One that cannot fit, or comes without a prefix cache, is passed over.
        """
        if self.config.enable_prefix_caching and sequence.num_tokens <= self.max_sequence_tokens:
            self._prebuilds.add(sequence)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in line.

        max_tokens is clipped to the room left by the prompt; such an answer ends with finish_reason "length".
        Raises ContextLengthError if the prompt leaves no room for an answer, CapacityError (429) if the line is full,
        RequestError if a token id lies outside the vocabulary.
        """
        if sequence.request_id in self._sequences:
            raise EngineError("two sequences were given the same request_id")
        room = self.max_sequence_tokens - sequence.num_prompt_tokens
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {sequence.num_prompt_tokens} tokens and leaves no room for an answer in the "
                f"{self.max_sequence_tokens} tokens one request may use here; shorten the prompt or serve with a "
                "larger --ctx-size"
            )
        self._check_vocabulary(sequence)
        self._check_media(sequence)
        num_waiting = len(self.scheduler.waiting)
        if num_waiting >= self.config.max_waiting:
            raise CapacityError(
                f"{num_waiting} requests are already waiting; try again later", retry_after_s=self._retry_after_s()
            )
        sequence.set_max_tokens(min(sequence.params.max_tokens or room, room))
        sequence.text_stream = self.tokenizer.stream()
        self._sequences[sequence.request_id] = sequence
        self.scheduler.add(sequence)
        self._counters.requests += 1
        self._counters.prompt_tokens += sequence.num_prompt_tokens

    def cancel(self, request_id: str) -> bool:
        """Drop a sequence and free its blocks now; it gives no more output. False if it is not there any more."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        self.scheduler.finish(sequence)
        self._drop_media(sequence)
        self._finished["cancelled"] += 1
        return True

    def step(self) -> list[SequenceOutput]:
        """Encode for a slice, run one batch; what it added to each sequence that moved on."""
        started_s = time.monotonic()
        self._encode(started_s)
        if not self.scheduler.has_work():
            self._prebuilds.advance(PREBUILD_SLICE_S)
            return []
        self._prebuilds.give_way()
        begun_s = time.monotonic()
        scheduled = self.scheduler.schedule()
        failed = self._end_unencodable()
        if not scheduled:
            return failed
        self._note_admissions(scheduled, time.monotonic())
        self.drafter.add_drafts(scheduled)
        batch = self._builder.build(scheduled)
        run_s = time.monotonic()
        try:
            logits = self.runner.run(batch)
            if logits.shape != (batch.logits_rows.size, self.runner.vocab_size):
                raise EngineError(f"the runner returned logits of shape {logits.shape}")
        except Exception as error:
            return failed + self._fail_batch(scheduled, error)
        now_s = time.monotonic()
        self._counters.runner_s += now_s - run_s
        num_drafted = sum(item.num_drafted for item in scheduled)
        self.speed.note(batch.token_ids.size, len(scheduled), now_s - begun_s, num_drafted=num_drafted)
        self.scheduler.prefill_room = self.speed.prefill_room
        outputs = failed
        row = 0
        for item in scheduled:
            wants_logits = item.wants_logits
            self._commit(item)
            if wants_logits:
                wanted = 1 + item.num_drafted
                outputs.append(self._advance(item, logits[row : row + wanted], now_s))
                row += wanted
        self._counters.steps += 1
        self._counters.step_s += time.monotonic() - started_s
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot for /metrics and the log."""
        manager, counters = self.block_manager, self._counters
        pool = {
            "total": manager.num_blocks,
            "used": manager.num_used_blocks,
            "cached": manager.num_cached_blocks,
            "free": manager.num_free_blocks - manager.num_cached_blocks,
            "peak_used": manager.peak_used_blocks,
            "block_size": manager.block_size,
            "evictions": manager.num_evictions,
        }
        kv_bytes = getattr(self.runner, "kv_bytes", None)
        if isinstance(kv_bytes, int):
            pool["bytes"] = kv_bytes
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            kv_blocks_total=manager.num_blocks,
            kv_blocks_used=manager.num_used_blocks,
            kv_blocks_cached=manager.num_cached_blocks,
            prefix_cache_query_tokens=counters.query_tokens,
            prefix_cache_hit_tokens=counters.hit_tokens,
            num_preemptions_total=self.scheduler.num_preemptions,
            num_prompt_tokens_total=counters.prompt_tokens,
            num_prefill_tokens_total=counters.prefill_tokens,
            num_generation_tokens_total=counters.generation_tokens,
            num_reasoning_tokens_total=counters.reasoning_tokens,
            num_prebuilt_tokens_total=self._prebuilds.num_tokens,
            num_prebuilt_hit_tokens_total=manager.num_prebuilt_hits * manager.block_size,
            num_forced_tokens_total=counters.forced_tokens,
            num_drafted_tokens_total=counters.drafted_tokens,
            num_accepted_tokens_total=counters.accepted_tokens,
            num_encoded_total=self.encoders.num_encoded,
            num_steps_total=counters.steps,
            num_requests_total=counters.requests,
            num_finished_total=dict(self._finished),
            runner_s=counters.runner_s,
            sampling_s=self._chooser.sampling_s,
            step_s=counters.step_s,
            kv_pool=pool,
        )

    def _encode(self, started_s: float) -> None:
        """Slices between two steps: a share for each who waits while others are being served, more while nobody is."""
        if not self.scheduler.running:
            self.encoders.advance(ENCODE_ALONE_S)
            return
        room_s = max(ENCODE_SLICE_S, self.speed.decode_s / 2) * self.scheduler.num_shares
        while self.encoders.has_work():
            self.encoders.advance(ENCODE_SLICE_S)
            if time.monotonic() - started_s + ENCODE_SLICE_S / 2 > room_s:
                return

    def _is_encoded(self, sequence: Sequence) -> bool:
        """Whether the sequence has all embeddings its tokens outside the prefix cache need; asks for those it lacks."""
        media = sequence.media
        if media is None:
            return True
        num_known = self.block_manager.num_known_blocks(sequence) * self.block_manager.block_size
        has_all = True
        for job in media.missing(num_known):
            try:
                encoded = self.encoders.get(job)
            except Exception as error:
                self._unencodable.append((sequence, error))
                return False
            if encoded is None:
                has_all = False
            else:
                media.receive(job.key, encoded)
                sequence.encode_s += self.encoders.take_seconds(job)
        return has_all

    def _end_unencodable(self) -> list[SequenceOutput]:
        broken, self._unencodable = self._unencodable, []
        return [self._end_with(sequence, error) for sequence, error in broken]

    def _drop_media(self, sequence: Sequence) -> None:
        """The sequence has ended: stop encoding what nobody else waits for."""
        if sequence.media is None:
            return
        sequence.media.release()
        wanted = {job.key for other in self._sequences.values() if other.media is not None for job in other.media.jobs}
        self.encoders.forget({job.key for job in sequence.media.jobs} - wanted)

    def _check_media(self, sequence: Sequence) -> None:
        longest = sequence.media.longest_two_way_span if sequence.media is not None else 0
        room = self.scheduler.max_num_batched_tokens - self.scheduler.max_num_running
        if longest > room:
            raise RequestError(
                f"a picture or sound of {longest} tokens must be read in one step, and a step here has room for "
                f"{room}; send a smaller one, or serve with a larger --max-batched-tokens",
                param="messages",
            )

    def _check_vocabulary(self, sequence: Sequence) -> None:
        vocab_size = self.runner.vocab_size
        if min(sequence.token_ids) < 0 or max(sequence.token_ids) >= vocab_size:
            raise RequestError(f"the prompt holds a token id outside 0 to {vocab_size - 1}", param="prompt")
        bias = sequence.params.logit_bias
        if bias and max(bias) >= self._num_known_ids:
            raise RequestError(
                f"logit_bias names token {max(bias)}, the vocabulary ends at {self._num_known_ids - 1}",
                param="logit_bias",
            )
        sequence.sampler.limit(self._num_known_ids)

    def _retry_after_s(self) -> int:
        """Seconds until about half the line will have been served, from the recent mean time per request."""
        rounds = (len(self.scheduler.waiting) / 2 + 1) / self.scheduler.max_num_running
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(rounds * self._counters.mean_service_s)))

    def _note_admissions(self, scheduled: list[Scheduled], now_s: float) -> None:
        for item in scheduled:
            sequence = item.sequence
            if sequence.scheduled_s is None:
                sequence.scheduled_s = now_s
                self._counters.query_tokens += sequence.num_tokens
                self._counters.hit_tokens += sequence.num_cached_tokens

    def _commit(self, item: Scheduled) -> None:
        """The step succeeded: its tokens are in the cache."""
        sequence = item.sequence
        if item.num_scheduled_tokens > 1 or sequence.first_token_s is None:
            self._counters.prefill_tokens += item.num_scheduled_tokens
        sequence.num_computed_tokens += item.num_scheduled_tokens
        if sequence.media is not None and sequence.num_computed_tokens >= sequence.num_prompt_tokens:
            sequence.media.release()
        self._commit_blocks(sequence)

    def _commit_blocks(self, sequence: Sequence) -> None:
        if sequence.num_computed_tokens // self.block_manager.block_size > sequence.num_hashed_blocks:
            self.block_manager.commit(sequence)

    def _advance(self, item: Scheduled, logits: NDArray[np.float32], now_s: float) -> SequenceOutput:
        """Choose the next token or tokens of one sequence; whatever goes wrong here is that sequence's end alone.

        logits f32 [1 + num_drafted, vocab]
        """
        sequence = item.sequence
        output = SequenceOutput(
            sequence.request_id,
            [],
            "",
            [] if sequence.params.logprobs is not None else None,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
        )
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        try:
            self._choose_tokens(item, logits, output)
        except Exception as error:
            self._set_error(sequence, error)
        self._counters.generation_tokens += len(output.token_ids)
        self._seal(sequence, output)
        return output

    def _choose_tokens(self, item: Scheduled, logits: NDArray[np.float32], output: SequenceOutput) -> None:
        """Row by row, as long as all that is written was drafted: then the row behind it was computed from it."""
        sequence, drafted = item.sequence, item.expected[: item.num_drafted]
        sequence.num_drafted_tokens += len(drafted)
        used = 0  # drafts that were written
        while True:
            at = sequence.num_tokens
            self._chooser.choose(sequence, logits[used], output)
            if used < len(item.expected):
                sequence.lookup.note(sequence.token_ids[at] == item.expected[used])
            while used < len(drafted) and sequence.token_ids[at : at + 1] == drafted[used : used + 1]:
                used, at = used + 1, at + 1
            if at < sequence.num_tokens or sequence.finish_reason is not None:
                break
        sequence.num_computed_tokens += used
        sequence.num_accepted_tokens += used
        self._commit_blocks(sequence)

    def _set_error(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence by an error; the log gets the place, neither gets text that a request might be in."""
        sequence.finish_reason = "error"
        sequence.stop_reason = None
        known = isinstance(error, EngineError)
        sequence.error = str(error) if known else f"internal error ({type(error).__name__}) while making the answer"
        place = "".join(traceback.format_tb(error.__traceback__)[-3:])
        logger.error("request %s failed with %s at\n%s", sequence.request_id, type(error).__name__, place)

    def _seal(self, sequence: Sequence, output: SequenceOutput) -> None:
        """Fill in the counts, and take the sequence out if it ended."""
        output.num_output_tokens = sequence.num_output_tokens
        output.num_reasoning_tokens = sequence.num_reasoning_tokens
        if sequence.finish_reason is None:
            return
        output.finish_reason = sequence.finish_reason
        output.stop_reason = sequence.stop_reason
        output.error = sequence.error
        now_s = time.monotonic()
        output.timings = _timings(sequence, now_s)
        output.fusions = sequence.media.fusions if sequence.media is not None else []
        self.scheduler.finish(sequence)
        del self._sequences[sequence.request_id]
        self._drop_media(sequence)
        self._finished[sequence.finish_reason] += 1
        counters = self._counters
        counters.reasoning_tokens += sequence.num_reasoning_tokens
        counters.forced_tokens += sequence.num_forced_tokens
        counters.drafted_tokens += sequence.num_drafted_tokens
        counters.accepted_tokens += sequence.num_accepted_tokens
        counters.mean_service_s += 0.1 * (now_s - (sequence.scheduled_s or now_s) - counters.mean_service_s)

    def _fail_batch(self, scheduled: list[Scheduled], error: Exception) -> list[SequenceOutput]:
        return [self._end_with(item.sequence, error) for item in scheduled]

    def _end_with(self, sequence: Sequence, error: Exception) -> SequenceOutput:
        self._set_error(sequence, error)
        output = SequenceOutput(
            sequence.request_id,
            [],
            "",
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
        )
        self._seal(sequence, output)
        return output


def _timings(sequence: Sequence, now_s: float) -> dict[str, float]:
    """Where the time of one sequence went, ms: in line, until its first token, after it."""
    scheduled_s = sequence.scheduled_s if sequence.scheduled_s is not None else now_s
    first_s = sequence.first_token_s if sequence.first_token_s is not None else now_s
    return {
        "queue_ms": max(0.0, scheduled_s - sequence.arrival_s - sequence.encode_s) * 1e3,
        "encode_ms": sequence.encode_s * 1e3,
        "prefill_ms": max(0.0, first_s - scheduled_s) * 1e3,
        "decode_ms": max(0.0, now_s - first_s) * 1e3,
        "preemptions": float(sequence.num_preemptions),
        "forced_tokens": float(sequence.num_forced_tokens),
        "draft_n": float(sequence.num_drafted_tokens),
        "draft_n_accepted": float(sequence.num_accepted_tokens),
    }


__all__ = ["Engine", "EngineStats", "EngineTokenizer", "FinishReason", "Runner", "SequenceOutput", "SequenceState"]
