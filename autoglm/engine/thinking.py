"""Thought budget: watches a sequence's tokens for its thinking tags and says when to force the closing one."""

from __future__ import annotations

from msgspec import Struct

from autoglm.errors import ConfigError

MIN_ANSWER_TOKENS = 16
MAX_ANSWER_TOKENS = 256


class ThinkingControl(Struct, frozen=True):
    """How one sequence may think.

    budget             thought tokens after which the engine writes close_ids itself; None: no limit. 0 with a thought
                       not yet open: the opening tag is never sampled (a one-token tag) or closed at once (a longer one)
    open_ids           tokens of the opening tag
    close_ids          tokens of the closing tag, forced ones included in the answer
    starts_in_thought  the prompt ends inside an open thought
    min_answer         answer tokens a budgeted thought leaves room for at least
    """

    budget: int | None
    open_ids: tuple[int, ...]
    close_ids: tuple[int, ...]
    starts_in_thought: bool = False
    min_answer: int = MIN_ANSWER_TOKENS

    def __post_init__(self) -> None:
        if not self.close_ids or (not self.open_ids and not self.starts_in_thought):
            raise ConfigError("thinking needs the token ids of its opening and closing tags")
        if self.budget is not None and self.budget < 0:
            raise ConfigError(f"thinking budget is {self.budget}, expected 0 or more tokens")


class ThoughtTracker:
    """Where a sequence stands: outside or inside a thought, and how many thought tokens it wrote.

    The tags are not counted. Tags are recognised by token ids (they are single tokens in the models that think);
    a tag a model spells with other tokens than its tokenizer would is not seen.
    """

    def __init__(self, control: ThinkingControl, max_tokens: int) -> None:
        self.control = control
        self.is_inside = control.starts_in_thought
        self.num_thought_tokens = 0
        self._tail: list[int] = []
        self._max_tokens = max_tokens
        self._tail_size = max(len(control.open_ids), len(control.close_ids))

    @property
    def reserve(self) -> int:
        """Answer tokens a budgeted thought must leave room for: a quarter of max_tokens, min_answer (16) to 256."""
        return max(self.control.min_answer, min(MAX_ANSWER_TOKENS, self._max_tokens // 4))

    @property
    def may_open_next(self) -> int | None:
        """The one-token opening tag, where a thought may be opened with it."""
        control = self.control
        if self.is_inside or control.budget == 0 or len(control.open_ids) != 1:
            return None
        return control.open_ids[0]

    def observe(self, token_id: int, *, may_open: bool = True) -> None:
        """Take in one token of the answer. may_open=False: an opening tag is ordinary text now."""
        control = self.control
        self._tail.append(token_id)
        if self.is_inside:
            self.num_thought_tokens += 1
            if self._ends_with(control.close_ids):
                self.num_thought_tokens -= len(control.close_ids)
                self.is_inside = False
                self._tail.clear()
        elif may_open and control.open_ids and self._ends_with(control.open_ids):
            self.is_inside = True
            self._tail.clear()
        if len(self._tail) > self._tail_size:
            del self._tail[0]

    def tokens_to_force(self, num_output_tokens: int) -> tuple[int, ...]:
        """Tokens to write now to close a thought that used up its budget or comes near max_tokens; () if none."""
        control = self.control
        if not self.is_inside or control.budget is None:
            return ()
        room = self._max_tokens - num_output_tokens
        if self.num_thought_tokens < control.budget and room > self.reserve + len(control.close_ids):
            return ()
        return self.rest_of_close()

    def rest_of_close(self) -> tuple[int, ...]:
        """The closing tag without the part of it that is already written."""
        close = self.control.close_ids
        for size in range(len(close) - 1, 0, -1):
            if self._ends_with(close[:size]):
                return close[size:]
        return close

    def _ends_with(self, ids: tuple[int, ...]) -> bool:
        return len(self._tail) >= len(ids) and tuple(self._tail[-len(ids) :]) == ids
