"""One sequence's place in a grammar: which tokens may come next, which must, and how to end in time.

Where the grammar leaves one text only, llguidance fixes its tokens too: they are the ones the tokenizer itself makes
of that text, and the bitmask then allows the first of them alone. Sampling under the mask and appending forced()
therefore write the same tokens. This holds as far as the next bytes do not depend on a choice: the end of a forced
text that could be part of a longer token is left to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoglm.errors import EngineError

if TYPE_CHECKING:
    import llguidance


class GrammarConstraint:
    """A grammar being walked. Made on a worker thread, used on the engine thread."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self.has_failed = False  # the grammar outgrew llguidance's limits: the client's schema is to blame
        self._matcher = matcher
        self._mask: NDArray[np.uint32] = np.zeros((vocab_size + 31) // 32, np.uint32)
        self._is_mask_current = False

    def allowed(self) -> NDArray[np.uint32]:
        """uint32 [ceil(vocab / 32)], a bit per token that may come next; valid until the next call of accept.

        Raises EngineError if the grammar outgrew llguidance's limits while it ran.
        """
        if not self._is_mask_current:
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
            self._check()
            self._is_mask_current = True
        return self._mask

    def forced(self) -> Sequence[int]:
        """The tokens that must come next, none where the model has a choice. Raises EngineError as allowed does."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    def closing(self, token_ids: Sequence[int], room: int) -> Sequence[int]:
        """What to write instead of token_ids, were the answer to outgrow room tokens with them; here always nothing."""
        return ()

    def accept(self, token_id: int) -> None:
        """Move on by one token; raises EngineError if it was not allowed."""
        self._matcher.consume_token(token_id)
        self._is_mask_current = False
        self._check()

    def is_stopped(self) -> bool:
        """Whether the text is complete and nothing but an end token may follow."""
        return bool(self._matcher.is_stopped())

    def is_accepting(self) -> bool:
        """Whether the text so far is a complete answer, even if it could go on."""
        return bool(self._matcher.is_accepting())

    def _check(self) -> None:
        if self._matcher.is_error():
            self.has_failed = True
            raise EngineError("the answer's grammar became too complex to go on")
