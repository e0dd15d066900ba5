"""Sound GGUF files with hostile vocabularies and templates: a FormatError, or a tokenizer that works."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoglm.chat.template import ChatTemplate
from autoglm.chat.tokenizer import MAX_SPECIAL_TOKENS, Tokenizer
from autoglm.errors import FormatError, RequestError
from autoglm.formats.gguf import GGUFFile
from tests.formats.gguf_bytes import GGUFBytes

TEXT = "Hello <|user|> [PAD1] <a> \u00e9\U0001f600\n 12"


def vocabulary(tokens: list[str], types: list[int] | None, merges: list[str], **ids: int) -> bytes:
    file = GGUFBytes()
    file.header(0, 3 + (types is not None) + len(ids))
    file.string_key("tokenizer.ggml.model", "gpt2")
    file.string_array_key("tokenizer.ggml.tokens", [*tokens])
    file.string_array_key("tokenizer.ggml.merges", [*merges])
    if types is not None:
        file.array_key("tokenizer.ggml.token_type", 5, "i", [*types])
    for name, value in ids.items():
        file.key(f"tokenizer.ggml.{name}_token_id", 5, "i", value)
    return file.finish(32)


def use(path: Path) -> None:
    """Everything a server does with a vocabulary."""
    with GGUFFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
        template = ChatTemplate.from_gguf(file)
    for parse_special in (True, False):
        ids = tokenizer.encode(TEXT, parse_special=parse_special)
        assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)
        assert not set(ids) & tokenizer.unused_token_ids
        tokenizer.decode(ids)
    everything = range(tokenizer.vocab_size)
    stream = tokenizer.stream()
    assert "".join(map(stream.push, everything)) + stream.flush() == tokenizer.decode(everything)
    for token_id in everything:
        tokenizer.token_text(token_id)
    assert tokenizer.eos_token_ids <= set(everything)
    template.render_tokens(tokenizer, [{"role": "user", "content": TEXT}])


WORDS = st.sampled_from(
    ["", " ", "a", "b", "ab", "aab", "Ġ", "<a>", "</answer>", "<|user|>", "[PAD1]", "é", "\u0120a", "你", "\x00"]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.lists(WORDS, max_size=12),
    types=st.none() | st.lists(st.integers(-2, 9), max_size=12),
    merges=st.lists(st.builds(lambda a, b: f"{a} {b}", WORDS, WORDS) | WORDS, max_size=6),
    eos=st.integers(-3, 14),
)  # fmt: skip
def test_any_vocabulary(
    tmp_path: Path, tokens: list[str], types: list[int] | None, merges: list[str], eos: int
) -> None:
    path = tmp_path / "v.gguf"
    if types is not None and len(types) > len(tokens):
        types = types[: len(tokens)]
    path.write_bytes(vocabulary(tokens, types, merges, eos=eos))
    try:
        use(path)
    except FormatError as error:
        assert len(str(error)) < len(str(path)) + 400


def test_a_vocabulary_of_nothing_but_special_tokens(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    count = MAX_SPECIAL_TOKENS + 1
    path.write_bytes(vocabulary([f"<{i}>" for i in range(count)], [3] * count, ["a b"]))
    with pytest.raises(FormatError, match="as special"):
        use(path)


@pytest.mark.parametrize("depth", [50, 5_000])
def test_deeply_nested_templates(tmp_path: Path, depth: int) -> None:
    source = "{% if true %}" * depth + "x" + "{% endif %}" * depth
    try:
        assert ChatTemplate(source).render([]) == "x"
    except (FormatError, RequestError) as error:
        assert len(str(error)) < 400
