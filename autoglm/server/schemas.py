"""OpenAI request types and their validation; knows neither tokenizer nor engine.

Unknown fields are ignored, as OpenAI's own clients add new ones; a field that is known and not
served here is refused by name, so that nobody gets an answer that silently left something out.
Numeric ranges of sampling fields live in engine.sampling.SamplingParams and nowhere else.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from autoglm.errors import RequestError

MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_CHOICES = 16
MAX_TOOLS = 128
MAX_PROMPTS = 64
MAX_TOKEN_ID = (1 << 31) - 1


def one_of(*choices: str) -> Meta:
    """A string out of a few. A Literal's refusal would quote the value and not tell the choices."""
    return Meta(pattern=rf"^({'|'.join(choices)})\Z")


# JSON has no infinity, but 1e999 comes to it.
Number = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
# \Z, as Python's $ also stands before a line break at the end.
FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}\Z")]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]


def _refusal(field: str, problem: str, code: str = "invalid_value") -> RequestError:
    return RequestError(f"{field}: {problem}", param=field, code=code)


class Body(msgspec.Struct, omit_defaults=True):
    """Base of all request types: strict types, unknown fields ignored.

    unserved  known fields that are refused: name -> the mend
    """

    unserved: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def refuse_unserved(cls, fields: Mapping[str, Any]) -> None:
        """Raises RequestError naming a field that is not served here, unless it is null or false."""
        for name, mend in cls.unserved.items():
            if fields.get(name) not in (None, False):
                raise _refusal(name, f"is not served here: {mend}", "unsupported_parameter")


def take(kind: Any, value: object) -> Any:
    """Asks one of our own types, for fields that come in several forms, to take a value of JSON's.

    Its `take` raises ValueError for what is no such value; msgspec names the field.
    """
    return kind.take(value)


def _convert(value: object, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        # msgspec puts the field's path behind every ValueError but its own.
        raise ValueError(str(error)) from None


class StopList(list[str]):
    """`stop`: one string or several."""

    @classmethod
    def take(cls, value: object) -> StopList:
        if value is None or value == "":
            return cls()
        stops = cls(_convert([value] if isinstance(value, str) else value, list[StopString]))
        if len(stops) > MAX_STOPS:
            raise ValueError(f"expected a list of length <= {MAX_STOPS}")
        return stops


class LogitBias(dict[int, float]):
    """`logit_bias`: OpenAI sends token ids as JSON keys, that is as strings."""

    @classmethod
    def take(cls, value: object) -> LogitBias:
        result = cls()
        if value is None:
            return result
        if not isinstance(value, Mapping):
            raise ValueError("expected an object of token id to bias")
        if len(value) > 1024:
            raise ValueError("holds more than 1024 tokens")
        for key, bias in value.items():
            if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10):
                raise ValueError("every key must be a token id")
            if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
                raise ValueError("every bias must be a number from -100 to 100")
            result[int(key)] = float(bias)
        return result


class StreamOptions(Body):
    """`stream_options` of a streamed request."""

    include_usage: bool | None = None


class SamplingFields(Body):
    """What chat and plain completions have in common."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: Number | None = None
    top_k: int | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    repeat_penalty: Number | None = None
    logit_bias: LogitBias = msgspec.field(default_factory=LogitBias)
    seed: Annotated[int, Meta(ge=-(1 << 63))] | None = None
    stop: StopList = msgspec.field(default_factory=StopList)
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None

    def __post_init__(self) -> None:
        if self.seed is not None and self.seed >= 1 << 64:  # past what Meta can hold
            raise _refusal("seed", f"expected an integer < {1 << 64}")
        if self.repeat_penalty is not None and self.repetition_penalty not in (None, self.repeat_penalty):
            raise _refusal("repeat_penalty", "contradicts repetition_penalty; send one of them", "conflicting_values")
        if self.stream_options is not None and not self.stream:
            raise _refusal("stream_options", "is only allowed with stream: true")


class ToolCallFunction(Body):
    """Name and arguments (a JSON text) of a call the model made earlier."""

    name: FunctionName
    arguments: str | dict[str, Any] = ""


class ToolCall(Body, kw_only=True):
    """One tool call of an assistant message in the history."""

    id: str | None = None
    type: Annotated[str, one_of("function")] = "function"
    function: ToolCallFunction


class Message(Body):
    """One chat message. `content` is checked in prompts.py, where its parts can be named."""

    role: Annotated[str, one_of("system", "developer", "user", "assistant", "tool", "function")]
    content: Any = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class FunctionSpec(Body):
    """A function the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """One entry of `tools`."""

    type: Annotated[str, one_of("function")]
    function: FunctionSpec


class NamedFunction(Body):
    """The function a tool choice names."""

    name: FunctionName


class NamedTool(Body):
    """`tool_choice` that names one function."""

    type: Annotated[str, one_of("function")]
    function: NamedFunction


class ToolChoice:
    """`tool_choice`: none, auto, required, or function, with the name of the one to call."""

    def __init__(self, mode: str = "auto", name: str | None = None) -> None:
        self.mode = mode
        self.name = name

    @classmethod
    def take(cls, value: object) -> ToolChoice:
        if value is None:
            return cls()
        if isinstance(value, Mapping):
            return cls("function", _convert(value, NamedTool).function.name)
        if isinstance(value, str) and value in ("none", "auto", "required"):
            return cls(value)
        raise ValueError("must be none, auto, required or an object that names a function")


