"""/v1/chat/completions: request -> sequences -> SSE or one reply."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any, NoReturn

from msgspec import Struct, field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from autoglm.chat.action_grammar import ANSWER_TAG, ActionConstraint
from autoglm.chat.output_parser import Delta, OutputParser
from autoglm.chat.tokenizer import Tokenizer
from autoglm.engine.sampling import TokenLogprob
from autoglm.engine.sequence import Sequence, SequenceOutput
from autoglm.errors import EngineError, RequestError
from autoglm.media.prompt_media import TurnFusion
from autoglm.server.body import read_object, validate
from autoglm.server.driver import OutputStream
from autoglm.server.media import RequestMedia, check_kinds, check_settings, decode, find_parts
from autoglm.server.next_turn import next_prefix
from autoglm.server.prompts import CLOSE_TAG, OPEN_TAG, ChatPrompt, build_chat_prompt
from autoglm.server.replies import Tally, chat_logprobs, fusion_report, new_id
from autoglm.server.sampling_fields import sampling_params
from autoglm.server.schemas import ChatRequest
from autoglm.server.service import Service
from autoglm.server.sse import respond
from autoglm.server.thinking import ThinkingSetting, read_thinking


class ChatChoice:
    """One of the n answers: engine outputs in, OpenAI deltas out."""

    def __init__(self, index: int, prompt: ChatPrompt, request: ChatRequest, tokenizer: Tokenizer) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.content = ""
        self.reasoning = ""
        self.tool_calls: list[dict[str, Any]] = []
        self.logprobs: list[TokenLogprob] = []
        self._mode = prompt.mode
        self._wants_logprobs = bool(request.logprobs)
        self._tokenizer = tokenizer
        has_tools = request.may_call
        self._parser = OutputParser(
            prompt.mode,
            starts_in_thought=prompt.starts_in_thought,
            tools=has_tools,
            thinking_off=prompt.is_thinking_off,
        )
        # The prompt ends in the opening tag; a client that reads only content gets a whole pair.
        self._lead = OPEN_TAG if prompt.starts_in_thought and prompt.mode == "inline" else ""
        self._constraint = prompt.constraints[index]
        is_json = self._constraint is not None and not has_tools
        self._json_start = _JsonStart(prompt.starts_in_thought) if is_json else None
        is_action = isinstance(self._constraint, ActionConstraint)
        self._action_start = _ActionStart() if is_action and prompt.mode != "inline" else None

    def push(self, output: SequenceOutput) -> list[dict[str, Any]]:
        """Take in one output of the engine; the deltas it makes. Raises EngineError if the engine gave up."""
        if output.finish_reason == "error":
            self._raise_error(output.error)
        if output.logprobs:
            self.logprobs += output.logprobs
        text, self._lead = self._lead + output.text, ""
        rest = ""
        if self._json_start is not None:
            text, rest = self._json_start.split(text)
        if self._action_start is not None:
            rest = self._action_start.strip(rest)
        deltas = self._parser.push(text) if text else []
        if rest:
            deltas.append(Delta("content", rest))
        if output.finish_reason is not None:
            # JSON went past the parser, which must not take the thought for the only content there is.
            has_json = self._json_start is not None and self._json_start.has_ended
            if self._json_start is not None and (held := self._json_start.flush()):
                deltas += self._parser.push(held)
            deltas += self._parser.finish("length" if has_json else output.finish_reason)
            self.stop_reason = output.stop_reason
        result = [delta for parsed in deltas if (delta := self._take(parsed))]
        if output.finish_reason is not None:
            has_calls = bool(self.tool_calls) and output.finish_reason == "stop"
            self.finish_reason = "tool_calls" if has_calls else output.finish_reason
        return result

    def _raise_error(self, problem: str | None) -> NoReturn:
        if self._constraint is not None and self._constraint.has_failed:
            raise RequestError(
                "response_format: the answer's grammar became too complex to go on; use a simpler schema",
                param="response_format",
                code="invalid_schema",
            )
        raise EngineError(problem or "the engine failed on this request")

    def _take(self, delta: Delta) -> dict[str, Any]:
        """Keep a delta for the whole message, and give it OpenAI's form."""
        if delta.kind == "content":
            self.content += delta.text
            return {"content": delta.text} if delta.text else {}
        if delta.kind == "reasoning":
            self.reasoning += delta.text
            return {"reasoning_content": delta.text, "reasoning": delta.text} if delta.text else {}
        return {"tool_calls": [self._take_call(delta)]}

    def _take_call(self, delta: Delta) -> dict[str, Any]:
        index, function = delta.tool_index or 0, {}
        while len(self.tool_calls) <= index:
            empty = {"name": "", "arguments": ""}
            self.tool_calls.append({"id": "", "type": "function", "function": empty})
        call = self.tool_calls[index]
        chunk: dict[str, Any] = {"index": index}
        if delta.tool_id:
            call["id"] = delta.tool_id
            chunk.update(id=delta.tool_id, type="function")
        if delta.tool_name:
            call["function"]["name"] += delta.tool_name
            function["name"] = delta.tool_name
        call["function"]["arguments"] += delta.tool_arguments or ""
        function["arguments"] = delta.tool_arguments or ""
        return {**chunk, "function": function}

    def take_logprobs(self) -> dict[str, Any] | None:
        """The log probabilities not given out yet, in OpenAI's form; None if they were not asked for."""
        if not self._wants_logprobs:
            return None
        pending, self.logprobs = self.logprobs, []
        return chat_logprobs(self._tokenizer, pending)

    def message(self) -> dict[str, Any]:
        """The whole assistant message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self._mode == "split":
            message["reasoning_content"] = message["reasoning"] = self.reasoning or None
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
            message["content"] = self.content or None
        return message


class _JsonStart:
    """Where JSON begins after a thought: from there on a tag in a string is text like any other."""

    def __init__(self, starts_in_thought: bool) -> None:
        self._is_in_thought = starts_in_thought
        self.has_ended = False
        self._held = ""  # white space and what may become a thought's opening tag
        self._tail = ""

    def split(self, text: str) -> tuple[str, str]:
        """(for the parser, for the content as it is)."""
        if self.has_ended:
            return "", text
        if not self._is_in_thought:
            text = self._held + text
            self._held, start = "", text.lstrip()
            if OPEN_TAG.startswith(start) and start != OPEN_TAG:
                self._held = text
                return "", ""
            self._is_in_thought = start.startswith(OPEN_TAG)
            if not self._is_in_thought:
                self.has_ended = True
                return "", text
        seen = self._tail + text
        end = seen.find(CLOSE_TAG) + len(CLOSE_TAG) - len(self._tail)
        if CLOSE_TAG in seen:
            self.has_ended = True
            return text[:end], text[end:]
        self._tail = seen[-len(CLOSE_TAG) :]
        return text, ""

    def flush(self) -> str:
        """What was held back, at the end of an answer that got no further."""
        held, self._held = self._held, ""
        return held


class _ActionStart:
    """Takes the line breaks and the <answer> tag away that a model may write before its action."""

    def __init__(self) -> None:
        self._held: str | None = ""

    def strip(self, text: str) -> str:
        """The part of text that belongs to the action."""
        if self._held is None:
            return text
        self._held = (self._held + text).lstrip()
        if ANSWER_TAG.startswith(self._held):
            return ""
        action = self._held.removeprefix(ANSWER_TAG).lstrip()
        if action:
            self._held = None
        return action


class ChatJob(Struct):
    """One chat request under way."""

    service: Service
    request: ChatRequest
    setting: ThinkingSetting
    model: str
    tally: Tally
    stream: OutputStream
    choices: dict[str, ChatChoice]
    reply_id: str
    created_s: int
    fusions: list[TurnFusion] = field(default_factory=list)

    def close(self) -> None:
        """Cancel what has not finished, and count the request."""
        self.stream.cancel()
        self.tally.close()

    async def whole(self) -> Response:
        """The reply in one piece."""
        async for output in self.stream:
            self._take(output)
            self.choices[output.request_id].push(output)
        self._prebuild_next_turn()
        choices = [
            {
                "index": choice.index,
                "message": choice.message(),
                "logprobs": choice.take_logprobs(),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for choice in self.choices.values()
        ]
        body = self._envelope("chat.completion", choices)
        return JSONResponse({**body, "usage": self.tally.usage(), **self._account()})

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The reply's chunks: role, deltas, finish reasons, usage where asked for."""
        wants_usage = bool(self.request.stream_options and self.request.stream_options.include_usage)
        usage_is_null = {"usage": None} if wants_usage else {}
        for choice in self.choices.values():
            yield {**self._chunk(choice, {"role": "assistant", "content": ""}), **usage_is_null}
        num_open = len(self.choices)
        async for output in self.stream:
            self._take(output)
            choice = self.choices[output.request_id]
            for delta in choice.push(output):
                yield {**self._chunk(choice, delta), **usage_is_null}
            if choice.finish_reason is not None:
                num_open -= 1
                if num_open == 0:
                    self._prebuild_next_turn()
                last = self._account() if num_open == 0 and not wants_usage else {}
                yield {**self._chunk(choice, {}), **usage_is_null, **last}
        if wants_usage:
            body = self._envelope("chat.completion.chunk", [])
            yield {**body, "usage": self.tally.usage(), **self._account()}

    def _take(self, output: SequenceOutput) -> None:
        self.tally.take(output)
        self.fusions = output.fusions or self.fusions

    def _account(self) -> dict[str, Any]:
        """What a reply tells beside its answer and usage: timings, and fusion where it was asked for."""
        account: dict[str, Any] = {"timings": self.tally.timings()}
        if self.request.return_fusion:
            account["fusion"] = fusion_report(self.fusions, with_gates=self.request.return_fusion == "gates")
        return account

    def _prebuild_next_turn(self) -> None:
        """The answer is there, its client will be busy with it for a while."""
        if len(self.choices) == 1:
            (choice,) = self.choices.values()
            self.service.prebuild(partial(next_prefix, self.service, self.request, self.setting, choice.content))

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.reply_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }

    def _chunk(self, choice: ChatChoice, delta: dict[str, Any]) -> dict[str, Any]:
        is_last = choice.finish_reason is not None and not delta
        entry = {
            "index": choice.index,
            "delta": delta,
            "logprobs": choice.take_logprobs() if choice.logprobs else None,
            "finish_reason": choice.finish_reason if is_last else None,
        }
        if is_last:
            entry["stop_reason"] = choice.stop_reason
        return self._envelope("chat.completion.chunk", [entry])


