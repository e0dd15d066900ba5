"""Session fixtures every suite shares: tiny GGUFs with their torch oracles, the real SmolLM2 file, a served Nano."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.serving import ServerProcess, serving
from tests.tiny_models import TinyModel, write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """tiny_model(kind, label=..., shape=..., plan=...) -> TinyModel; each made once a session."""
    folder = tmp_path_factory.mktemp("tiny-models")
    made: dict[tuple[str, str], TinyModel] = {}

    def make(kind: str, *, label: str = "", **options: object) -> TinyModel:
        if (kind, label) not in made:
            made[kind, label] = write_tiny_model(folder, kind, label=label, **options)  # type: ignore[arg-type]
        return made[kind, label]

    return make


@pytest.fixture(scope="session")
def tiny_glm4(tiny_model: Callable[..., TinyModel]) -> TinyModel:
    """glm4 without M-RoPE, F32 weights, GLM-4 tokenizer."""
    return tiny_model("glm4")


@pytest.fixture(scope="session")
def tiny_glm4_mrope(tiny_model: Callable[..., TinyModel]) -> TinyModel:
    """glm4 with M-RoPE sections (the text part of GLM-4.1V), F32 weights, GLM-4 tokenizer."""
    return tiny_model("glm4_mrope")


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[..., TinyModel]) -> TinyModel:
    """llama, tied embeddings, F32 weights, ChatML tokenizer."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real SmolLM2-135M-Instruct Q4_1 GGUF, from the user's cache or fetched once."""
    pull = pytest.importorskip("autoglm.deploy.pull", reason="autoglm.deploy.pull is not built yet")
    from autoglm.errors import AutoglmError

    try:
        return Path(pull.pull("smollm2-135m").path)
    except (AutoglmError, OSError) as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")


@pytest.fixture(scope="session")
def nano_server() -> Iterator[ServerProcess]:
    """`autoglm serve -m nano`, a process of its own; it may have seen other tests' pictures."""
    with serving("-m", "nano") as running:
        yield running
