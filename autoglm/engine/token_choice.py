"""A row of logits -> the tokens it leads to: sampled, forced, or in place of one; their text; how an answer ends.

What happens to a sequence here depends on its own tokens and logits alone, never on the step or batch they came in.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

import numpy as np
from numpy.typing import NDArray

from autoglm.engine.sampling import Sampler, TokenLogprob
from autoglm.engine.sequence import Sequence, SequenceOutput


class TokenChooser:
    """Moves sequences on by one row of logits at a time; one thread at a time."""

    def __init__(self, vocab_size: int, eos: frozenset[int], visible_eos: frozenset[int]) -> None:
        """vocab_size: ids that stand for text, logits past them are padding; visible_eos: those of eos with a text."""
        self._vocab_size = vocab_size
        self._sampler = Sampler(vocab_size)
        self._eos, self._visible_eos = eos, visible_eos

    @property
    def sampling_s(self) -> float:
        """Seconds spent sampling so far."""
        return self._sampler.seconds

    def choose(self, sequence: Sequence, logits: NDArray[np.float32], output: SequenceOutput) -> None:
        """Write the token sampled from a row of logits, or what must come in its place, and all that is forced next.

        logits f32 [vocab], of the sequence's last token; overwritten where penalties, bans or masks apply
        Raises EngineError when the logits are not finite or nothing may follow.
        """
        # Later on, what was to be forced here was written at the end of the step before.
        forced = () if sequence.num_output_tokens else sequence.tokens_to_force()
        if not forced:
            sampled = self._sampler.sample(logits[: self._vocab_size], sequence)
            forced = self._instead_of(sequence, sampled.token_id)
            if not forced:
                if output.logprobs is not None and sampled.logprob is not None:
                    output.logprobs.append(TokenLogprob(sampled.token_id, sampled.logprob, sampled.top))
                self._write(sequence, sampled.token_id, output)
                forced = sequence.tokens_to_force() if sequence.finish_reason is None else ()
        while forced:
            for token_id in forced:
                if output.logprobs is not None:
                    output.logprobs.append(TokenLogprob(token_id, 0.0, []))
                self._write(sequence, token_id, output)
                sequence.num_forced_tokens += 1
                if sequence.finish_reason is not None:
                    break
            forced = sequence.tokens_to_force() if sequence.finish_reason is None else ()
        if sequence.finish_reason is not None and sequence.stop_strings.found is None:
            self._flush_text(sequence, output)

    def _instead_of(self, sequence: Sequence, token_id: int) -> SequenceABC[int]:
        """What must be written in place of a sampled token, if anything."""
        if token_id in self._eos and sequence.must_close_thought:
            assert sequence.thought is not None
            return sequence.thought.rest_of_close()
        closing = sequence.tokens_instead_of(token_id)
        sequence.is_cut = sequence.is_cut or bool(closing)
        return closing

    def _write(self, sequence: Sequence, token_id: int, output: SequenceOutput) -> None:
        """Add one token, and tell the grammar of it where it belongs to the answer proper."""
        was_in_thought = sequence.is_in_thought
        self._accept(sequence, token_id, output)
        constraint = sequence.constraint
        if constraint is None or was_in_thought or sequence.is_in_thought or sequence.finish_reason == "stop":
            return
        constraint.accept(token_id)
        if constraint.is_stopped():
            sequence.finish_reason = "length" if sequence.is_cut else "stop"

    def _accept(self, sequence: Sequence, token_id: int, output: SequenceOutput) -> None:
        """Add one token to answer and text, and see whether the answer ends with it."""
        sequence.append(token_id)
        output.token_ids.append(token_id)
        params = sequence.params
        is_eos = token_id in self._eos and not params.ignore_eos
        if is_eos or token_id in params.stop_token_ids:
            sequence.finish_reason = "stop"
            sequence.stop_reason = None if is_eos else token_id
            if token_id not in self._visible_eos:
                return
        assert sequence.text_stream is not None
        text = sequence.text_stream.push(token_id)
        if text:
            output.text += sequence.stop_strings.push(text)
            if sequence.stop_strings.found is not None:
                sequence.finish_reason = "stop"
                sequence.stop_reason = sequence.stop_strings.found
        if sequence.finish_reason is None and sequence.num_output_tokens >= sequence.max_tokens:
            sequence.finish_reason = "length"

    def _flush_text(self, sequence: Sequence, output: SequenceOutput) -> None:
        """The answer ended without a stop string: let out half characters and held-back text."""
        assert sequence.text_stream is not None
        output.text += sequence.stop_strings.push(sequence.text_stream.flush())
        if sequence.stop_strings.found is None:
            output.text += sequence.stop_strings.flush()