async def read_media(service: Service, request: ChatRequest) -> RequestMedia | None:
    """Fetch and decode a request's pictures and sounds; None where this server reads text only."""
    door = service.media
    parts = find_parts(request.messages) if door is not None else []
    check_settings(door, parts, request)
    if door is None:
        return None
    check_kinds(door, parts)
    files = await door.sources.read(parts)
    return await service.prepare(partial(decode, door, parts, files, request))


async def start_chat(service: Service, fields: dict[str, Any]) -> ChatJob:
    """Check a body, build its prompt and submit its sequences."""
    tally = Tally(service.metrics)
    request = validate(ChatRequest, fields)
    setting = read_thinking(fields)
    model = service.check_model(request.model)
    service.driver.check_ready()
    media = await read_media(service, request)
    prompt = await service.prepare(partial(build_chat_prompt, service, request, setting, media))
    tally.note_media(prompt.media_report, media.decode_ms if media is not None else 0.0)
    tally.template_ms, tally.tokenize_ms = prompt.template_ms, prompt.tokenize_ms
    tally.prompt_tokens = len(prompt.token_ids)
    top = (request.top_logprobs or 0) if request.logprobs else None
    max_tokens = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    reply_id = new_id("chatcmpl")
    sequences, choices = [], {}
    for index, constraint in enumerate(prompt.constraints):
        params = sampling_params(
            service, request, index=index, max_tokens=max_tokens, logprobs=top, banned=prompt.banned_token_ids
        )
        sequence = Sequence(
            f"{reply_id}-{index}",
            prompt.token_ids,
            params,
            thinking=prompt.thinking,
            constraint=constraint,
            cache_salt=(request.cache_salt or "").encode(),
            arrival_s=time.monotonic(),
            media=prompt.media.copy() if prompt.media is not None else None,
        )
        sequences.append(sequence)
        choices[sequence.request_id] = ChatChoice(index, prompt, request, service.tokenizer)
    stream = await service.submit(sequences)
    return ChatJob(service, request, setting, model, tally, stream, choices, reply_id, int(time.time()))


async def chat_completions(service: Service, http: Request) -> Response:
    """The route: SSE with `stream: true`, one JSON reply otherwise."""
    fields = await read_object(http, service.settings)
    start = partial(start_chat, service, fields)
    is_stream = fields.get("stream") is True
    return await respond(http, start, is_stream=is_stream, keep_alive_s=service.settings.keep_alive_s)