class JsonSchemaFormat(Body):
    """The `json_schema` member of a response format."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """text, any JSON object, JSON of one schema, or one action of the AutoGLM language."""

    type: Annotated[str, one_of("text", "json_object", "json_schema", "autoglm_action")]
    json_schema: JsonSchemaFormat | None = None
    schema: dict[str, Any] | None = None

    @property
    def schema_object(self) -> dict[str, Any] | bool | None:
        """The schema the answer must follow; None means any JSON object."""
        if self.type == "json_schema":
            return None if self.json_schema is None else self.json_schema.schema
        return self.schema


# Known fields that this server does not serve: name -> the mend. A null value is always taken.
UNSERVED_CHAT = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this model writes text only",
    "prediction": "predicted outputs are not served; leave it out",
    "web_search_options": "this server reaches nothing outside; leave it out",
    "grammar": "use response_format with type json_schema",
    "guided_json": "use response_format with type json_schema",
    "guided_regex": "use response_format with type json_schema and a pattern",
    "guided_choice": "use response_format with type json_schema and an enum",
    "guided_grammar": "use response_format with type json_schema",
    "structured_outputs": "use response_format with type json_schema",
    "prompt_logprobs": "log probabilities of the prompt are not served; leave it out",
    "use_beam_search": "beam search is not served; leave it out",
}
UNSERVED_COMPLETION = {
    "suffix": "filling in the middle is not served; leave it out",
    **{name: mend for name, mend in UNSERVED_CHAT.items() if name in ("prompt_logprobs", "use_beam_search")},
}


class ChatRequest(SamplingFields, kw_only=True):
    """Body of /v1/chat/completions; the thinking dial is read apart (thinking.py)."""

    unserved: ClassVar[Mapping[str, str]] = UNSERVED_CHAT

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice = msgspec.field(default_factory=ToolChoice)
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    max_pixels: int | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    return_fusion: bool | str | None = None
    modalities: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    def __post_init__(self) -> None:
        self._check_format()
        super().__post_init__()
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise _refusal("max_completion_tokens", "contradicts max_tokens; send one of them", "conflicting_values")
        if self.top_logprobs is not None and not self.logprobs:
            raise _refusal("top_logprobs", "needs logprobs: true")
        if self.modalities is not None and self.modalities != ["text"]:
            raise _refusal("modalities", 'this model writes text only; send ["text"] or leave it out')
        if self.continue_final_message or self.add_generation_prompt is False:
            raise _refusal("continue_final_message", "is not served here; end with a user message")
        self._check_tools()

    @property
    def may_call(self) -> bool:
        """Whether the answer may be a tool call."""
        return bool(self.tools) and self.tool_choice.mode != "none"

    def _check_format(self) -> None:
        chosen = self.response_format
        if chosen is not None and chosen.type == "json_schema" and chosen.schema_object is None:
            raise _refusal("response_format.json_schema.schema", "is required with type json_schema")
        if isinstance(self.return_fusion, str) and self.return_fusion != "gates":
            raise _refusal("return_fusion", "must be true, false or gates")

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise _refusal("tools", "two functions have the same name")
        if not names and self.tool_choice.mode not in ("none", "auto"):
            raise _refusal("tool_choice", "needs tools")
        if self.tool_choice.name is not None and self.tool_choice.name not in names:
            raise _refusal("tool_choice", "names a function that is not in tools")


class Prompts(list[Any]):
    """`prompt`: a string, strings, token ids or lists of token ids; here a list of strings or lists of ids."""

    @classmethod
    def take(cls, value: object) -> Prompts:
        if isinstance(value, str):
            return cls([value])
        if not isinstance(value, list) or not value:
            raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
        is_many = all(isinstance(item, str) for item in value) or all(isinstance(item, list) for item in value)
        prompts = cls(value if is_many else [value])
        if len(prompts) > MAX_PROMPTS:
            raise ValueError(f"holds {len(prompts)} prompts, at most {MAX_PROMPTS} are taken at once")
        for prompt in prompts:
            if isinstance(prompt, list) and not all(
                isinstance(token, int) and not isinstance(token, bool) and 0 <= token <= MAX_TOKEN_ID
                for token in prompt
            ):
                raise ValueError("a list of token ids may hold whole numbers from 0 only")
        return prompts


class CompletionRequest(SamplingFields, kw_only=True):
    """Body of /v1/completions."""

    unserved: ClassVar[Mapping[str, str]] = UNSERVED_COMPLETION

    prompt: Prompts
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _refusal("best_of", "other than n is not served here; leave it out", "unsupported_parameter")
        if self.echo and self.logprobs is not None:
            raise _refusal(
                "echo",
                "with logprobs is not served here: the prompt's log probabilities are not kept",
                "unsupported_parameter",
            )


class TokenizeRequest(Body):
    """Body of /tokenize, in llama-server's form (content) or vLLM's (prompt or messages)."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    parse_special: bool = True
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    with_pieces: bool | None = None
    return_token_strs: bool | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.content, self.prompt, self.messages)) != 1:
            raise _refusal("content", "send exactly one of content, prompt and messages")


class DetokenizeRequest(Body, kw_only=True):
    """Body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Meta(max_length=1 << 20)]
