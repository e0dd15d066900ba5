"""JSON schemas, tool choices and the action language -> constraints over tokens, through llguidance.

A constraint is asked for a bitmask before every token and told every token; the engine applies it
only outside a thought. Masks take well under a millisecond at a vocabulary of 151,552 (measured
0.04 ms mean, 0.5 ms most, on the 2-core build machine); making the tokenizer's trie takes half a
second, so it is made on first use and kept. llguidance bounds its own work by fuel, not by time;
a grammar that needs more is refused.

Tool calls are written as `<tool_call>\\n{"name": NAME, "arguments": {...}}\\n</tool_call>`, the form
that chat/output_parser.py reads back.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoglm.chat.action_grammar import ActionConstraint, action_lark, min_action_tokens
from autoglm.chat.constraint import GrammarConstraint
from autoglm.chat.tokenizer import Tokenizer
from autoglm.errors import RequestError

if TYPE_CHECKING:
    import llguidance  # read with the first grammar: it takes a start 18 ms

MAX_SCHEMA_BYTES = 64 << 10
MAX_ERROR_CHARS = 300
MAX_KEPT_GRAMMARS = 64
MAX_PARALLEL_CALLS = 16

# Free white space lets a model pad its answer until max_tokens; this is room for any usual indentation.
WHITESPACE_PATTERN = r"[ \n]{0,20}"


class _VocabularyForLlguidance:
    """What llguidance.LLTokenizer asks of a tokenizer: the bytes of every token, and which are special."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.eos_token_ids, default=0)
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        # A stop token may have visible text (</answer>); as part of an answer it would end it, not write it.
        self.special_token_ids = sorted(
            {i for i, text in enumerate(self.tokens) if not text} | set(tokenizer.eos_token_ids)
        )
        for i in self.special_token_ids:
            self.tokens[i] = b"\xff[%d]" % i

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, parse_special=False)


