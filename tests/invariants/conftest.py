"""The engines whose promises are tested: always the fake runner, and the native one over several models and caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from autoglm.config import EngineConfig
from autoglm.engine.engine import Engine
from autoglm.engine.sequence import Sequence
from tests.engine.fake_runner import FakeRunner, FakeTokenizer, default_pieces
from tests.engine.harness import make_sequence


@dataclass
class Rig:
    """Makes engines on one model, and prompts for it."""

    name: str
    vocab_size: int
    make: Callable[..., Engine]

    def engine(self, *, num_blocks: int = 64, **config: Any) -> Engine:
        """Without drafts unless told otherwise, since their number is a matter of speed."""
        return self.make(num_blocks, {"draft_max": 0, **config})

    def prompt(self, start: int, size: int) -> list[int]:
        return [(start * 31 + i * i * 7 + i // 3) % (self.vocab_size - 2) + 1 for i in range(size)]

    def sequence(self, request_id: str, prompt: list[int], **options: Any) -> Sequence:
        """Log-probabilities on, so that equality of answers is equality of logits to the last bit."""
        return make_sequence(request_id, prompt, **{"logprobs": 3, **options})


def fake_rig() -> Rig:
    def make(num_blocks: int, config: dict[str, Any]) -> Engine:
        runner = FakeRunner(num_blocks=num_blocks)
        return Engine(runner, FakeTokenizer(default_pieces(runner.vocab_size)), EngineConfig(**config))

    return Rig("fake", 64, make)


def native_rig(tiny_model: Callable[..., Any], kind: str, plan: str, cache_type: str) -> Rig:
    pytest.importorskip("autoglm.kernels._native", reason="the native module is not built")
    gguf = pytest.importorskip("gguf")
    from autoglm.chat.tokenizer import Tokenizer
    from autoglm.engine.model_runner import CpuModelRunner
    from autoglm.formats.gguf import GGUFFile
    from tests.tiny_models import Shape, medium_plan

    if plan == "F32":
        model = tiny_model(kind)
    else:
        sections = (4, 6, 6)
        model = tiny_model(
            kind,
            label=plan,
            shape=Shape(256, 384, 4, 2, mrope_section=sections),
            plan=medium_plan(gguf.GGMLQuantizationType[plan], 2),
        )
    file = GGUFFile.open(model.path)
    tokenizer = Tokenizer.from_gguf(file)

    def make(num_blocks: int, config: dict[str, Any]) -> Engine:
        settings = EngineConfig(
            **{
                "num_kv_blocks": num_blocks,
                "num_threads": 2,
                "cache_type_k": cache_type,
                "cache_type_v": cache_type,
                **config,
            }
        )
        return Engine(CpuModelRunner(file, settings), tokenizer, settings)

    return Rig(f"{kind}-{plan}-{cache_type}", tokenizer.vocab_size, make)


RIGS = ["fake", "glm4_mrope-F32-f16", "glm4_mrope-Q4_K-f16", "glm4_mrope-Q4_K-i16", "glm4-Q4_K-q8_0", "llama-Q5_K-f16"]


@pytest.fixture(params=RIGS)
def rig(request: pytest.FixtureRequest) -> Rig:
    if request.param == "fake":
        return fake_rig()
    pytest.importorskip("torch", reason="the tiny models are made with torch")
    kind, plan, cache_type = request.param.split("-")
    return native_rig(request.getfixturevalue("tiny_model"), kind, plan, cache_type)
