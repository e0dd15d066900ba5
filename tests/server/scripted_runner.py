"""A runner whose answers are scripted: its logits peak at the next token of a given reply."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from autoglm.chat.tokenizer import Tokenizer
from autoglm.engine.batch import Batch
from tests.engine.fake_runner import FakeRunner


class ScriptedRunner(FakeRunner):
    """Writes `reply` after the generation prompt, then the end token; noise decides what a grammar forbids.

    The tokens of a sequence are read back out of the slots it wrote, so wrong block tables still show.
    Tags the server put at the prompt's end and the script does not know are passed over. Where the answer
    left the script (a forced tag) it goes on after the last place of the script that ends like the answer does.
    step_s  time one step takes, to have requests run side by side
    """

    def __init__(self, tokenizer: Tokenizer, reply: str = "", *, step_s: float = 0.0, **options: int) -> None:
        super().__init__(vocab_size=tokenizer.vocab_size, **{"num_blocks": 256, **options})
        self.tokenizer = tokenizer
        self.step_s = step_s
        self.set_reply(reply)
        self._slot_tokens = np.full(self.num_blocks * self.block_size, -1, np.int64)
        assistant = tokenizer.token_id("<|assistant|>")
        assert assistant is not None
        self._tags = {tokenizer.token_id(text) for text in ("<think>", "</think>", "<answer>")}
        self._turn_start = [assistant, *tokenizer.encode("\n")]

    def set_reply(self, reply: str | list[int]) -> None:
        """What every sequence answers from now on."""
        end = self.tokenizer.token_id("<|endoftext|>")
        assert end is not None
        self.script = [*(self.tokenizer.encode(reply) if isinstance(reply, str) else reply), end]

    def run(self, batch: Batch) -> NDArray[np.float32]:
        if self.step_s:
            time.sleep(self.step_s)
        self._slot_tokens[batch.slot_mapping] = batch.token_ids
        logits = super().run(batch)
        if len(self.script) > 1:
            for row, t in enumerate(batch.logits_rows):
                s = int(np.searchsorted(batch.cu_seqlens_q, t, side="right")) - 1
                drafts = int(batch.cu_seqlens_q[s + 1]) - 1 - int(t)  # tokens behind this one
                tokens = self._slot_tokens[self._slots(batch, s, int(batch.context_lens[s]) - drafts)].tolist()
                logits[row, self._next(tokens)] += 40.0
        return logits

    def _next(self, tokens: list[int]) -> int:
        size = len(self._turn_start)
        starts = [i for i in range(len(tokens) - size + 1) if tokens[i : i + size] == self._turn_start]
        answer = tokens[starts[-1] + size :] if starts else []
        while answer and answer[0] in self._tags and answer[0] not in self.script:
            del answer[0]
        if answer == self.script[: len(answer)] and len(answer) < len(self.script):
            return self.script[len(answer)]
        for length in range(min(len(answer), len(self.script) - 1), 0, -1):
            for end in range(len(self.script) - 1, length - 1, -1):
                if self.script[end - length : end] == answer[-length:]:
                    return self.script[end]
        return self.script[-1]
