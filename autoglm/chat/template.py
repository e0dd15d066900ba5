"""Messages -> prompt, through the model's own Jinja template in a sandbox.

Follows the conventions of Hugging Face chat templates: trim_blocks and lstrip_blocks on, loop controls,
raise_exception, strftime_now, a tojson that escapes nothing for HTML, {% generation %} accepted.
Client text cannot form control tokens: see client_text.py.

A template is code out of a model file. The sandbox keeps it from everything outside its variables, and
its size, its output and its string repetition are bounded; its loops are not, beyond Jinja's own limit
on range(), so a hostile file can still waste time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from autoglm.chat.client_text import Marker
from autoglm.chat.default_templates import default_template, spell_out_tools
from autoglm.chat.tokenizer import THINKING_TAGS, Tokenizer, TokenType
from autoglm.errors import FormatError, RequestError
from autoglm.formats.gguf import GGUFFile

MAX_SOURCE_CHARS = 1 << 20
MAX_PROMPT_CHARS = 64 << 20
# Tags of tool calls and results are ordinary text or user-defined tokens in every family served here.
OPEN_TAGS = (*THINKING_TAGS, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# A role may become part of a tag, as in '<|' ~ role ~ '|>', so only known ones pass.
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "observation"})
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "enable_thinking", "bos_token", "eos_token"})
_PROBE = "probe-of-content"
MEDIA_TYPES = ("image", "audio")


class _Refusal(TemplateError):
    """What raise_exception raises: the template's own words to its user."""


class _Generation(Extension):
    """Accepts {% generation %}, which marks answers for training and prints nothing itself."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not available to chat templates")
        for repeated, times in ((left, right), (right, left)):
            if isinstance(repeated, (str, list, tuple)) and isinstance(times, int):
                if len(repeated) * times > MAX_SOURCE_CHARS:
                    raise SecurityError("a chat template repeats a text too often")
        return super().call_binop(context, operator, left, right)


class RenderedPrompt(str):
    """A prompt's text; remembers which characters came from a client, for ChatTemplate.tokenize."""

    marked: str
    mark: str

    def __new__(cls, marked: str, mark: str) -> RenderedPrompt:
        prompt = super().__new__(cls, marked.replace(mark, ""))
        prompt.marked = marked
        prompt.mark = mark
        return prompt


