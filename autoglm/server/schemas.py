"""OpenAI request types and their validation; knows neither tokenizer nor engine.

Unknown fields are ignored, as OpenAI's own clients add new ones; a field that is known and not
served here is refused by name, so that nobody gets an answer that silently left something out.
Numeric ranges of sampling fields live in engine.sampling.SamplingParams and nowhere else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from autoglm.errors import RequestError

MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_CHOICES = 16
MAX_TOOLS = 128
MAX_PROMPTS = 64
MAX_TOKEN_ID = (1 << 31) - 1

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


def _refusal(field: str, problem: str, code: str = "invalid_value") -> RequestError:
    return RequestError(f"{field}: {problem}", param=field, code=code)


class Body(BaseModel):
    """Base of all request types: strict types, no NaN, unknown fields ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=())


def _stop_list(value: object) -> object:
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
StopList = Annotated[list[StopString], BeforeValidator(_stop_list), Field(max_length=MAX_STOPS)]


def _logit_bias(value: object) -> object:
    """OpenAI sends token ids as JSON keys, that is as strings."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("expected an object of token id to bias")
    if len(value) > 1024:
        raise ValueError("holds more than 1024 tokens")
    result: dict[int, float] = {}
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
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_logit_bias)] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: StopList = Field(default_factory=list)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, StringConstraints(max_length=256)] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> SamplingFields:
        if self.repeat_penalty is not None and self.repetition_penalty not in (None, self.repeat_penalty):
            raise _refusal("repeat_penalty", "contradicts repetition_penalty; send one of them", "conflicting_values")
        if self.stream_options is not None and not self.stream:
            raise _refusal("stream_options", "is only allowed with stream: true")
        return self


class ToolCallFunction(Body):
    """Name and arguments (a JSON text) of a call the model made earlier."""

    name: FunctionName
    arguments: str | dict[str, Any] = ""


class ToolCall(Body):
    """One tool call of an assistant message in the history."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: ToolCallFunction


class Message(Body):
    """One chat message. `content` is checked in prompts.py, where its parts can be named."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Any = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
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

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Body):
    """The function a tool choice names."""

    name: FunctionName


class NamedTool(Body):
    """`tool_choice` that names one function."""

    type: Literal["function"]
    function: NamedFunction


def _tool_choice(value: object) -> object:
    if isinstance(value, str) and value not in ("none", "auto", "required"):
        raise ValueError("must be none, auto, required or an object that names a function")
    if value is not None and not isinstance(value, (str, dict)):
        raise ValueError("must be none, auto, required or an object that names a function")
    return value if value is None or isinstance(value, str) else NamedTool.model_validate(value)


ToolChoice = Annotated[Any, BeforeValidator(_tool_choice)]


class JsonSchemaFormat(Body):
    """The `json_schema` member of a response format."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, populate_by_name=True)
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """text, any JSON object, JSON of one schema, or one action of the AutoGLM language."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, populate_by_name=True)
    type: Literal["text", "json_object", "json_schema", "autoglm_action"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise _refusal("response_format.json_schema.schema", "is required with type json_schema")
        return self

    @property
    def schema_object(self) -> dict[str, Any] | bool | None:
        """The schema the answer must follow; None means any JSON object."""
        if self.type == "json_schema" and self.json_schema is not None:
            return self.json_schema.schema_
        return self.schema_


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


def _refuse_unserved(fields: object, unserved: dict[str, str]) -> object:
    if isinstance(fields, dict):
        for name, mend in unserved.items():
            if fields.get(name) not in (None, False):
                raise _refusal(name, f"is not served here: {mend}", "unsupported_parameter")
    return fields


class ChatRequest(SamplingFields):
    """Body of /v1/chat/completions; the thinking dial is read apart (thinking.py)."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    max_pixels: int | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    return_fusion: bool | Literal["gates"] | None = None
    modalities: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, fields: object) -> object:
        return _refuse_unserved(fields, UNSERVED_CHAT)

    @model_validator(mode="after")
    def _check_fields(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise _refusal("max_completion_tokens", "contradicts max_tokens; send one of them", "conflicting_values")
        if self.top_logprobs is not None and not self.logprobs:
            raise _refusal("top_logprobs", "needs logprobs: true")
        if self.modalities is not None and self.modalities != ["text"]:
            raise _refusal("modalities", 'this model writes text only; send ["text"] or leave it out')
        if self.continue_final_message or self.add_generation_prompt is False:
            raise _refusal("continue_final_message", "is not served here; end with a user message")
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise _refusal("tools", "two functions have the same name")
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise _refusal("tool_choice", "needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise _refusal("tool_choice", "names a function that is not in tools")


def _prompt(value: object) -> object:
    """A string, strings, token ids or lists of token ids -> a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    if all(isinstance(item, str) for item in value):
        prompts: list[Any] = value
    elif all(isinstance(item, list) for item in value):
        prompts = value
    else:
        prompts = [value]
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"holds {len(prompts)} prompts, at most {MAX_PROMPTS} are taken at once")
    for prompt in prompts:
        if isinstance(prompt, list) and not all(
            isinstance(token, int) and not isinstance(token, bool) and 0 <= token <= MAX_TOKEN_ID for token in prompt
        ):
            raise ValueError("a list of token ids may hold whole numbers from 0 only")
    return prompts


class CompletionRequest(SamplingFields):
    """Body of /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(_prompt)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, fields: object) -> object:
        return _refuse_unserved(fields, UNSERVED_COMPLETION)

    @model_validator(mode="after")
    def _check_fields(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _refusal("best_of", "other than n is not served here; leave it out", "unsupported_parameter")
        if self.echo and self.logprobs is not None:
            raise _refusal(
                "echo",
                "with logprobs is not served here: the prompt's log probabilities are not kept",
                "unsupported_parameter",
            )
        return self


class TokenizeRequest(Body):
    """Body of /tokenize, in llama-server's form (content) or vLLM's (prompt or messages)."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    parse_special: bool = True
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    with_pieces: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> TokenizeRequest:
        if sum(value is not None for value in (self.content, self.prompt, self.messages)) != 1:
            raise _refusal("content", "send exactly one of content, prompt and messages")
        return self


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20)]
