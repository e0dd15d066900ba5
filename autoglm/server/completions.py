"""/v1/completions: plain text in, plain text out; no template, no thinking dial."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from autoglm.engine.sampling import TokenLogprob
from autoglm.engine.sequence import Sequence, SequenceOutput
from autoglm.errors import EngineError, RequestError
from autoglm.server.body import read_object, validate
from autoglm.server.driver import OutputStream
from autoglm.server.replies import Tally, completion_logprobs, new_id
from autoglm.server.sampling_fields import sampling_params
from autoglm.server.schemas import CompletionRequest
from autoglm.server.service import Service
from autoglm.server.sse import respond

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for this route
MAX_SEQUENCES = 128


class CompletionChoice(Struct):
    """One prompt's one answer."""

    index: int
    echoed: str
    text: str = ""
    num_sent_chars: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    num_logprob_chars: int = 0

    def push(self, output: SequenceOutput) -> str:
        """Take in one output; the new text. Raises EngineError if the engine gave up."""
        if output.finish_reason == "error":
            raise EngineError(output.error or "the engine failed on this request")
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        lead, self.echoed = self.echoed, ""
        self.text += lead + output.text
        return lead + output.text


def encode_prompts(service: Service, request: CompletionRequest) -> tuple[list[list[int]], list[str]]:
    """Token ids of every prompt, and its text where echo wants it. Runs on a worker thread."""
    tokenizer = service.tokenizer
    prompts: list[list[int]] = []
    texts: list[str] = []
    for i, prompt in enumerate(request.prompt):
        param = "prompt" if len(request.prompt) == 1 else f"prompt[{i}]"
        if isinstance(prompt, str):
            service.check_text_length(len(prompt), param)
            token_ids = tokenizer.encode(prompt, parse_special=True)
            if tokenizer.add_bos and tokenizer.bos_token_id is not None:
                token_ids = [tokenizer.bos_token_id, *token_ids]
            text = prompt
        else:
            token_ids = list(prompt)
            if any(token_id >= tokenizer.vocab_size for token_id in token_ids):
                raise RequestError(
                    f"{param}: names a token id of {tokenizer.vocab_size} or more, which is not in the vocabulary",
                    param=param,
                )
            text = tokenizer.decode(token_ids) if request.echo else ""
        if not token_ids:
            raise RequestError(f"{param}: has no tokens; send at least one", param=param)
        service.check_length(len(token_ids), param)
        prompts.append(token_ids)
        texts.append(text if request.echo else "")
    return prompts, texts


class CompletionJob(Struct):
    """One completion request under way."""

    service: Service
    request: CompletionRequest
    model: str
    tally: Tally
    stream: OutputStream | None  # None: max_tokens 0, nothing to generate
    choices: dict[str, CompletionChoice]
    reply_id: str
    created_s: int

    def close(self) -> None:
        """Cancel what has not finished, and count the request."""
        if self.stream is not None:
            self.stream.cancel()
        self.tally.close()

    async def outputs(self) -> AsyncGenerator[tuple[CompletionChoice, str], None]:
        """Every choice with its new text."""
        if self.stream is None:
            for choice in self.choices.values():
                choice.finish_reason, choice.text = "length", choice.echoed
                yield choice, choice.echoed
            return
        async for output in self.stream:
            self.tally.take(output)
            choice = self.choices[output.request_id]
            yield choice, choice.push(output)

    async def whole(self) -> Response:
        """The reply in one piece."""
        async for _ in self.outputs():
            pass
        choices = [self._entry(choice, choice.text) for choice in self.choices.values()]
        usage = {"usage": self.tally.usage(), "timings": self.tally.timings()}
        return JSONResponse({**self._envelope(choices), **usage})

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The reply's chunks."""
        wants_usage = bool(self.request.stream_options and self.request.stream_options.include_usage)
        num_open = len(self.choices)
        async for choice, text in self.outputs():
            is_last = choice.finish_reason is not None
            if not text and not is_last:
                continue
            num_open -= is_last
            chunk = self._envelope([self._entry(choice, text)])
            if wants_usage:
                chunk["usage"] = None
            elif num_open == 0:
                chunk["timings"] = self.tally.timings()
            yield chunk
        if wants_usage:
            yield {**self._envelope([]), "usage": self.tally.usage(), "timings": self.tally.timings()}

    def _entry(self, choice: CompletionChoice, text: str) -> dict[str, Any]:
        logprobs = None
        if choice.logprobs is not None:
            logprobs = completion_logprobs(self.service.tokenizer, choice.logprobs, choice.num_logprob_chars)
            choice.num_logprob_chars += sum(len(token) for token in logprobs["tokens"])
            choice.logprobs = []
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.reply_id,
            "object": "text_completion",
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }


async def start_completion(service: Service, fields: dict[str, Any]) -> CompletionJob:
    """Check a body, tokenize its prompts and submit their sequences."""
    tally = Tally(service.metrics)
    request = validate(CompletionRequest, fields)
    model = service.check_model(request.model)
    service.driver.check_ready()
    num_choices = request.n or 1
    if num_choices * len(request.prompt) > MAX_SEQUENCES:
        raise RequestError(f"n: times the number of prompts is more than {MAX_SEQUENCES}", param="n")
    started_s = time.monotonic()
    prompts, texts = await service.prepare(partial(encode_prompts, service, request))
    tally.tokenize_ms = (time.monotonic() - started_s) * 1e3
    tally.prompt_tokens = sum(map(len, prompts))
    reply_id = new_id("cmpl")
    max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    choices: dict[str, CompletionChoice] = {}
    sequences = []
    for index in range(len(prompts) * num_choices):
        i, choice_index = divmod(index, num_choices)
        request_id = f"{reply_id}-{index}"
        choices[request_id] = CompletionChoice(index, texts[i])
        params = sampling_params(
            service,
            request,
            index=choice_index,
            max_tokens=max_tokens or 1,
            logprobs=request.logprobs,
            banned=service.tokenizer.unused_token_ids,
        )
        salt = (request.cache_salt or "").encode()
        sequences.append(Sequence(request_id, prompts[i], params, cache_salt=salt, arrival_s=time.monotonic()))
    stream = None if max_tokens == 0 else await service.submit(sequences)
    return CompletionJob(service, request, model, tally, stream, choices, reply_id, int(time.time()))


async def completions(service: Service, http: Request) -> Response:
    """The route: SSE with `stream: true`, one JSON reply otherwise."""
    fields = await read_object(http, service.settings)
    start = partial(start_completion, service, fields)
    is_stream = fields.get("stream") is True
    return await respond(http, start, is_stream=is_stream, keep_alive_s=service.settings.keep_alive_s)
