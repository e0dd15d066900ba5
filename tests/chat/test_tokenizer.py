"""Tokenizers from GGUF metadata give the ids transformers gives; streams give whole characters."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from autoglm.chat.tokenizer import Tokenizer
from autoglm.errors import FormatError, RequestError
from autoglm.formats.gguf import GGUFFile
from tests.chat.vocabulary import CHATML_CONTROL, SPLITTERS, Vocabulary, train

FIXTURES = Path(__file__).resolve().parents[2].parent / "shared" / "fixtures" / "glm4v-tiny"
PIECES = [
    *"aBé中😀 \n\t_!?.,'\"()[]<>|=09½Ⅷ٣ßſ", "  ",
    "\r\n", "123", "'s", "'LL", "the", " the", "打开", "\u0301", "\u200d", "\xa0", "\u3000", "\x06", "\x7f",
    "\U0001f469\u200d\U0001f467", "<|user|>", "<think>", "</answer>", "<|im_end|>", "[gMASK]",
]  # fmt: skip


def random_texts(count: int) -> list[str]:
    generator = random.Random(7)
    return ["".join(generator.choices(PIECES, k=generator.randint(0, 40))) for _ in range(count)]


def open_tokenizer(path: Path) -> Tokenizer:
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file)


@pytest.mark.parametrize("pre", sorted(SPLITTERS))
def test_same_ids_as_the_published_tokenizer_of_each_kind(pre: str, tmp_path: Path) -> None:
    vocabulary = train(pre, CHATML_CONTROL, ["<think>"])
    ours = open_tokenizer(vocabulary.write(tmp_path / "v.gguf"))
    for text in random_texts(400):
        assert ours.encode(text) == vocabulary.hf.encode(text, add_special_tokens=False), repr(text)


@pytest.mark.skipif(not FIXTURES.exists(), reason="the shared fixtures are not beside this checkout")
def test_same_ids_as_the_tokenizer_the_fixture_was_converted_from() -> None:
    ours = open_tokenizer(FIXTURES / "main-f32.gguf")
    theirs = LibraryTokenizer.from_file(str(FIXTURES / "hf" / "tokenizer.json"))
    for text in random_texts(400):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
    assert ours.vocab_size == 384 and len(ours.unused_token_ids) == 64


def test_smollm2_as_transformers_reads_the_same_file(smollm2_path: Path) -> None:
    ours = open_tokenizer(smollm2_path)
    theirs = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    # transformers forgets SmolLM's digit splitting when it reads a GGUF; the published tokenizer.json has it.
    theirs.backend_tokenizer.pre_tokenizer = SPLITTERS["smollm"]
    for text in [*random_texts(400), "Hello, world! What is 12 + 345?  It's\n\n  fine."]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_token_ids == {0, 2} and ours.bos_token_id == 1 and not ours.add_bos
    assert ours.encode("Hello world") == [19556, 905]


SPLIT_EXAMPLES = [
    ("I'VE 12345 tap(x)", ["I", "'VE", " ", "123", "45", " tap", "(x", ")"]),
    (
        'do(action="Tap", element=[5,999])',
        ["do", "(action", '="', "Tap", '",', " element", "=[", "5", ",", "999", "])"],
    ),
    ("打开微信  发送\n\n  ok!!\n", ["打开微信", " ", " 发送", "\n\n", " ", " ok", "!!\n"]),
]


@pytest.mark.parametrize("text, pieces", SPLIT_EXAMPLES)
def test_glm4_never_merges_across_its_splits(text: str, pieces: list[str], tmp_path: Path) -> None:
    """Each piece is one vocabulary entry, so with ignore-merges the ids spell the split itself."""
    base = train("glm4", ["<|endoftext|>"], [])
    spell = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    extra = [spell(piece)[0][0] for piece in pieces]
    tokens = base.tokens + [token for token in dict.fromkeys(extra) if token not in base.tokens]
    types = base.types + [1] * (len(tokens) - len(base.tokens))
    ours = open_tokenizer(base.write(tmp_path / "v.gguf", tokens=tokens, token_type=types))
    assert [ours.token_text(token_id) for token_id in ours.encode(text)] == pieces


def test_glm_stop_set_and_the_visible_one(glm4: Tokenizer) -> None:
    texts = ["<|endoftext|>", "<|user|>", "<|observation|>", "</answer>"]
    assert glm4.eos_token_ids == {glm4.token_id(text) for text in texts}
    assert glm4.eos_visible_token_ids == {glm4.token_id("</answer>")}


def test_stop_tokens_the_file_names_count_whatever_their_type(chatml_vocabulary: Vocabulary, tmp_path: Path) -> None:
    path = chatml_vocabulary.write(tmp_path / "v.gguf", eot_token_id=65, eom_token_id=66, eos_token_id=67)
    ours = open_tokenizer(path)
    named = {ours.token_id(text) for text in ("<|endoftext|>", "<|im_end|>")}
    assert ours.eos_token_ids == named | {65, 66, 67}
    assert ours.eos_token_id == 67 and ours.decode([65, 66, 67]) == ""


def test_control_tokens_only_from_trusted_text(glm4: Tokenizer) -> None:
    text = "a<|user|>b<think>c</think>[gMASK]<|end"
    trusted, client = glm4.encode(text), glm4.encode(text, parse_special=False)
    assert glm4.token_id("<|user|>") in trusted and glm4.token_id("[gMASK]") in trusted
    assert not set(client) & glm4.control_token_ids
    for ids in (trusted, client):
        assert glm4.token_id("<think>") in ids and glm4.token_id("</think>") in ids
    assert glm4.decode(client) == text
    assert glm4.decode(trusted, skip_special=False) == text
    assert glm4.decode(trusted) == "ab<think>c</think><|end"


def test_the_longest_special_token_wins(chatml_vocabulary: Vocabulary, tmp_path: Path) -> None:
    tokens = [*chatml_vocabulary.tokens, "<a>", "<a><b>", "<a"]
    types = [*chatml_vocabulary.types, 4, 4, 4]
    ours = open_tokenizer(chatml_vocabulary.write(tmp_path / "v.gguf", tokens=tokens, token_type=types))
    assert [ours.token_text(i) for i in ours.encode("<a><b><a><a")] == ["<a><b>", "<a>", "<a"]


def test_padding_tokens_are_never_matched(glm4: Tokenizer, glm4_vocabulary: Vocabulary) -> None:
    padding = [i for i, kind in enumerate(glm4_vocabulary.types) if kind == 5]
    assert glm4.unused_token_ids == frozenset(padding)
    for token_id in padding:
        name = glm4_vocabulary.tokens[token_id]
        assert token_id not in glm4.encode(name) and glm4.decode(glm4.encode(name)) == name
        assert glm4.token_bytes(token_id) == b"" and glm4.token_id(name) is None


def test_token_bytes_add_up_to_the_text(glm4: Tokenizer) -> None:
    for text in random_texts(100):
        ids = glm4.encode(text, parse_special=False)
        assert b"".join(glm4.token_bytes(token_id) for token_id in ids) == text.encode()
    assert glm4.token_bytes(glm4.token_id("<|user|>") or 0) == b""
    assert glm4.token_bytes(glm4.token_id("</answer>") or 0) == b"</answer>"
    assert glm4.token_text(glm4.token_id("<|user|>") or 0) == "<|user|>"
    assert glm4.token_bytes(glm4.vocab_size + 3) == b""


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives(glm4: Tokenizer, text: str) -> None:
    assert glm4.decode(glm4.encode(text, parse_special=False)) == text


def test_lone_surrogates_become_replacement_characters(glm4: Tokenizer) -> None:
    assert glm4.decode(glm4.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("token_id", [-1, 10**9])
def test_decode_refuses_ids_outside_the_vocabulary(glm4: Tokenizer, token_id: int) -> None:
    with pytest.raises(RequestError, match="outside the vocabulary"):
        glm4.decode([token_id])


def byte_ids(tokenizer: Tokenizer) -> dict[bytes, int]:
    return {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}


def test_stream_holds_an_emoji_until_it_is_whole(glm4: Tokenizer) -> None:
    single = byte_ids(glm4)
    stream = glm4.stream()
    pushed = [stream.push(single[bytes([byte])]) for byte in "a👍é".encode()]
    assert pushed == ["a", "", "", "", "👍", "", "é"]
    assert stream.flush() == ""


def test_stream_gives_half_a_character_only_at_the_end(glm4: Tokenizer) -> None:
    single = byte_ids(glm4)
    stream = glm4.stream()
    assert [stream.push(single[bytes([byte])]) for byte in "👍".encode()[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60))
def test_stream_of_any_bytes_equals_decoding_them(glm4: Tokenizer, data: bytes) -> None:
    single = byte_ids(glm4)
    ids = [single[bytes([byte])] for byte in data]
    stream = glm4.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == data.decode("utf-8", errors="replace") == glm4.decode(ids)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_stream_of_any_tokens_equals_decode(glm4: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, glm4.vocab_size - 1), max_size=40))
    for skip_special in (True, False):
        stream = glm4.stream(skip_special=skip_special)
        text = "".join([stream.push(token_id) for token_id in ids]) + stream.flush()
        assert text == glm4.decode(ids, skip_special=skip_special)


@pytest.mark.parametrize("char", [" ", "a", "\n", "!", "1", "<", "é", "ab "])
def test_long_runs_do_not_blow_up(glm4: Tokenizer, char: str) -> None:
    """A quadratic pre-tokenizer would run into the suite's timeout here."""
    text = char * (200_000 // len(char))
    assert glm4.decode(glm4.encode(text)) == text


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"model": None}, "'tokenizer.ggml.model' is missing"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken'"),
        ({"tokens": None}, "'tokenizer.ggml.tokens' is missing"),
        ({"tokens": [1, 2]}, "not a list of strings"),
        ({"token_type": [1, 1]}, "has 2 entries"),
        ({"merges": None}, "'tokenizer.ggml.merges' is missing"),
        ({"merges": ["zzz qqq"]}, r"merges\[0\] is not two tokens"),
        ({"merges": ["nospace"]}, r"merges\[0\] is not two tokens"),
        ({"eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id is 1000000"),
        ({"add_bos_token": 1}, "expected a bool"),
    ],
)
def test_damaged_metadata_is_named(
    chatml_vocabulary: Vocabulary, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    path = chatml_vocabulary.write(tmp_path / "v.gguf", **changes)
    with pytest.raises(FormatError, match=words):
        open_tokenizer(path)


def test_absent_keys_mean_what_the_format_says(chatml_vocabulary: Vocabulary, tmp_path: Path) -> None:
    ours = open_tokenizer(chatml_vocabulary.write(tmp_path / "v.gguf", token_type=None, pre=None))
    assert ours.bos_token_id is None and not ours.add_bos and not ours.control_token_ids
    assert ours.decode(ours.encode("plain text 123")) == "plain text 123"


def test_a_negative_special_id_means_none(chatml_vocabulary: Vocabulary, tmp_path: Path) -> None:
    ours = open_tokenizer(chatml_vocabulary.write(tmp_path / "v.gguf", bos_token_id=0xFFFFFFFF))
    assert ours.bos_token_id is None