class GrammarFactory:
    """Compiles schemas for one tokenizer and keeps the latest; safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._ll_tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def action(self) -> ActionConstraint:
        """One action of the AutoGLM language."""
        with self._lock:
            matcher = self._matcher(action_lark(), "response_format")
            tokenize = self._llguidance_tokenizer().tokenize_bytes
        return ActionConstraint(matcher, self._tokenizer.vocab_size, tokenize, self._tokenizer.token_bytes)

    def min_action_tokens(self) -> int:
        """Tokens an action needs at least, if it has to end early."""
        with self._lock:
            return min_action_tokens(self._llguidance_tokenizer().tokenize_bytes)

    def json_object(self) -> GrammarConstraint:
        """Any one JSON object."""
        return self.json_schema({"type": "object"}, param="response_format")

    def json_schema(
        self, schema: Mapping[str, Any] | bool, *, param: str = "response_format.json_schema.schema"
    ) -> GrammarConstraint:
        """JSON that the schema allows.

        Raises RequestError, with `param` as the field, for a schema that is invalid, cannot be met, uses
        keywords llguidance does not know, or is too large.
        """
        return self._constraint(f"start: {_json_rule(schema, param)}", param)

    def tools(
        self,
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str,
        *,
        parallel: bool = True,
        answer_schema: Mapping[str, Any] | bool | None = None,
    ) -> GrammarConstraint:
        """Calls of the given tools, one or more.

        tools          OpenAI's form: {"type": "function", "function": {"name", "parameters", ...}}
        tool_choice    "required": any of them; otherwise the name of the one to call, once
        parallel       whether several calls may follow each other
        answer_schema  the model may answer with this JSON instead of a call
        Raises RequestError naming the tool whose parameters cannot be compiled.
        """
        is_named = tool_choice != "required"
        chosen = [
            (i, tool["function"])
            for i, tool in enumerate(tools)
            if not is_named or tool["function"]["name"] == tool_choice
        ]
        if not chosen:
            raise RequestError("tool_choice names a function that is not in tools", param="tool_choice")
        rules = [f"call_{i}: {_call_rule(function, i)}" for i, function in chosen]
        calls = " | ".join(f"call_{i}" for i, _ in chosen)
        many = "call" if is_named or not parallel else f'call ("\\n" call){{0,{MAX_PARALLEL_CALLS - 1}}}'
        start = "start: calls" if answer_schema is None else "start: calls | answer"
        if answer_schema is not None:
            rules.append(f"answer: {_json_rule(answer_schema, 'response_format')}")
        grammar = "\n".join([start, f"calls: {many}", f"call: {calls}", *rules])
        try:
            return self._constraint(grammar, "tools")
        except RequestError:
            self._blame(chosen)
            raise

    def _blame(self, chosen: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        """Raise for the first function whose parameters do not compile alone."""
        for i, function in chosen:
            param = f"tools[{i}].function.parameters"
            self.json_schema(_parameters(function), param=param)

    def _constraint(self, lark: str, param: str) -> GrammarConstraint:
        with self._lock:
            return GrammarConstraint(self._matcher(lark, param), self._tokenizer.vocab_size)

    def _matcher(self, lark: str, param: str) -> llguidance.LLMatcher:
        """A matcher of its own at the start of the grammar. The caller holds the lock."""
        matcher = self._compiled.get(lark)
        if matcher is None:
            matcher = self._compile(lark, param)
            self._compiled[lark] = matcher
            if len(self._compiled) > MAX_KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(lark)
        return matcher.deep_copy()

    def _llguidance_tokenizer(self) -> llguidance.LLTokenizer:
        if self._ll_tokenizer is None:
            import llguidance

            self._ll_tokenizer = llguidance.LLTokenizer(
                _VocabularyForLlguidance(self._tokenizer),  # type: ignore[arg-type]
                n_vocab=self._tokenizer.vocab_size,
                eos_token=sorted(self._tokenizer.eos_token_ids) or None,
            )
        return self._ll_tokenizer

    def _compile(self, lark: str, param: str) -> llguidance.LLMatcher:
        import llguidance

        matcher = llguidance.LLMatcher(
            self._llguidance_tokenizer(),
            llguidance.LLMatcher.grammar_from_lark(lark),
            log_level=0,
            limits=llguidance.LLParserLimits(verbose_errors=False),
        )
        if not matcher.is_error():
            # Some schemas, such as one that is nothing but a reference to itself, fail on first use only.
            matcher.compute_bitmask()
        if matcher.is_error():
            # What follows the first numbered line is our own grammar, of no use to the client.
            reason = " ".join(re.split(r"\n\s*\d+ \|", matcher.get_error())[0].split())[:MAX_ERROR_CHARS]
            raise RequestError(f"{param}: the schema cannot be used: {reason}", param=param, code="invalid_schema")
        return matcher


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters")
    return {"type": "object", "properties": {}, "additionalProperties": False} if not parameters else parameters


def _call_rule(function: Mapping[str, Any], index: int) -> str:
    body = _json_rule(_parameters(function), f"tools[{index}].function.parameters")
    head = json.dumps(f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": ')
    return f"{head} {body} {json.dumps(chr(125) + chr(10) + '</tool_call>')}"


def _json_rule(schema: Mapping[str, Any] | bool, param: str) -> str:
    """The schema as a term of a Lark grammar, on one line."""
    members = dict(schema) if isinstance(schema, Mapping) else {} if schema else {"not": {}}
    members["x-guidance"] = {"whitespace_pattern": WHITESPACE_PATTERN}
    try:
        text = json.dumps(members, allow_nan=False)
    except ValueError:
        raise RequestError(f"{param}: the schema holds a number JSON cannot express", param=param) from None
    except RecursionError:
        raise RequestError(f"{param}: the schema is nested too deeply", param=param) from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise RequestError(
            f"{param}: the schema is larger than {MAX_SCHEMA_BYTES} bytes", param=param, code="schema_too_large"
        )
    return f"%json {text}"
