"""The native vocabulary makes the tokens that the tokenizers library makes, of any merges; its reader is Python's."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.models import BPE

from autoglm.formats.gguf import StringArray
from autoglm.kernels import Vocabulary, string_offsets
from tests.tiny_vocabulary import byte_symbols

ALPHABET = "abĠéč"  # one and two bytes of UTF-8 each


def packed(*texts: bytes) -> bytes:
    return b"".join(struct.pack("<Q", len(text)) + text for text in texts)


def string_array(*texts: str) -> StringArray:
    data = packed(*(text.encode() for text in texts))
    return StringArray(data, string_offsets(np.frombuffer(data, np.uint8), 0, len(data), len(texts)))


def vocabulary(
    tokens: list[str], merges: list[str], hidden: tuple[int, ...] = (), ignore_merges: bool = False
) -> Vocabulary:
    array, lines = string_array(*tokens), string_array(*merges)
    is_hidden = bytes(index in hidden for index in range(len(tokens)))
    made = Vocabulary(array.data, array.offsets, is_hidden, ignore_merges)
    assert made.add_merges(lines.data, lines.offsets) == len(merges)
    return made


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens grown by merging two of them, in any order; some characters without a token; merges that come twice."""
    tokens = list(dict.fromkeys(draw(st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=5))))
    merges = []
    for _ in range(draw(st.integers(0, 24))):
        left, right = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        merges.append((left, right))
        if left + right not in tokens:
            tokens.append(left + right)
    return tokens, draw(st.permutations(merges))


@given(vocabularies(), st.lists(st.text(ALPHABET, min_size=1, max_size=40), max_size=4), st.booleans())
def test_tokens_are_those_of_the_library(
    made: tuple[list[str], list[tuple[str, str]]], pieces: list[str], ignore_merges: bool
) -> None:
    tokens, merges = made
    library = BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=ignore_merges)
    ours = vocabulary(tokens, [f"{left} {right}" for left, right in merges], ignore_merges=ignore_merges)
    expected = [token.id for piece in pieces for token in library.tokenize(piece)]
    assert ours.encode(" ".join(pieces)) == expected


def test_a_hidden_token_is_never_made() -> None:
    assert vocabulary(["a", "b", "a"], [], hidden=(1,)).encode("ab ba") == [2, 2], "and of equal tokens the last counts"


@pytest.mark.parametrize("bad", ["ab", "a c", "c a", "b a", " a", "a "])
def test_the_first_bad_merge_is_told(bad: str) -> None:
    array, lines = string_array("a", "b", "ab"), string_array("a b", bad)
    assert Vocabulary(array.data, array.offsets, bytes(3), False).add_merges(lines.data, lines.offsets) == 1


def test_bytes_of_tokens() -> None:
    spelled = "".join(byte_symbols())
    made = vocabulary([spelled, "三", "a三", ""], [])
    assert made.token_bytes(0) == bytes(range(256))
    assert [made.token_bytes(i) for i in (1, 2, 3)] == ["三".encode(), "a三".encode(), b""], "not in the byte alphabet"
    assert made.longest_bytes == 256
    with pytest.raises(ValueError, match="outside"):
        made.token_bytes(4)


@given(st.lists(st.binary(max_size=12), max_size=6))
def test_strings_are_read_as_far_as_python_reads_them(texts: list[bytes]) -> None:
    good = 0
    for text in texts:
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            break
        good += 1
    buffer = np.frombuffer(b"x" * 5 + packed(*texts), np.uint8)
    offsets = string_offsets(buffer, 5, len(buffer), len(texts))
    assert offsets.tolist() == [len(packed(*texts[:n])) for n in range(good + 1)]


def test_every_beginning_of_a_character() -> None:
    for lead, second, rest in itertools.product(range(256), range(256), (b"", b"\x80", b"\x80\xbf")):
        text = bytes([lead, second]) + rest
        data = np.frombuffer(packed(text), np.uint8)
        is_good = len(string_offsets(data, 0, len(data), 1)) == 2
        assert is_good == ("\ufffd" not in text.decode("utf-8", "replace")), text


@pytest.mark.parametrize("length", [4, 1 << 31, 1 << 63, (1 << 64) - 8, (1 << 64) - 1])
def test_a_length_beyond_the_end_ends_the_strings(length: int) -> None:
    data = np.frombuffer(packed(b"one") + struct.pack("<Q", length) + b"two", np.uint8)
    assert string_offsets(data, 0, len(data), 2).tolist() == [0, 11]


def test_offsets_outside_the_data_are_refused() -> None:
    for offsets in ([], [0, 7], [0, 8, 17], [8, 0]):
        with pytest.raises(ValueError, match="offsets"):
            Vocabulary(bytes(16), np.array(offsets, np.uint32), bytes(max(0, len(offsets) - 1)), False)
    with pytest.raises(ValueError, match="is_hidden"):
        Vocabulary(bytes(16), np.array([0, 8, 16], np.uint32), bytes(1), False)
    with pytest.raises(ValueError, match="within"):
        string_offsets(np.zeros(8, np.uint8), 4, 9, 1)
