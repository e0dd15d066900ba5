"""Vocabularies and open tokenizers of the chat tests; everything is made here, nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoglm.chat.tokenizer import Tokenizer
from autoglm.formats.gguf import GGUFFile
from tests.chat.vocabulary import CHATML_CONTROL, GLM4_CONTROL, GLM4_TAGS, Vocabulary, train


@pytest.fixture(scope="session")
def glm4_vocabulary() -> Vocabulary:
    return train("glm4", [*GLM4_CONTROL, "</answer>"], GLM4_TAGS)


@pytest.fixture(scope="session")
def chatml_vocabulary() -> Vocabulary:
    return train("smollm", CHATML_CONTROL, [])


def _open(path: Path) -> Tokenizer:
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file)


@pytest.fixture(scope="session")
def glm4(glm4_vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _open(glm4_vocabulary.write(tmp_path_factory.mktemp("vocabulary") / "glm4.gguf"))


@pytest.fixture(scope="session")
def chatml(chatml_vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _open(chatml_vocabulary.write(tmp_path_factory.mktemp("vocabulary") / "chatml.gguf"))
