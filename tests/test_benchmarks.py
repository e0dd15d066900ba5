"""What the comparison with llama.cpp and the growth curves rest on: streams, filled contexts, the READMEs' table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.tiny_models import TinyModel

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def growth_worker() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import growth_worker

        yield growth_worker


@pytest.fixture(scope="module")
def compare_report() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import compare_report

        yield compare_report


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(100, 200, shape, np.int32)


def test_streams_are_apart(growth_worker: ModuleType, tiny_glm4: TinyModel) -> None:
    """Each of several streams gets the logits it gets alone, and they differ from one another's."""
    engine_worker = sys.modules["engine_worker"]
    engine = engine_worker.Autoglm(str(tiny_glm4.path), 1, 256)
    prompts, steps = tokens(3, 20), tokens(3, 2)
    engine.open(3, 40, False, False)
    engine_worker.prefill(engine, prompts)
    together = np.array(engine_worker.run(engine, steps, 20, 1)[0])
    for stream in range(3):
        engine.open(1, 40, False, False)
        engine_worker.prefill(engine, prompts[stream : stream + 1])
        alone, _ = engine_worker.run(engine, steps[stream : stream + 1], 20, 1)
        np.testing.assert_array_equal(together[stream], alone[0])
    assert not np.array_equal(together[0], together[1])


def test_a_filled_context_is_read_to_its_end(growth_worker: ModuleType, tiny_glm4: TinyModel) -> None:
    """What is filled in has a place of its own for every token, is finite, and is all attended to."""
    engine = growth_worker.GrowingAutoglm(str(tiny_glm4.path), 1, 2048)
    assert engine.at_depth(2048) == 2048 - growth_worker.CHUNK

    def logits(start: int) -> np.ndarray:
        return np.array(growth_worker.run(engine, tokens(1, 1), start, 1)[0])

    shallow, deep = logits(511), logits(2000)
    assert np.isfinite(deep).all()
    engine.filled = 512  # from there on other keys and values
    engine.fill(2048)
    np.testing.assert_array_equal(shallow, logits(511))
    assert not np.array_equal(deep, logits(2000))
    few = growth_worker.answer(engine, {"op": "streams", "streams": 2, "repeats": 1})
    assert len(few["decode_s"]) == growth_worker.STEPS - 1
    assert few["kv_token_bytes"] * engine.runner.num_blocks * 16 == engine.runner.kv_bytes


def results() -> dict[str, Any]:
    """A run's results in little, every number another."""
    samples = {"prefill": [99.0, 101.0], "decode": [30.0, 32.0], "decode_streams": [60.0, 62.0]}
    theirs = {"prefill": [24.0, 26.0], "decode": [19.0, 21.0], "decode_streams": [29.0, 31.0]}
    medians = {"autoglm": {"prefill": 100.0, "decode": 31.0, "decode_streams": 61.0}}
    medians["llama.cpp flash"] = {"prefill": 25.0, "decode": 20.0, "decode_streams": 30.0}
    phases = tuple(samples)
    return {
        "machine": {"cpu": "a CPU", "cores": 2, "date": "2026-11-23 12:00 UTC", "llama_cpp_python": "0.3.36"},
        "threads": 2,
        "workloads": {
            "glm4": {
                "prefill_tokens": 512,
                "prefill_long_tokens": 4096,
                "streams": 8,
                "samples_tokens_per_s": {"autoglm": samples, "llama.cpp flash": theirs},
                "median_tokens_per_s": medians,
                "best_llama_cpp": dict.fromkeys(phases, "llama.cpp flash"),
                "ratio": {p: medians["autoglm"][p] / medians["llama.cpp flash"][p] for p in phases},
                "target_ratio": {"prefill": 4.0},
                "target_limits": {"bandwidth": 0.9, "onednn": 0.75},
                "limits": {
                    "limit": {"memory_gb_s": 55.0, "products_autoglm_gmac_s": 390.0, "products_onednn_gmac_s": 500.0},
                    "decode_gb_s": {"autoglm": 48.0, "llama.cpp": 31.0},
                    "decode_share_of_bandwidth": {"autoglm": 0.873, "llama.cpp": 0.564},
                    "products_share_of_onednn": 0.78,
                    "prefill_share_of_onednn": 0.66,
                },
                "memory": {
                    "context_tokens": 4128,
                    "file_bytes": 1.9e9,
                    "kv_bytes": 3.4e7,
                    "target_bytes": 2.2e9,
                    "autoglm": {"peak_bytes": 1.95e9},
                    "llama.cpp": {"peak_bytes": None},
                    "llama.cpp flash": {"peak_bytes": 3.5e9},
                },
            }
        },
    }


def test_the_table_has_every_figure_and_target(compare_report: ModuleType) -> None:
    text = compare_report.table(results())
    for part in ("100.0 ± 1.0", "25.0 ± 1.0", "4.00", "87%", "(target 90%)", "78%", "(target 75%)", "66%", "3.50 GB"):
        assert part in text, f"{part!r} is not in\n{text}"


@pytest.mark.parametrize("marker", ["growth", "instruction_sets"])
def test_the_docs_have_places_for_the_tables(compare_report: ModuleType, tmp_path: Path, marker: str) -> None:
    docs = tmp_path / "performance.md"
    docs.write_bytes((ROOT / "docs" / "performance.md").read_bytes())
    compare_report.fill_between(docs, marker, "| new |")
    assert f"<!-- {marker} -->\n| new |\n<!-- /{marker} -->" in docs.read_text("utf-8")


def test_readmes_are_filled_between_their_markers(
    compare_report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real READMEs have the markers; only what is between them changes."""
    monkeypatch.setattr(compare_report, "HERE", tmp_path / "benchmarks")
    before = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh.md")}
    for name, text in before.items():
        (tmp_path / name).write_text(text, "utf-8")
    compare_report.write_readmes(results())
    for name, text in before.items():
        after = (tmp_path / name).read_text("utf-8")
        for part in ("| 25 | 100 | 4.00 |", "| 56% | 87% | |", "| | 78% | |", "| 3.50 GB | 1.95 GB | |", "2026-11-23"):
            assert part in after.partition("<!-- compare_llamacpp -->")[2].partition("<!-- /compare_llamacpp -->")[0]
        assert after.partition("<!-- compare")[0] == text.partition("<!-- compare")[0]
        assert after.partition("<!-- /compare")[2] == text.partition("<!-- /compare")[2]
    (tmp_path / "README.zh.md").write_text("nothing", "utf-8")
    with pytest.raises(SystemExit, match=r"README\.zh\.md needs the marker"):
        compare_report.write_readmes(results())
