"""The nano tokenizer: 2,048 entries, a number is one token, no text of the world in bytes, ids as our server has."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf
import jinja2
import pytest

from autoglm.chat.template import ChatTemplate
from autoglm.chat.tokenizer import Tokenizer
from autoglm.errors import ConfigError, FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.train.tokenizer import (
    CHAT_TEMPLATE,
    SPECIALS,
    VOCAB_SIZE,
    NanoTokenizer,
    build_tokenizer,
    load_tokenizer,
    read_tokenizer,
)
from autoglm.train.world import corpus
from autoglm.train.world.labels import LABELS

TOKENIZER = load_tokenizer()
OTHERS = ["", "a\n\n b  c\t", "Übermäßig 1234567 ½", "😀 中文 faces\r\n", "<|user|>x<think>y</think>", "don't I'LL"]


def write_gguf(tokenizer: NanoTokenizer, path: Path, integers: dict[str, int] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "glm4")
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in {**tokenizer.gguf_metadata(), **(integers or {})}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            assert isinstance(value, list)
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    with GGUFFile.open(write_gguf(TOKENIZER, tmp_path_factory.mktemp("tokenizer") / "nano.gguf")) as file:
        return Tokenizer.from_gguf(file)


def test_size_numbers_and_special_tokens() -> None:
    assert len(TOKENIZER.tokens) == len(set(TOKENIZER.tokens)) == VOCAB_SIZE
    for number in range(1000):
        assert TOKENIZER.encode(str(number)) == [TOKENIZER.number_ids[number]]
    assert TOKENIZER.tokens[-len(SPECIALS) :] == SPECIALS
    for special in SPECIALS:
        assert TOKENIZER.encode(f"1{special}2")[1:2] == [TOKENIZER.id(special)]


def test_everything_the_world_says_comes_back() -> None:
    for text, _ in corpus.texts():
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_nothing_the_world_says_is_spelled_in_bytes() -> None:
    """A byte token stands only where the split itself leaves one ASCII character alone."""
    for text, _ in corpus.texts():
        encoded = TOKENIZER.library.encode(text, add_special_tokens=False)
        for (start, end), token in zip(encoded.offsets, encoded.ids, strict=True):
            assert token >= 256 or not text[start:end].isalpha() or text[start:end] in ("A", "I", "a"), (text, start)
    for label in LABELS:
        assert len(TOKENIZER.encode(label.zh)) <= len(label.zh)
        assert len(TOKENIZER.encode(f" {label.en}")) <= len(label.en.replace("-", " ").split())


def test_other_texts_come_back_too() -> None:
    for text in OTHERS:
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_same_ids_as_the_server_reads_out_of_a_gguf(served: Tokenizer) -> None:
    for text in [*OTHERS, *(text for text, _ in corpus.texts())]:
        assert served.encode(text) == TOKENIZER.encode(text), text
    assert served.eos_token_id == TOKENIZER.id("<|endoftext|>")
    assert TOKENIZER.id("</answer>") in served.eos_token_ids and not served.add_bos


def test_prompt_is_what_the_chat_template_prints(served: Tokenizer, tmp_path: Path) -> None:
    with GGUFFile.open(write_gguf(TOKENIZER, tmp_path / "nano.gguf")) as file:
        template = ChatTemplate.from_gguf(file)
    messages = [{"role": "user", "content": "打开微信"}]
    assert template.render_tokens(served, messages) == TOKENIZER.prompt("打开微信")


def test_prompt_with_media_is_what_the_template_prints_for_parts() -> None:
    parts = [{"type": "text", "text": "open"}, {"type": "input_audio"}, {"type": "image_url"}]
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    printed = template.render(messages=[{"role": "user", "content": parts}], add_generation_prompt=True)
    assert TOKENIZER.prompt("open", num_image_tokens=1, num_audio_tokens=1) == TOKENIZER.encode(printed)
    with_many = TOKENIZER.prompt("open", num_image_tokens=105, num_audio_tokens=50)
    assert len(with_many) == len(TOKENIZER.encode(printed)) + 104 + 49


def test_reply_ends_the_turn() -> None:
    ids = TOKENIZER.reply("点击微信", 'do(action="Tap", element=[5,999])')
    assert ids[0] == TOKENIZER.id("<think>") and ids[-2:] == [TOKENIZER.id("</answer>"), TOKENIZER.id("<|endoftext|>")]
    assert TOKENIZER.number_ids[5] in ids and TOKENIZER.number_ids[999] in ids


def test_the_resource_is_what_its_own_words_say_and_reads_back() -> None:
    assert read_tokenizer(TOKENIZER.to_json()) == TOKENIZER


def test_the_resource_never_changes() -> None:
    """Models are trained on these ids; a change of this file makes every checkpoint and GGUF of ours talk nonsense."""
    assert hashlib.sha256(TOKENIZER.to_json().encode("utf-8")).hexdigest() == (
        "e82ad456d10bac492e0848377be5cf6f3e11505acf5bbcffb8b7a3b26af2082f"
    )


def test_same_ids_as_llama_cpp_reads_out_of_a_gguf(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    integers = {"block_count": 1, "context_length": 512, "embedding_length": 256, "feed_forward_length": 768}
    heads = {"attention.head_count": 4, "attention.head_count_kv": 2}
    path = write_gguf(TOKENIZER, tmp_path / "vocabulary.gguf", {f"glm4.{k}": v for k, v in (integers | heads).items()})
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in [*OTHERS, *(text for text, _ in corpus.texts())]:
        assert model.tokenize(text.encode("utf-8"), add_bos=False, special=True) == TOKENIZER.encode(text), text


def test_building_is_deterministic() -> None:
    first = build_tokenizer(corpus.texts(), corpus.chinese_words())
    again = build_tokenizer(corpus.texts(), corpus.chinese_words())
    assert first.to_json() == again.to_json()


def test_too_many_words_are_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="need .* tokens, expected at most 1400"):
        build_tokenizer(corpus.texts(), corpus.chinese_words(), vocab_size=1400)


@pytest.mark.parametrize("damage", ["", "{}", '{"tokens": [1]}', "cut", "doubled", "unspecial"])
def test_a_damaged_resource_is_one_clear_error(damage: str) -> None:
    content = json.loads(TOKENIZER.to_json())
    if damage == "doubled":
        content["tokens"][300] = content["tokens"][301]
    elif damage == "unspecial":
        content["tokens"][-1] = "answer"
    text = TOKENIZER.to_json()[:5000] if damage == "cut" else json.dumps(content)
    with pytest.raises(FormatError, match="install autoglm again"):
        read_tokenizer(text if damage in ("cut", "doubled", "unspecial") else damage)
