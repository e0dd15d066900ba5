"""What a prompt holds besides text: spans of placeholder tokens, their positions, the work behind their embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Embeddings = NDArray[np.float32]
# Gives way between slices of work, is sent how long the next may take; its value is the embeddings.
Encoding = Generator[None, float | None, Embeddings]


class TurnFusion(Struct, frozen=True):
    """How fusion mixed the media and words of one user turn.

    weights  text, vision and audio -> the modality's share, 0 where absent; they sum to 1
    gates    vision, audio where present -> f32 [its tokens]: how much of itself each token kept, 0 to 1
    """

    weights: Mapping[str, float]
    gates: Mapping[str, NDArray[np.float32]]


class Encoded(Struct, frozen=True):
    """What a job made: embeddings f32 [tokens, width], and how they were fused by a model that fuses."""

    embeddings: Embeddings
    fusion: TurnFusion | None = None

    @property
    def nbytes(self) -> int:
        gates = self.fusion.gates.values() if self.fusion is not None else ()
        return self.embeddings.nbytes + sum(gate.nbytes for gate in gates)


class MediaSpan(Struct, frozen=True):
    """Tokens start to end of a prompt that stand for one medium. sees_itself: its tokens see each other both ways."""

    start: int
    end: int
    sees_itself: bool = False


class MediaJob(Struct, frozen=True):
    """What makes the embeddings of some spans.

    key     32 bytes that stand for everything the embeddings depend on: equal keys, equal embeddings
    spans   in order; the embeddings [sum of their lengths, width] follow each other alike
    encode  begins the work; called with the seconds a slice may take
    """

    key: bytes
    spans: tuple[MediaSpan, ...]
    encode: Callable[[float], Generator[None, float | None, Encoded]]


class PromptMedia:
    """The media of one prompt and where its tokens stand.

    positions     i32 [3, prompt tokens]: time, height, width. Tokens of the answer go on from the last one
    tells_fusion  the reply tells how each turn was fused, so every job's result is asked for, whatever is cached
    """

    def __init__(self, jobs: Iterable[MediaJob], positions: NDArray[np.int32], *, tells_fusion: bool = False) -> None:
        self.jobs = tuple(jobs)
        self.positions = positions
        self.tells_fusion = tells_fusion
        self.spans = tuple(sorted((span for job in self.jobs for span in job.spans), key=lambda span: span.start))
        num_tokens = positions.shape[1]
        ends = [0, *(span.end for span in self.spans)]
        if any(span.start < end for span, end in zip(self.spans, ends, strict=False)) or ends[-1] > num_tokens:
            raise ValueError("media spans overlap or leave the prompt")
        self.answer_offset = int(positions[:, -1].max()) + 1 - num_tokens
        self._ready: dict[bytes, Embeddings] = {}
        self._fusions: dict[bytes, TurnFusion | None] = {}

    def copy(self) -> PromptMedia:
        """The same media for another answer to the same prompt."""
        return PromptMedia(self.jobs, self.positions, tells_fusion=self.tells_fusion)

    @property
    def fusions(self) -> list[TurnFusion]:
        """How each turn that has media was fused, in order; complete once the prompt is computed, if tells_fusion."""
        told = (self._fusions.get(job.key) for job in self.jobs)
        return [fusion for fusion in told if fusion is not None]

    @property
    def longest_two_way_span(self) -> int:
        return max((span.end - span.start for span in self.spans if span.sees_itself), default=0)

    def identity(self, start: int, end: int) -> bytes:
        """What the keys and values of tokens start to end depend on besides token ids; b"" for text before any medium.

        Positions after a picture depend on its grid, which its key stands for.
        """
        touching = [job for job in self.jobs if any(span.start < end and span.end > start for span in job.spans)]
        if not touching:
            return b""
        digest = hashlib.sha256()
        for job in touching:
            digest.update(job.key)
            for span in job.spans:
                digest.update(np.array([span.start - start, span.end - start], np.int64).tobytes())
        return digest.digest()

    def missing(self, num_computed: int) -> list[MediaJob]:
        """Jobs whose result is not here yet and is needed: for tokens from num_computed on, or to be told."""
        return [
            job
            for job in self.jobs
            if (job.key not in self._ready and job.spans[-1].end > num_computed)
            or (self.tells_fusion and job.key not in self._fusions)
        ]

    def receive(self, key: bytes, encoded: Encoded) -> None:
        """Hold the embeddings of a job until release, and for good how it was fused if that is told."""
        self._ready[key] = encoded.embeddings
        if self.tells_fusion:
            self._fusions[key] = encoded.fusion

    def release(self) -> None:
        """The prompt is computed: let go of the embeddings."""
        self._ready.clear()

    def rows(self, start: int, end: int) -> list[tuple[int, Embeddings]]:
        """For tokens start to end: (first token, embeddings from there on), one pair a span they touch."""
        found = []
        for job in self.jobs:
            row = 0
            for span in job.spans:
                first, last = max(start, span.start), min(end, span.end)
                if first < last:
                    begin = row + first - span.start
                    found.append((first, self._ready[job.key][begin : begin + last - first]))
                row += span.end - span.start
        return found

    def whole_spans(self, start: int, end: int) -> int:
        """The largest end not above `end` at which tokens from start on may pause: never inside a two-way span."""
        for span in self.spans:
            if span.sees_itself and span.start < end < span.end:
                return max(start, span.start)
        return end

    def whole_end(self, start: int) -> int:
        """The end of the two-way span that begins at `start`; without one, the token's own."""
        return next((span.end for span in self.spans if span.sees_itself and span.start == start), start + 1)
