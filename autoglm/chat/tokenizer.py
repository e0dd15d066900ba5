"""Text <-> token ids, special tokens, UTF-8-safe streaming decode, from a GGUF's own metadata.

Byte-level BPE (tokenizer.ggml.model "gpt2") on the tokenizers library. Special tokens are split off
here, not by the library, so that one immutable tokenizer serves both trusted prompts (control tokens
are recognised) and client text (they are not). encode never adds BOS or EOS: chat templates write
their own. Bytes a vocabulary has no token for are dropped, as llama.cpp drops them; some
vocabularies lack control characters and the lead bytes of unassigned planes.

Left out: SentencePiece ("llama") and WordPiece vocabularies; normalizers (none of these models has one).
Source: the pre-tokenizer expressions are those of each model family's published tokenizer.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from enum import IntEnum

from tokenizers import Regex
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from autoglm.errors import FormatError, RequestError
from autoglm.formats.gguf import GGUFFile


class TokenType(IntEnum):
    """tokenizer.ggml.token_type values."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Part of the model's visible answer whatever type the file gives them; converters disagree on it.
THINKING_TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# Tokens that end a turn in the families served here. HF's GLM-4.1V config stops on the first four; a GGUF
# names at most three stop tokens, so the rest are found by name.
END_OF_TURN_TEXTS = (
    "<|endoftext|>",
    "<|user|>",
    "<|observation|>",
    "</answer>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "</s>",
)

