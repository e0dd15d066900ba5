"""Chat request -> prompt tokens, thinking control and constraint. Runs on a worker thread."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
from msgspec import Struct

from autoglm.chat.action_grammar import MAX_END_BYTES, ActionConstraint
from autoglm.chat.constraint import GrammarConstraint
from autoglm.chat.tokenizer import Tokenizer
from autoglm.engine.thinking import MIN_ANSWER_TOKENS, ThinkingControl
from autoglm.errors import RequestError
from autoglm.media.prompt_media import PromptMedia
from autoglm.server.media import MediaReport, RequestMedia, is_media, template_part, widen
from autoglm.server.schemas import ChatRequest, Message, Tool
from autoglm.server.service import Service
from autoglm.server.thinking import MAX_BUDGET, ReasoningMode, ThinkingSetting

OPEN_TAG, CLOSE_TAG, ANSWER_TAG = "<think>", "</think>", "<answer>"
# A generation prompt ends in a tag and at most some white space after it.
TAIL_TOKENS = 4
DIAL_NAMES = frozenset({"enable_thinking", "thinking_budget", "reasoning_effort", "thinking"})

MEDIA_PARTS = {
    "image_url": "images",
    "image": "images",
    "input_image": "images",
    "video_url": "videos",
    "video": "videos",
    "input_audio": "sound",
    "audio_url": "sound",
    "audio": "sound",
    "file": "files",
    "input_file": "files",
}


class ChatPrompt(Struct, frozen=True):
    """What a chat request came to.

    starts_in_thought  the prompt ends inside a thought that the answer goes on with
    mode               where the thought goes, decided also where the client left it open
    """

    token_ids: list[int]
    thinking: ThinkingControl | None
    banned_token_ids: frozenset[int]
    constraints: list[GrammarConstraint | None]
    starts_in_thought: bool
    is_thinking_off: bool
    mode: ReasoningMode
    template_ms: float
    tokenize_ms: float
    media: PromptMedia | None = None
    media_report: MediaReport = MediaReport()


def content_parts(content: object, path: str, *, takes_media: bool) -> str | list[dict[str, str]]:
    """A message's content for the template: text (parts joined by line breaks), or parts where media are among them.

    Raises RequestError naming the part for anything this model cannot read.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{path}: must be a string or a list of content parts", param=path, code="invalid_value")
    if not (takes_media and any(is_media(part) for part in content)):
        return "\n".join(_part_text(part, f"{path}[{i}]", takes_media) for i, part in enumerate(content))
    return [
        template_part(part) if is_media(part) else {"type": "text", "text": _part_text(part, f"{path}[{i}]", True)}
        for i, part in enumerate(content)
    ]


def _part_text(part: object, path: str, takes_media: bool) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RequestError(f"{path}: must be an object with a type", param=path, code="invalid_value")
    kind = part.get("type")
    if isinstance(kind, str) and kind in MEDIA_PARTS:
        reason = (
            f"{MEDIA_PARTS[kind]} in parts of type {kind} are not read here; send image_url, input_audio or audio_url"
            if takes_media
            else f"this model was loaded without an mmproj: it reads text only, not {MEDIA_PARTS[kind]}; "
            "mend: send text, or serve the model with --mmproj FILE (its mmproj-*.gguf)"
        )
        raise RequestError(
            f"{path}: {reason}",
            param=path,
            code="unsupported_content",
        )
    text = part.get("refusal") if kind == "refusal" else part.get("text")
    if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
        raise RequestError(f'{path}: must be {{"type": "text", "text": "..."}}', param=path, code="invalid_value")
    return text


def template_messages(messages: list[Message], *, takes_media: bool = False) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: text content, tool arguments as objects, two roles renamed."""
    renamed = {"developer": "system", "function": "tool"}
    result = []
    for i, message in enumerate(messages):
        entry: dict[str, Any] = {"role": renamed.get(message.role, message.role)}
        if message.content is None:
            if message.role != "assistant":
                path = f"messages[{i}].content"
                raise RequestError(f"{path}: is required", param=path, code="missing_required_parameter")
            entry["content"] = ""
        else:
            path = f"messages[{i}].content"
            entry["content"] = content_parts(message.content, path, takes_media=takes_media)
        reasoning = message.reasoning_content or message.reasoning
        if reasoning:
            entry["reasoning_content"] = reasoning
        if message.tool_calls:
            entry["tool_calls"] = [
                _template_call(call.function.name, call.function.arguments, call.id) for call in message.tool_calls
            ]
        for name in ("name", "tool_call_id"):
            if getattr(message, name) is not None:
                entry[name] = getattr(message, name)
        result.append(entry)
    return result


def _template_call(name: str, arguments: str | dict[str, Any], call_id: str | None) -> dict[str, Any]:
    """Templates print the arguments as JSON themselves; a text that is no object is left as it is."""
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            parsed = arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_dicts(tools: list[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools as plain dicts, for templates and grammars."""
    return [msgspec.to_builtins(tool) for tool in tools] if tools else None


