"""The promise of equal answers on SmolLM2's real weights, over contexts of several hundred tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autoglm.config import EngineConfig
from autoglm.engine.engine import Engine
from tests.engine.harness import Answer, draft_always, make_sequence, serve

TEXT = "The harbour was quiet that morning, and only the gulls and one old man were awake. " * 30


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Any:
    pytest.importorskip("autoglm.kernels._native", reason="the native module is not built")
    from autoglm.chat.tokenizer import Tokenizer
    from autoglm.engine.model_runner import CpuModelRunner
    from autoglm.formats.gguf import GGUFFile

    file = GGUFFile.open(smollm2_path)
    config = EngineConfig(num_kv_blocks=160, num_threads=2)
    return CpuModelRunner(file, config), Tokenizer.from_gguf(file)


def engine(model: Any, **config: Any) -> Engine:
    runner, tokenizer = model
    return Engine(runner, tokenizer, EngineConfig(**{"draft_max": 0, **config}))


def ask(request_id: str, tokens: list[int], **params: Any):  # type: ignore[no-untyped-def]
    return make_sequence(request_id, tokens, **{"max_tokens": 20, "logprobs": 5, **params})


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "seeded"])
def test_chunked_warm_drafted_batched_and_preempted_equal_cold(model: Any, params: dict[str, Any]) -> None:
    tokens = model[1].encode(TEXT)[:500]
    cold = serve(engine(model), [ask("r", tokens, **params)])["r"]

    def check(answer: Answer) -> None:
        assert (answer.token_ids, answer.text) == (cold.token_ids, cold.text)
        assert answer.logprobs == cold.logprobs

    check(serve(engine(model, max_num_batched_tokens=16), [ask("r", tokens, **params)])["r"])
    warm = engine(model)
    serve(warm, [ask("first", tokens[:400], max_tokens=1)])
    answer = serve(warm, [ask("r", tokens, **params)])["r"]
    assert answer.last is not None and answer.last.num_cached_tokens == 400
    check(answer)

    drafting = draft_always(engine(model, draft_max=15))
    check(serve(drafting, [ask("r", tokens, **params)])["r"])
    assert drafting.stats().num_accepted_tokens_total > 0 or params

    # 160 blocks hold 2,560 tokens; five of these want more, so some are preempted, and all are batched.
    busy = engine(model, enable_prefix_caching=False)
    # Prompts as on a fast machine: on a slow one they would be read one after the other, and all would fit.
    busy.speed.prefill_room = 512
    busy.speed.note = lambda *args, **kwargs: None
    others = [ask(str(i), tokens[i:490] + [7 + i], max_tokens=60, logprobs=None) for i in range(4)]
    last = ask("r", tokens, **{**params, "max_tokens": 120})
    answers = serve(busy, [*others, last])
    assert busy.stats().num_preemptions_total > 0
    assert answers["r"].token_ids[:20] == cold.token_ids and answers["r"].logprobs[:20] == cold.logprobs