# Real vocabularies have up to 6,400; the search for them is one expression, which takes a second to build at this size.
MAX_SPECIAL_TOKENS = 1 << 15

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GLM4_SPLIT = _CL100K_SPLIT % "1,3"
# tokenizer.ggml.pre -> the expressions that split a text, one after the other.
_SPLITS: dict[str, tuple[str, ...]] = {
    "glm4": (GLM4_SPLIT,),
    "chatglm-bpe": (_CL100K_SPLIT % "1,3",),
    "llama-bpe": (_CL100K_SPLIT % "1,3",),
    "qwen2": (_CL100K_SPLIT % "1",),
    "gpt-2": (_GPT2_SPLIT,),
    "smollm": (r"\p{N}", _GPT2_SPLIT),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
# A piece that is a vocabulary entry as a whole is taken without looking at the merges.
_IGNORE_MERGES = frozenset({"glm4", "llama-bpe"})
_ADD_BOS = frozenset({"llama-bpe"})


def byte_alphabet() -> dict[int, str]:
    """GPT-2's byte -> printable character table: printable bytes stand for themselves, the rest from U+0100 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    return table | {byte: chr(0x100 + index) for index, byte in enumerate(others)}


_BYTE_OF_CHAR = {ord(char): byte for byte, char in byte_alphabet().items()}


class TokenStream:
    """Turns token ids into text as they come; only whole UTF-8 characters leave push().

    The pieces joined equal Tokenizer.decode of all ids: bytes that can no longer become a character
    are U+FFFD, bytes that still can are held until the next token or flush().
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._visible_bytes = tokenizer.visible_bytes if skip_special else tokenizer.all_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._visible_bytes(token_id))

    def flush(self) -> str:
        """The held bytes as U+FFFD; the stream can be used again afterwards."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class Tokenizer:
    """One model's vocabulary; immutable after construction and safe to share between threads.

    vocab_size             number of token ids, unused ones included
    eos_token_ids          every id that ends an answer
    eos_visible_token_ids  those of them whose text belongs to the answer (GLM's </answer>)
    eos_token_id           the file's own end token, None if it names none
    bos_token_id, add_bos  the file's begin token and whether plain completions start with it
    control_token_ids      ids that carry no visible text
    unused_token_ids       padding ids, never matched; sampling must ban them
    """

    def __init__(
        self,
        tokens: list[str],
        token_types: list[int],
        library: LibraryTokenizer,
        *,
        special_ids: dict[str, int],
        add_bos: bool,
    ) -> None:
        """Use from_gguf(); special_ids holds bos, eos, eot, eom where the file names them."""
        self._tokens = tokens
        self._library = library
        self.vocab_size = len(tokens)
        self.add_bos = add_bos
        self.bos_token_id = special_ids.get("bos")
        self.eos_token_id = special_ids.get("eos")
        self.bos_token = self._text_of(self.bos_token_id)
        self.eos_token = self._text_of(self.eos_token_id)
        by_type = _ids_by_type(tokens, token_types, special_ids)
        self.control_token_ids = frozenset(by_type[TokenType.CONTROL])
        self.unused_token_ids = frozenset(by_type[TokenType.UNUSED])
        self._specials = {tokens[i]: i for kind in (3, 4) for i in by_type[TokenType(kind)] if tokens[i]}
        self._user_defined = {tokens[i]: i for i in by_type[TokenType.USER_DEFINED] if tokens[i]}
        self._all_pattern = _longest_first(self._specials)
        self._user_pattern = _longest_first(self._user_defined)
        self.eos_token_ids = self._find_eos(special_ids)
        self.eos_visible_token_ids = self.eos_token_ids - self.control_token_ids
        self._bytes = _token_bytes(tokens)
        for special, token_id in self._specials.items():
            self._bytes[token_id] = special.encode("utf-8")
        for token_id in self.unused_token_ids:
            self._bytes[token_id] = b""

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> Tokenizer:
        """The tokenizer a GGUF describes; FormatError naming the key if it is damaged or of another kind."""
        kind = gguf.get("tokenizer.ggml.model", str)
        if kind != "gpt2":
            raise FormatError(
                f"{gguf.path}: tokenizer.ggml.model is {ascii(kind)[:40]}, expected 'gpt2' (byte-level BPE); "
                "this build has no other tokenizer, use a model of the GLM-4, Llama 3, Qwen 2 or SmolLM family"
            )
        tokens = _strings(gguf, "tokenizer.ggml.tokens")
        token_types = gguf.get("tokenizer.ggml.token_type", list, None)
        if token_types is None:
            token_types = [int(TokenType.NORMAL)] * len(tokens)
        if len(token_types) != len(tokens) or not all(type(kind) is int for kind in token_types):
            raise FormatError(
                f"{gguf.path}: tokenizer.ggml.token_type has {len(token_types)} entries, expected one integer "
                f"for each of the {len(tokens)} tokens; fetch another conversion of the model"
            )
        num_special = sum(kind in (TokenType.CONTROL, TokenType.USER_DEFINED) for kind in token_types)
        if num_special > MAX_SPECIAL_TOKENS:
            raise FormatError(
                f"{gguf.path}: tokenizer.ggml.token_type marks {num_special} tokens as special, expected at most "
                f"{MAX_SPECIAL_TOKENS}; fetch another conversion of the model"
            )
        pre = gguf.get("tokenizer.ggml.pre", str, "default")
        library = LibraryTokenizer(_bpe(gguf, tokens, token_types, ignore_merges=pre in _IGNORE_MERGES))
        library.pre_tokenizer = _pre_tokenizer(gguf, pre)
        add_bos = gguf.get("tokenizer.ggml.add_bos_token", bool, pre in _ADD_BOS)
        return cls(tokens, token_types, library, special_ids=_special_ids(gguf, len(tokens)), add_bos=add_bos)

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids of text; control tokens are recognised in it only with parse_special, user-defined ones always."""
        pattern, ids = (self._all_pattern if parse_special else self._user_pattern), []
        if pattern is None:
            return self._encode_plain(text)
        position = 0
        for match in pattern.finditer(text):
            ids += self._encode_plain(text[position : match.start()])
            ids.append(self._specials[match.group()])
            position = match.end()
        return ids + self._encode_plain(text[position:])

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """encode with the special tokens looked for first and the marks taken out of the rest; see client_text.py."""
        ids: list[int] = []
        position = 0
        for match in self._all_pattern.finditer(text) if self._all_pattern else ():
            ids += self.encode(text[position : match.start()].replace(mark, ""), parse_special=False)
            ids.append(self._specials[match.group()])
            position = match.end()
        return ids + self.encode(text[position:].replace(mark, ""), parse_special=False)

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of the ids, with skip_special without control tokens; RequestError for an id outside the vocabulary."""
        one = self.visible_bytes if skip_special else self.all_bytes
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens", param="tokens"
                )
        return b"".join([one(token_id) for token_id in token_ids]).decode("utf-8", errors="replace")

    def token_id(self, text: str) -> int | None:
        """The id of the control or user-defined token written exactly so."""
        return self._specials.get(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes a token adds to the answer; b"" for control and unused tokens."""
        return self.visible_bytes(token_id)

    def visible_bytes(self, token_id: int) -> bytes:
        """token_bytes; also b"" for the padding rows some models have above the vocabulary."""
        return b"" if token_id in self.control_token_ids else self.all_bytes(token_id)

    def all_bytes(self, token_id: int) -> bytes:
        """The bytes of a token with control tokens spelled out."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """A token as logprobs show it: control tokens spelled out, broken UTF-8 as U+FFFD."""
        return self.all_bytes(token_id).decode("utf-8", errors="replace")

    def stream(self, *, skip_special: bool = True) -> TokenStream:
        return TokenStream(self, skip_special=skip_special)

    def control_texts(self) -> list[str]:
        """The spellings of all control tokens: what client text must not be able to form."""
        return [self._tokens[token_id] for token_id in sorted(self.control_token_ids) if self._tokens[token_id]]

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # lone surrogates, which JSON can carry and UTF-8 cannot
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def _find_eos(self, special_ids: dict[str, int]) -> frozenset[int]:
        named = {special_ids[role] for role in ("eos", "eot", "eom") if role in special_ids}
        known = {self._specials[text] for text in END_OF_TURN_TEXTS if text in self._specials}
        return frozenset(named | known)

    def _text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self._tokens[token_id]


def _longest_first(texts: dict[str, int]) -> re.Pattern[str] | None:
    if not texts:
        return None
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


def _ids_by_type(tokens: list[str], token_types: list[int], special_ids: dict[str, int]) -> dict[int, list[int]]:
    """Token ids per TokenType, with what files get wrong put right: see END_OF_TURN_TEXTS and THINKING_TAGS."""
    special = (TokenType.CONTROL, TokenType.USER_DEFINED)
    ends = {special_ids[role] for role in ("bos", "eos", "eot", "eom") if role in special_ids}
    by_type: dict[int, list[int]] = {kind: [] for kind in TokenType}
    for token_id, kind in enumerate(token_types):
        if kind == TokenType.NORMAL and token_id not in ends:
            continue
        text = tokens[token_id]
        if text in THINKING_TAGS and kind in special:
            kind = TokenType.USER_DEFINED
        elif token_id in ends or (kind == TokenType.USER_DEFINED and text in END_OF_TURN_TEXTS):
            kind = TokenType.CONTROL
        by_type.setdefault(kind, []).append(token_id)
    return by_type


def _token_bytes(tokens: list[str]) -> list[bytes]:
    raw: list[bytes] = []
    for token in tokens:
        try:
            raw.append(token.translate(_BYTE_OF_CHAR).encode("latin-1"))
        except UnicodeEncodeError:  # not spelled in the byte alphabet: stands for itself
            raw.append(token.encode("utf-8"))
    return raw


def _strings(gguf: GGUFFile, key: str) -> list[str]:
    values = gguf.get(key, list)
    if not values or type(values[0]) is not str:
        raise FormatError(
            f"{gguf.path}: {key} is {'empty' if not values else 'not a list of strings'}, expected strings; "
            "fetch another conversion of the model"
        )
    return values


def _special_ids(gguf: GGUFFile, vocab_size: int) -> dict[str, int]:
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "eot", "eom"):
        key = f"tokenizer.ggml.{role}_token_id"
        token_id = gguf.get(key, int, None)
        if token_id is None or token_id in (-1, 0xFFFFFFFF):  # both are written for "none"
            continue
        if not 0 <= token_id < vocab_size:
            raise FormatError(
                f"{gguf.path}: {key} is {token_id}, expected an id below {vocab_size}; "
                "fetch another conversion of the model"
            )
        ids[role] = token_id
    return ids


def _bpe(gguf: GGUFFile, tokens: list[str], token_types: list[int], *, ignore_merges: bool) -> BPE:
    hidden = (TokenType.CONTROL, TokenType.UNUSED)
    vocab = {token: index for index, token in enumerate(tokens) if token_types[index] not in hidden}
    merges: list[tuple[str, str]] = []
    append = merges.append
    # Checked here because the library panics, past every except clause, on a merge of tokens that are not there.
    for index, line in enumerate(_strings(gguf, "tokenizer.ggml.merges")):
        cut = line.find(" ", 1)  # not at 0: a part may itself begin with a space
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or left not in vocab or right not in vocab or left + right not in vocab:
            raise FormatError(
                f"{gguf.path}: tokenizer.ggml.merges[{index}] is not two tokens of the vocabulary that make a third; "
                "fetch another conversion of the model"
            )
        append((left, right))
    return BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges)


def _pre_tokenizer(gguf: GGUFFile, pre: str) -> PreTokenizer:
    if pre not in _SPLITS:
        raise FormatError(
            f"{gguf.path}: tokenizer.ggml.pre is {ascii(pre)[:40]}, expected one of {', '.join(sorted(_SPLITS))}; "
            "this build cannot split text as this model does"
        )
    if pre == "smollm":  # the same two steps, in the library's native code instead of expressions
        return PreTokenizers([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    splits: list[PreTokenizer] = [Split(Regex(expression), behavior="isolated") for expression in _SPLITS[pre]]
    return PreTokenizers([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