class ChatTemplate:
    """One model's chat template; immutable after construction and safe to share between threads.

    uses_tools  whether the template prints tool definitions itself; if not, they are told in a system text
    """

    def __init__(
        self, source: str, *, bos_token: str = "", eos_token: str = "", control_texts: list[str] | None = None
    ) -> None:
        """Compile a template; FormatError, with the line, if it is not valid Jinja.

        control_texts  spellings client text must not form; without them every < and [ is guarded
        """
        if len(source) > MAX_SOURCE_CHARS:
            raise FormatError(f"chat template is {len(source)} characters long, expected at most {MAX_SOURCE_CHARS}")
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            tree = environment.parse(source)
            self.uses_tools = any(node.name == "tools" for node in tree.find_all(nodes.Name))
            self._template = environment.from_string(tree)
        except (TemplateError, RecursionError) as error:
            line = error.lineno if isinstance(error, TemplateSyntaxError) else "unknown"
            raise FormatError(
                f"chat template, line {line}: not valid Jinja ({ascii(str(error))[:120]}); "
                "pass a working one with --chat-template-file"
            ) from None
        self._marker = Marker(control_texts or [], source, OPEN_TAGS)
        self._takes_text = self._prints(_PROBE)
        self._takes_parts = self._prints([{"type": "text", "text": _PROBE}])

    @classmethod
    def from_gguf(cls, gguf: GGUFFile, override: str | None = None) -> ChatTemplate:
        """The file's template, or override (a template's source), or a default chosen by the vocabulary."""
        key = "tokenizer.ggml.tokens"
        tokens: Sequence[str] = gguf.strings(key) if key in gguf.metadata else []
        types = gguf.get("tokenizer.ggml.token_type", list, [])
        source = gguf.get("tokenizer.chat_template", str, "") if override is None else override
        control_type = int(TokenType.CONTROL)  # plain, since comparing with an enum takes five times as long
        control = [
            text
            for token_id, kind in enumerate(types[: len(tokens)])
            if kind == control_type and (text := tokens[token_id]) not in THINKING_TAGS
        ]
        return cls(
            source or default_template(tokens),
            bos_token=_token_text(gguf, tokens, "bos"),
            eos_token=_token_text(gguf, tokens, "eos"),
            control_texts=control,
        )

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """The prompt of a conversation.

        messages         OpenAI's form; content is a string, None or a list of parts: text, and {"type": "image"}
                         or "audio" where a medium stands
        tools            OpenAI's form
        enable_thinking  None: the template is not told
        extra            further variables of the template (chat_template_kwargs)
        Raises RequestError (param messages) if the template refuses or cannot print these messages.
        """
        reserved = sorted(RESERVED & set(extra or {}))
        if reserved:
            raise RequestError(
                f"chat_template_kwargs.{reserved[0]} is the server's to set", param="chat_template_kwargs"
            )
        mark = self._marker.free_mark([messages, tools, dict(extra or {}), self.source])
        prepared = [self._prepare(message, index) for index, message in enumerate(messages)]
        if not self.uses_tools:
            prepared, tools = spell_out_tools(prepared, tools), None
        # An empty list would make a template announce tools and then name none.
        client: dict[str, Any] = {"messages": prepared, "tools": tools or None, "extra": dict(extra or {})}
        client = {name: self._marker.mark(value, mark) for name, value in client.items()}
        variables = {**client["extra"], "messages": self._contents(client["messages"]), "tools": client["tools"]}
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        return RenderedPrompt(self._print(variables, add_generation_prompt=add_generation_prompt), mark)

    def tokenize(self, tokenizer: Tokenizer, rendered: str) -> list[int]:
        """Token ids of a rendered prompt; only the template's own text becomes control tokens."""
        if isinstance(rendered, RenderedPrompt):
            return tokenizer.encode_marked(rendered.marked, rendered.mark)
        return tokenizer.encode(rendered)

    def render_tokens(self, tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """render and tokenize in one call."""
        return self.tokenize(tokenizer, self.render(messages, **options))

    def _prepare(self, message: dict[str, Any], index: int) -> dict[str, Any]:
        """A message with a known role and text content."""
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(f"messages[{index}].role is not one of {', '.join(sorted(ROLES))}", param="messages")
        role = "system" if role == "developer" else role
        return {**message, "role": role, "content": _content(message.get("content"), index)}

    def _contents(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Content in the form the template takes: strings where it can print them, else lists of parts."""
        if self._takes_text or not self._takes_parts:
            return messages
        return [
            message
            if isinstance(message["content"], list)
            else {**message, "content": [{"type": "text", "text": message["content"]}]}
            for message in messages
        ]

    def _prints(self, content: object) -> bool:
        """Whether the template prints the text of such content, and not the structure around it."""
        try:
            printed = self._print({"messages": [{"role": "user", "content": content}]}, add_generation_prompt=True)
        except RequestError:
            return False
        return _PROBE in printed and "'type'" not in printed and '"type"' not in printed

    def _print(self, variables: dict[str, Any], *, add_generation_prompt: bool) -> str:
        pieces: list[str] = []
        room = MAX_PROMPT_CHARS
        known = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            for piece in self._template.generate({**known, **variables, **self._tokens}):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise SecurityError("a chat template prints too much")
        except _Refusal as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {ascii(str(error))[:160]}", param="messages"
            ) from None
        except (
            TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
        ) as error:
            # The message of such an error may quote the client's text, so only its kind is told.
            raise RequestError(
                f"the model's chat template cannot print these messages ({type(error).__name__}); "
                "check the order of roles and the fields of each message",
                param="messages",
            ) from None
        return "".join(pieces)


def _content(content: object, index: int) -> str | list[dict[str, str]]:
    """Text, or the parts where one of them is a medium, which templates print as its placeholder."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict) and _is_part(part) for part in content):
        if any(part["type"] in MEDIA_TYPES for part in content):
            return content
        return "\n".join(part["text"] for part in content)
    raise RequestError(
        f"messages[{index}].content must be a string or a list of parts: text, image, audio", param="messages"
    )


def _is_part(part: dict[str, Any]) -> bool:
    kind = part.get("type")
    return kind in MEDIA_TYPES or (kind == "text" and isinstance(part.get("text"), str))


def _token_text(gguf: GGUFFile, tokens: Sequence[str], role: str) -> str:
    token_id = gguf.get(f"tokenizer.ggml.{role}_token_id", int, -1)
    return tokens[token_id] if 0 <= token_id < len(tokens) else ""


def _raise_exception(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON. ensure_ascii is taken and not done: escapes would spell out the marks in client text."""
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
