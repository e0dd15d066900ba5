"""What every route works with: driver, tokenizer, template, grammars, metrics, settings, one worker pool."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from autoglm.chat.grammar import GrammarFactory
from autoglm.chat.template import ChatTemplate
from autoglm.chat.tokenizer import Tokenizer
from autoglm.engine.sequence import Sequence as EngineSequence
from autoglm.errors import CapacityError, ContextLengthError, UnknownModelError
from autoglm.server.driver import EngineDriver, OutputStream
from autoglm.server.media import MediaDoor
from autoglm.server.metrics import Metrics
from autoglm.server.problems import log_failure
from autoglm.server.settings import ServerSettings

Result = TypeVar("Result")
# Templates and tokenizers are quick next to the model, whose threads need the cores.
NUM_WORKERS = 2


class Service:
    """The parts behind the routes.

    model_id      the name /v1/models gives; aliases are taken too
    max_context   tokens one sequence may hold
    media         what reads pictures and sounds; None: this model reads text only
    """

    def __init__(
        self,
        driver: EngineDriver,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        model_id: str,
        aliases: Sequence[str],
        max_context: int,
        settings: ServerSettings,
        read_stats: Callable[[], Any] | None,
        media: MediaDoor | None = None,
    ) -> None:
        self.driver = driver
        self.tokenizer = tokenizer
        self.template = template
        self.media = media
        self.grammars = GrammarFactory(tokenizer)
        self.metrics = Metrics(settings.metrics_prefix, read_stats)
        self.model_id = model_id
        self.aliases = tuple(aliases)
        self.max_context = max_context
        self.settings = settings
        self.created_s = int(time.time())
        self._workers = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="autoglm-prepare")
        self._num_preparing = 0
        self._lock = threading.Lock()

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every name the model answers to, its own first."""
        return (self.model_id, *(alias for alias in self.aliases if alias != self.model_id))

    def check_model(self, name: str | None) -> str:
        """The name to answer under; no name means the one model there is. Raises UnknownModelError."""
        if not name:
            return self.model_id
        if name not in self.model_names:
            raise UnknownModelError(
                f"this server has no such model; it serves {', '.join(self.model_names)} (--alias gives it more names)"
            )
        return name

    async def prepare(self, work: Callable[[], Result]) -> Result:
        """Run template, tokenizer or grammar work on a worker thread; 429 beyond what the engine takes."""
        if self._num_preparing >= self.driver.max_in_flight:
            raise CapacityError(f"{self._num_preparing} requests are being prepared already; try again in a moment")
        with self._lock:
            self._num_preparing += 1
        future = self._workers.submit(work)
        # Counted until the thread is done with it, also when the client has left before.
        future.add_done_callback(self._note_prepared)
        return await asyncio.wrap_future(future)

    def prebuild(self, predict: Callable[[], EngineSequence | None]) -> None:
        """Have a worker thread predict a prefix of the next request, and the engine build it when it idles."""

        def work() -> None:
            sequence = predict()
            if sequence is not None:
                self.driver.prebuild(sequence)

        if self.settings.prebuild and self.media is not None:
            with contextlib.suppress(RuntimeError):  # the server is closing
                self._workers.submit(work).add_done_callback(_log_problem)

    def _note_prepared(self, future: Future[Any]) -> None:
        with self._lock:
            self._num_preparing -= 1

    def close(self) -> None:
        """End the worker threads."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def check_text_length(self, num_chars: int, param: str) -> None:
        """Raise ContextLengthError for a text that cannot fit, without the time it takes to tokenize it."""
        at_least = num_chars // self.tokenizer.longest_token_bytes
        if at_least > self.max_context:
            raise ContextLengthError(
                f"{param} holds {num_chars} characters, which is more than {at_least} tokens; this server's context "
                f"is {self.max_context} tokens (--ctx-size sets it)",
                param=param,
            )

    def check_length(self, num_prompt_tokens: int, param: str, num_answer_tokens: int = 1, *, detail: str = "") -> None:
        """Raise ContextLengthError unless prompt and so many tokens of answer fit; detail stands behind their count."""
        if num_prompt_tokens + num_answer_tokens > self.max_context:
            raise ContextLengthError(
                f"{param} came to {num_prompt_tokens} tokens{detail}; this server's context is {self.max_context} "
                f"tokens, of which the answer needs at least {'one' if num_answer_tokens == 1 else num_answer_tokens} "
                "(--ctx-size sets it)",
                param=param,
            )

    async def submit(self, sequences: Sequence[EngineSequence]) -> OutputStream:
        """Submit the sequences of one request and wait for the engine to take them.

        The engine answers between two steps; after keep_alive_s without an answer the stream is given
        back as it is, so that the client hears something. The caller cancels the stream.
        """
        stream = self.driver.submit(*sequences)
        try:
            await stream.wait_accepted(self.settings.keep_alive_s)
        except BaseException:
            stream.cancel()
            raise
        return stream


def _log_problem(future: Future[None]) -> None:
    error = None if future.cancelled() else future.exception()
    if error is not None:
        log_failure(error, "predicting a next turn")
