"""The nano model's tokenizer of 2,048 entries: byte-level BPE with whole words and every number 0 to 999.

Entries, in the order of their ids: the 256 bytes; the numbers 10 to 999; the Chinese characters and words of the
generated world, made by merges; English words, numbers and punctuation as whole entries without merges (the `glm4`
split takes a piece that is an entry as it is); padding, if any; the special tokens. Everything else is spelled in
bytes. The built tokenizer is a resource of the package: a trained model's ids must never move, so later changes of
the world's texts keep the file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files

from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from autoglm.chat.tokenizer import GLM4_SPLIT, TokenType
from autoglm.errors import ConfigError, FormatError

VOCAB_SIZE = 2048
CONTROL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>",
    "<|video|>", "<|begin_of_audio|>", "<|end_of_audio|>", "<|audio|>",
)  # fmt: skip
THINKING = ("<think>", "</think>", "<answer>", "</answer>")
SPECIALS = CONTROL + THINKING
RESOURCE = "nano_tokenizer.json"

# GLM-4.1V's form with sound added; the media of a turn come before its text, as in training.
CHAT_TEMPLATE = """\
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
    {%- set role = 'observation' if message.role == 'tool' else message.role -%}
    {{- '<|' ~ role ~ '|>\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- elif message.content -%}
        {%- for part in message.content -%}
            {%- if part.type in ('image', 'image_url') -%}
                {{- '<|begin_of_image|><|image|><|end_of_image|>' -}}
            {%- endif -%}
        {%- endfor -%}
        {%- for part in message.content -%}
            {%- if part.type in ('audio', 'input_audio', 'audio_url') -%}
                {{- '<|begin_of_audio|><|audio|><|end_of_audio|>' -}}
            {%- endif -%}
        {%- endfor -%}
        {%- for part in message.content -%}
            {%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's byte -> printable character table: printable bytes stand for themselves, the rest from U+0100 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    return table | {byte: chr(0x100 + index) for index, byte in enumerate(others)}


_CHAR_OF_BYTE = _byte_alphabet()


@dataclass(frozen=True)
class NanoTokenizer:
    """Tokens in the spelling of a GGUF (byte alphabet), their types and the merges; ids are places in `tokens`."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[tuple[str, str], ...]

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    @cached_property
    def library(self) -> LibraryTokenizer:
        """The `tokenizers` tokenizer, special tokens recognised in the text."""
        specials = [AddedToken(text, special=text in CONTROL, normalized=False) for text in SPECIALS]
        vocab = dict(self.ids)
        library = LibraryTokenizer(BPE(vocab=vocab, merges=list(self.merges), ignore_merges=True))
        splits = [Split(Regex(GLM4_SPLIT), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
        library.pre_tokenizer = PreTokenizers(splits)
        library.add_special_tokens([token for token in specials if token.special])
        library.add_tokens([token for token in specials if not token.special])
        return library

    @cached_property
    def _bytes(self) -> tuple[bytes, ...]:
        of_char = {char: byte for byte, char in _CHAR_OF_BYTE.items()}
        return tuple(
            token.encode("utf-8") if token in SPECIALS else bytes(of_char[char] for char in token)
            for token in self.tokens
        )

    @cached_property
    def number_ids(self) -> tuple[int, ...]:
        """The id of each number 0 to 999."""
        return tuple(self.ids[str(number)] for number in range(1000))

    def id(self, special: str) -> int:
        """The id of a special token."""
        return self.ids[special]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.library.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self._bytes[token] for token in ids).decode("utf-8", errors="replace")

    def prompt(self, typed: str, *, num_image_tokens: int = 0, num_audio_tokens: int = 0) -> list[int]:
        """Ids of one user turn up to where the reply begins; 0 tokens of a medium leave it out."""
        ids = [self.id("[gMASK]"), self.id("<sop>"), self.id("<|user|>"), *self.encode("\n")]
        for name, count in (("image", num_image_tokens), ("audio", num_audio_tokens)):
            if count:
                ids.append(self.id(f"<|begin_of_{name}|>"))
                ids += [self.id(f"<|{name}|>")] * count
                ids.append(self.id(f"<|end_of_{name}|>"))
        return [*ids, *self.encode(typed), self.id("<|assistant|>"), *self.encode("\n")]

    def reply(self, thought: str, answer: str) -> list[int]:
        """Ids of a reply with its tags, up to and with the end of the turn."""
        return self.encode(f"<think>{thought}</think>\n<answer>{answer}</answer><|endoftext|>")

    def gguf_metadata(self) -> dict[str, object]:
        """The tokenizer keys of a GGUF: strings, integers, booleans and lists as they are to be written."""
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "glm4",
            "tokenizer.ggml.tokens": list(self.tokens),
            "tokenizer.ggml.token_type": list(self.types),
            "tokenizer.ggml.merges": [f"{left} {right}" for left, right in self.merges],
            "tokenizer.ggml.bos_token_id": self.id("[gMASK]"),
            "tokenizer.ggml.eos_token_id": self.id("<|endoftext|>"),
            "tokenizer.ggml.eot_token_id": self.id("<|user|>"),
            "tokenizer.ggml.unknown_token_id": self.id("<|endoftext|>"),
            "tokenizer.ggml.padding_token_id": self.id("<|endoftext|>"),
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": CHAT_TEMPLATE,
        }

    def to_json(self) -> str:
        """The resource file: one token a line, so that a difference can be read."""
        content = {
            "tokens": list(self.tokens),
            "types": list(self.types),
            "merges": [list(pair) for pair in self.merges],
        }
        return json.dumps(content, ensure_ascii=False, indent=0) + "\n"


def load_tokenizer() -> NanoTokenizer:
    """The tokenizer shipped with the package; FormatError if the file is damaged."""
    return read_tokenizer((files("autoglm.train") / "resources" / RESOURCE).read_text(encoding="utf-8"))


def read_tokenizer(text: str) -> NanoTokenizer:
    """The tokenizer `to_json` wrote; FormatError naming what is wrong."""
    try:
        content = json.loads(text)
        tokens, types = tuple(content["tokens"]), tuple(content["types"])
        merges = tuple((left, right) for left, right in content["merges"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{RESOURCE}: damaged ({type(error).__name__}); install autoglm again") from None
    known = set(tokens)
    if len(known) != len(tokens) or len(types) != len(tokens) or not known.issuperset(SPECIALS):
        raise FormatError(f"{RESOURCE}: tokens are doubled, untyped or lack a special one; install autoglm again")
    return NanoTokenizer(tokens, types, merges)


def build_tokenizer(
    texts: Iterable[tuple[str, int]], words: Iterable[tuple[str, int]], *, vocab_size: int = VOCAB_SIZE
) -> NanoTokenizer:
    """Make a tokenizer; the same arguments give the same bytes.

    texts   (text, weight): what will be read and written; gives the English words, signs and the characters
    words   (Chinese word, weight): what merges may build, the heaviest first
    Raises ConfigError if the characters and pieces of `texts` do not fit into `vocab_size`.
    """
    pieces = _count_pieces(texts)
    characters: Counter[str] = Counter()
    for piece, weight in pieces.items():
        for char in piece:
            if ord(char) > 0x7F:
                characters[char] += weight
    whole = [piece for piece, _ in _by_weight(pieces) if _is_entry(piece)]
    merges = [*_number_merges(), *_character_merges(characters)]
    room = vocab_size - 256 - len(merges) - len(SPECIALS) - len(whole)
    if room < 0:
        raise ConfigError(f"the words of the world need {vocab_size - room} tokens, expected at most {vocab_size}")
    merges += _word_merges(words, room)
    tokens = [_CHAR_OF_BYTE[byte] for byte in range(256)]
    tokens += list(dict.fromkeys(left + right for left, right in merges))
    tokens += [spelled for piece in whole if (spelled := _spell(piece)) not in tokens]
    num_padding = vocab_size - len(SPECIALS) - len(tokens)
    types = [int(TokenType.NORMAL)] * len(tokens) + [int(TokenType.UNUSED)] * num_padding
    tokens += [f"[PAD{index}]" for index in range(num_padding)]
    types += [int(TokenType.USER_DEFINED if text in THINKING[:3] else TokenType.CONTROL) for text in SPECIALS]
    return NanoTokenizer((*tokens, *SPECIALS), tuple(types), tuple(merges))


def _count_pieces(texts: Iterable[tuple[str, int]]) -> Counter[str]:
    """How often the split of GLM-4 gives each piece, special tokens cut out beforehand."""
    splitter = PreTokenizers(
        [
            Split(Regex("|".join(text.replace("|", r"\|").replace("[", r"\[") for text in SPECIALS)), "removed"),
            Split(Regex(GLM4_SPLIT), "isolated"),
        ]
    )
    pieces: Counter[str] = Counter()
    for text, weight in texts:
        for piece, _ in splitter.pre_tokenize_str(text):
            pieces[piece] += weight
    return pieces


def _is_entry(piece: str) -> bool:
    """English words and runs of signs; Chinese characters run on without spaces, so their words come from merges."""
    is_word = piece.isascii() or not any(char.isalpha() for char in piece)
    return is_word and len(piece) > 1 and not piece.isdigit()


def _number_merges() -> list[tuple[str, str]]:
    """The numbers 10 to 999 from left to right."""
    return [(str(number // 10), str(number % 10)) for number in range(10, 1000)]


def _character_merges(characters: Counter[str]) -> list[tuple[str, str]]:
    """Each character beyond ASCII from its bytes, left to right; the lead byte keeps characters apart."""
    merges: dict[tuple[str, str], None] = {}
    for char in sorted(characters):
        spelled = _spell(char)
        for end in range(1, len(spelled)):
            merges[spelled[:end], spelled[end]] = None
    return sorted(merges, key=lambda pair: (len(pair[0]), pair))


def _word_merges(words: Iterable[tuple[str, int]], room: int) -> list[tuple[str, str]]:
    """At most `room` merges of characters into words, always the heaviest pair of neighbours next (ties by text)."""
    weighted = Counter(dict(words))
    parts = {word: list(word) for word in weighted}
    merges: list[tuple[str, str]] = []
    made: set[str] = set()
    while len(made) < room:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in parts.items():
            for pair in zip(symbols, symbols[1:], strict=False):
                pairs[pair] += weighted[word]
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((_spell(left), _spell(right)))
        made.add(left + right)
        for word, symbols in parts.items():
            parts[word] = _join(symbols, left, right)
    return merges


def _join(symbols: Sequence[str], left: str, right: str) -> list[str]:
    joined: list[str] = []
    for symbol in symbols:
        if symbol == right and joined and joined[-1] == left:
            joined[-1] = left + right
        else:
            joined.append(symbol)
    return joined


def _spell(text: str) -> str:
    return "".join(_CHAR_OF_BYTE[byte] for byte in text.encode("utf-8"))


def _by_weight(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