def template_extra(request: ChatRequest) -> dict[str, Any]:
    """chat_template_kwargs for the template itself: what is neither the dial nor no name at all."""
    extra = request.chat_template_kwargs or {}
    return {name: value for name, value in extra.items() if name not in DIAL_NAMES and name.isidentifier()}


def render_chat(
    service: Service, messages: list[Message], tools: list[Tool] | None, enabled: bool | None, extra: dict[str, Any]
) -> tuple[list[int], float]:
    """Token ids of a conversation with its generation prompt, and the milliseconds of the template in it."""
    entries = template_messages(messages, takes_media=service.media is not None)
    num_bytes = sum(_num_chars(entry["content"]) for entry in entries)
    service.check_text_length(num_bytes, "messages")
    started_s = time.monotonic()
    rendered = service.template.render(
        entries, tools=tool_dicts(tools), add_generation_prompt=True, enable_thinking=enabled, extra=extra
    )
    template_ms = (time.monotonic() - started_s) * 1e3
    return service.template.tokenize(service.tokenizer, rendered), template_ms


def _num_chars(content: str | list[dict[str, str]]) -> int:
    return len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)


class _Tags:
    """The model's thinking tags; None for a model that has none of its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.open, self.close = tokenizer.token_id(OPEN_TAG), tokenizer.token_id(CLOSE_TAG)
        self.answer = tokenizer.token_id(ANSWER_TAG)
        self._tokenizer = tokenizer

    def last_in_tail(self, token_ids: list[int]) -> int | None:
        """The thinking tag the generation prompt ends in, None if it ends in anything else."""
        for token_id in reversed(token_ids[-TAIL_TOKENS:]):
            if token_id in (self.open, self.close):
                return token_id
            if self._tokenizer.token_text(token_id).strip():
                return None
        return None


def set_thinking(
    tokenizer: Tokenizer,
    token_ids: list[int],
    setting: ThinkingSetting,
    mode: ReasoningMode,
    min_answer: int | None = None,
) -> tuple[ThinkingControl | None, frozenset[int], bool]:
    """Make the prompt's end obey the dial; returns control, banned ids and whether the answer starts in a thought.

    Templates may or may not know enable_thinking, so the end of the prompt is looked at instead:
    off closes (or writes an empty) thought, opens GLM's answer and bans both tags; on opens a thought.
    A model without thinking tags of its own is left alone. min_answer: an answer has to come, and may take so many
    tokens.
    """
    tags = _Tags(tokenizer)
    if tags.open is None or tags.close is None:
        return None, frozenset(), False
    last = tags.last_in_tail(token_ids)
    open_ids, close_ids = (tags.open,), (tags.close,)
    if setting.enabled is False:
        if last != tags.close:
            token_ids += close_ids if last == tags.open else (tags.open, tags.close)
        if tags.answer is not None:
            # GLM-4.1V goes on thinking in plain text after an empty thought; after its answer tag it does not.
            token_ids.append(tags.answer)
        return ThinkingControl(0, open_ids, close_ids), frozenset({tags.open, tags.close}), False
    if setting.enabled and last != tags.open:
        token_ids.append(tags.open)
        last = tags.open
    starts_in_thought = last == tags.open
    budget = setting.budget
    if budget is None and (mode != "inline" or min_answer is not None):
        # With a budget, however large, the engine closes the thought in time for an answer before max_tokens.
        budget = MAX_BUDGET
    control = ThinkingControl(
        budget, open_ids, close_ids, starts_in_thought, MIN_ANSWER_TOKENS if min_answer is None else min_answer
    )
    return control, frozenset(), starts_in_thought


def _wants_action(service: Service, request: ChatRequest) -> bool:
    """Whether the answer is to be an action: by response_format, or by default where it and tools are left out."""
    chosen = request.response_format
    if chosen is None:
        return service.settings.actions and not request.tools
    if chosen.type == "autoglm_action" and request.may_call:
        raise RequestError("tools: cannot go with response_format autoglm_action; leave one of them out", param="tools")
    return chosen.type == "autoglm_action"


def _constraint(service: Service, request: ChatRequest) -> GrammarConstraint | None:
    """The grammar that response_format and tool_choice ask for together, if any."""
    if _wants_action(service, request):
        return service.grammars.action()
    chosen = request.response_format
    answer_schema: dict[str, Any] | bool | None = None
    if chosen is not None and chosen.type != "text":
        answer_schema = chosen.schema_object
        answer_schema = {"type": "object"} if answer_schema is None else answer_schema
    tools = tool_dicts(request.tools)
    choice = request.tool_choice
    parallel = request.parallel_tool_calls is not False
    if tools and choice.name is not None:
        return service.grammars.tools(tools, choice.name)
    if tools and choice.mode == "required":
        return service.grammars.tools(tools, "required", parallel=parallel)
    if answer_schema is None:
        return None
    if tools and choice.mode != "none":
        return service.grammars.tools(tools, "required", parallel=parallel, answer_schema=answer_schema)
    return service.grammars.json_schema(answer_schema)


def _check_room(
    service: Service, request: ChatRequest, num_prompt_tokens: int, thinking: ThinkingControl | None
) -> None:
    """Raise unless the shortest action fits, after a thought that is closed at once where one may be opened."""
    needed = service.grammars.min_action_tokens()
    if thinking is not None and thinking.budget != 0:
        needed += len(thinking.open_ids) + len(thinking.close_ids)
    field = "max_tokens" if request.max_tokens is not None else "max_completion_tokens"
    given = getattr(request, field)
    if given is not None and 0 < given < needed:
        raise RequestError(f"{field}: is {given}, an action needs at least {needed} tokens here", param=field)
    service.check_length(num_prompt_tokens, "messages", needed)


def _media_share(report: MediaReport) -> str:
    """For the refusal of a prompt that is too long: what its media have to do with it."""
    if not report.image_tokens and not report.audio_tokens:
        return ""
    return (
        f", {report.image_tokens} of them of pictures and {report.audio_tokens} of sounds: send fewer of them, or "
        "smaller pictures (max_pixels)"
    )


def build_chat_prompt(
    service: Service, request: ChatRequest, setting: ThinkingSetting, media: RequestMedia | None = None
) -> ChatPrompt:
    """Everything a chat request needs before its sequences are made.

    media  the pictures and sounds among the messages, decoded

    Raises RequestError naming the field, ContextLengthError.
    """
    constraints = [_constraint(service, request) for _ in range(request.n or 1)]
    is_constrained = constraints[0] is not None
    if is_constrained and (request.stop or request.stop_token_ids or request.ignore_eos):
        field = "stop" if request.stop else "stop_token_ids" if request.stop_token_ids else "ignore_eos"
        raise RequestError(
            f"{field}: cannot go with response_format or a required tool, it would cut the answer short; leave it out"
            + (', or send response_format {"type": "text"}' if request.response_format is None else ""),
            param=field,
            code="invalid_value",
        )
    mode = setting.mode
    if not setting.mode_is_chosen and setting.enabled is False:
        # The prompt then holds the opening tags already, so the closing ones must not stand in the answer.
        mode = "drop"
    elif not setting.mode_is_chosen and is_constrained and (request.response_format or request.tools):
        # Whoever asks for JSON or an action parses the content, so a thought must not stand in it. A client that
        # asked for nothing gets the thought where it always was: Open-AutoGLM shows it and keeps it.
        mode = "split"
    tools = request.tools if request.may_call else None
    started_s = time.monotonic()
    token_ids, template_ms = render_chat(service, request.messages, tools, setting.enabled, template_extra(request))
    tokenize_ms = (time.monotonic() - started_s) * 1e3 - template_ms
    is_action = isinstance(constraints[0], ActionConstraint)
    thinking, banned, starts_in_thought = set_thinking(
        service.tokenizer, token_ids, setting, mode, MAX_END_BYTES if is_action else None
    )
    prompt_media, report = None, MediaReport()
    if media is not None and service.media is not None and (media.pictures or media.sounds):
        token_ids, prompt_media, report = widen(
            service.media, token_ids, media, tells_fusion=bool(request.return_fusion)
        )
    service.check_length(len(token_ids), "messages", detail=_media_share(report))
    if is_action:
        _check_room(service, request, len(token_ids), thinking)
    return ChatPrompt(
        token_ids=token_ids,
        thinking=thinking,
        banned_token_ids=banned | service.tokenizer.unused_token_ids,
        constraints=constraints,
        starts_in_thought=starts_in_thought,
        is_thinking_off=setting.enabled is False,
        mode=mode,
        template_ms=template_ms,
        tokenize_ms=tokenize_ms,
        media=prompt_media,
        media_report=report,
    )
