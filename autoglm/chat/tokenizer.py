"""Text <-> token ids, special tokens, UTF-8-safe streaming decode, from a GGUF's own metadata.

Byte-level BPE (tokenizer.ggml.model "gpt2"): the tokenizers library splits a text into pieces, our native vocabulary
joins each piece's bytes into tokens. The library does that too, but takes 0.1 s to read 49,152 tokens out of Python's
lists, and holds the interpreter meanwhile. Special tokens are split off here, so that one immutable tokenizer serves
both trusted prompts (control tokens are recognised) and client text (they are not). encode never adds BOS or EOS: chat
templates write their own. Bytes a vocabulary has no token for are dropped, as llama.cpp drops them; some vocabularies
lack control characters and the lead bytes of unassigned planes.

Left out: SentencePiece ("llama") and WordPiece vocabularies; normalizers (none of these models has one).
Source: the pre-tokenizer expressions are those of each model family's published tokenizer.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from enum import IntEnum

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from autoglm.errors import FormatError, RequestError
from autoglm.formats.gguf import GGUFFile, StringArray
from autoglm.kernels import Vocabulary


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
        texts: dict[int, str],
        token_types: dict[int, int],
        vocabulary: Vocabulary,
        pre_tokenizer: PreTokenizer,
        *,
        vocab_size: int,
        special_ids: dict[str, int],
        add_bos: bool,
    ) -> None:
        """Use from_gguf(); texts and token_types of the tokens that are not ordinary or that special_ids (bos, eos, eot
        and eom where the file names them) points at."""
        self._texts = texts
        self._vocabulary = vocabulary
        self._pre_tokenizer = pre_tokenizer
        self.vocab_size = vocab_size
        self.add_bos = add_bos
        self.bos_token_id = special_ids.get("bos")
        self.eos_token_id = special_ids.get("eos")
        self.bos_token = self._text_of(self.bos_token_id)
        self.eos_token = self._text_of(self.eos_token_id)
        by_type = _ids_by_type(texts, token_types, special_ids)
        self.control_token_ids = frozenset(by_type[TokenType.CONTROL])
        self.unused_token_ids = frozenset(by_type[TokenType.UNUSED])
        self._specials = {texts[i]: i for kind in (3, 4) for i in by_type[TokenType(kind)] if texts[i]}
        self._user_defined = {texts[i]: i for i in by_type[TokenType.USER_DEFINED] if texts[i]}
        self._all_pattern = _longest_first(self._specials)
        self._user_pattern = _longest_first(self._user_defined)
        self.eos_token_ids = self._find_eos(special_ids)
        self.eos_visible_token_ids = self.eos_token_ids - self.control_token_ids
        # The vocabulary knows tokens in its byte alphabet; these are spelled as they are, or not at all.
        self._own_bytes = {token_id: text.encode("utf-8") for text, token_id in self._specials.items()}
        self._own_bytes |= dict.fromkeys(self.unused_token_ids, b"")

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> Tokenizer:
        """The tokenizer a GGUF describes; FormatError naming the key if it is damaged or of another kind."""
        kind = gguf.get("tokenizer.ggml.model", str)
        if kind != "gpt2":
            raise FormatError(
                f"{gguf.path}: tokenizer.ggml.model is {ascii(kind)[:40]}, expected 'gpt2' (byte-level BPE); "
                "this build has no other tokenizer, use a model of the GLM-4, Llama 3, Qwen 2 or SmolLM family"
            )
        tokens = gguf.strings("tokenizer.ggml.tokens")
        types = gguf.get("tokenizer.ggml.token_type", list, None)
        if types is None:
            types = [int(TokenType.NORMAL)] * len(tokens)
        if len(types) != len(tokens) or set(map(type, types)) != {int}:
            raise FormatError(
                f"{gguf.path}: tokenizer.ggml.token_type has {len(types)} entries, expected one integer "
                f"for each of the {len(tokens)} tokens; fetch another conversion of the model"
            )
        num_special = types.count(int(TokenType.CONTROL)) + types.count(int(TokenType.USER_DEFINED))
        if num_special > MAX_SPECIAL_TOKENS:
            raise FormatError(
                f"{gguf.path}: tokenizer.ggml.token_type marks {num_special} tokens as special, expected at most "
                f"{MAX_SPECIAL_TOKENS}; fetch another conversion of the model"
            )
        pre = gguf.get("tokenizer.ggml.pre", str, "default")
        special_ids = _special_ids(gguf, len(tokens))
        normal = int(TokenType.NORMAL)
        own_types = {token_id: kind for token_id, kind in enumerate(types) if kind != normal}
        own_types |= {token_id: types[token_id] for token_id in special_ids.values()}
        return cls(
            {token_id: tokens[token_id] for token_id in own_types},
            own_types,
            _vocabulary(gguf, tokens, own_types, ignore_merges=pre in _IGNORE_MERGES),
            _pre_tokenizer(gguf, pre),
            vocab_size=len(tokens),
            special_ids=special_ids,
            add_bos=gguf.get("tokenizer.ggml.add_bos_token", bool, pre in _ADD_BOS),
        )

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
        if not 0 <= token_id < self.vocab_size:
            return b""
        own = self._own_bytes.get(token_id)
        return self._vocabulary.token_bytes(token_id) if own is None else own

    @property
    def longest_token_bytes(self) -> int:
        """No token adds more bytes to an answer; 1 at least."""
        return max(1, self._vocabulary.longest_bytes)

    def token_text(self, token_id: int) -> str:
        """A token as logprobs show it: control tokens spelled out, broken UTF-8 as U+FFFD."""
        return self.all_bytes(token_id).decode("utf-8", errors="replace")

    def stream(self, *, skip_special: bool = True) -> TokenStream:
        return TokenStream(self, skip_special=skip_special)

    def control_texts(self) -> list[str]:
        """The spellings of all control tokens: what client text must not be able to form."""
        return [self._texts[token_id] for token_id in sorted(self.control_token_ids) if self._texts[token_id]]

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # lone surrogates, which JSON can carry and UTF-8 cannot
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        pieces = self._pre_tokenizer.pre_tokenize_str(text)
        return self._vocabulary.encode(" ".join([piece for piece, _ in pieces]))

    def _find_eos(self, special_ids: dict[str, int]) -> frozenset[int]:
        named = {special_ids[role] for role in ("eos", "eot", "eom") if role in special_ids}
        known = {self._specials[text] for text in END_OF_TURN_TEXTS if text in self._specials}
        return frozenset(named | known)

    def _text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self._texts[token_id]


def _longest_first(texts: dict[str, int]) -> re.Pattern[str] | None:
    if not texts:
        return None
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


def _ids_by_type(
    texts: dict[int, str], token_types: dict[int, int], special_ids: dict[str, int]
) -> dict[int, list[int]]:
    """Token ids per TokenType, with what files get wrong put right: see END_OF_TURN_TEXTS and THINKING_TAGS."""
    special = (TokenType.CONTROL, TokenType.USER_DEFINED)
    ends = {special_ids[role] for role in ("bos", "eos", "eot", "eom") if role in special_ids}
    by_type: dict[int, list[int]] = {kind: [] for kind in TokenType}
    for token_id, kind in token_types.items():
        text = texts[token_id]
        if text in THINKING_TAGS and kind in special:
            kind = TokenType.USER_DEFINED
        elif token_id in ends or (kind == TokenType.USER_DEFINED and text in END_OF_TURN_TEXTS):
            kind = TokenType.CONTROL
        by_type.setdefault(kind, []).append(token_id)
    return by_type


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


def _vocabulary(gguf: GGUFFile, tokens: StringArray, own_types: dict[int, int], *, ignore_merges: bool) -> Vocabulary:
    is_hidden = bytearray(len(tokens))
    for token_id, kind in own_types.items():
        is_hidden[token_id] = kind in (TokenType.CONTROL, TokenType.UNUSED)
    vocabulary = Vocabulary(tokens.data, tokens.offsets, bytes(is_hidden), ignore_merges)
    merges = gguf.strings("tokenizer.ggml.merges")
    num_sound = vocabulary.add_merges(merges.data, merges.offsets)
    if num_sound < len(merges):
        raise FormatError(
            f"{gguf.path}: tokenizer.ggml.merges[{num_sound}] is not two tokens of the vocabulary that make a third; "
            "fetch another conversion of the model"
        )
    return vocabulary


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
