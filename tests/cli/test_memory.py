"""The memory table, the largest picture that fits, and what a request may ask for: all before a weight is read."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from autoglm.cli import loading
from autoglm.cli.loading import LoadedModel, ModelOptions, load_model
from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.engine.model_runner import CpuModelRunner
from autoglm.errors import ConfigError
from autoglm.formats.gguf import GGUFFile
from autoglm.formats.quant_types import GGMLType
from autoglm.model.loader import runs_in_floats

NANO = SHIPPED_MODELS["nano"]
FIXTURE = Path(__file__).parent.parent / "fixtures" / "glm4v-tiny"
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1}


def load(monkeypatch: pytest.MonkeyPatch, free_bytes: int, model: Path, mmproj: Path, **options: object) -> LoadedModel:
    monkeypatch.setattr(loading, "available_memory_bytes", lambda: free_bytes)
    chosen = ModelOptions(mmproj=mmproj, threads=1, parallel=2, **options)  # type: ignore[arg-type]
    return load_model(model, chosen, lambda what, done, total: None)


def load_glm4v(monkeypatch: pytest.MonkeyPatch, free_bytes: int, **options: object) -> LoadedModel:
    template = FIXTURE / "chat_template.jinja"
    pair = FIXTURE / "main-f32.gguf", FIXTURE / "mmproj-q8_0.gguf"
    return load(monkeypatch, free_bytes, *pair, chat_template_file=template, **options)


def test_the_table_adds_up_and_comes_before_the_weights(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="autoglm.cli")
    loaded = load(monkeypatch, 6 << 30, NANO.path, NANO.mmproj)
    lines = caplog.messages
    table = [line for line in lines if line.startswith("Memory: ")]
    assert lines.index(table[-1]) < next(i for i, line in enumerate(lines) if line.startswith("Loading vision encoder"))
    rows = [re.fullmatch(r"Memory: (.*?) +([\d.]+) (GB|MB|kB|B)(  .*)?", line) for line in table]
    taken = {row[1]: float(row[2]) * UNITS[row[3]] for row in rows if row is not None}
    assert list(taken) == [
        "weights of the backbone",
        "weights of the vision encoder",
        "weights of the audio encoder",
        "KV cache",
        "work buffers",
        "encoding a picture",
        "encoding a sound",
        "decoded media",
        "embeddings kept",
        "all together",
    ]
    assert len({line.index(row[2]) + len(row[2]) for line, row in zip(table, rows, strict=True) if row}) == 1, "aligned"
    together = taken.pop("all together")
    smaller = min(taken["encoding a picture"], taken["encoding a sound"])
    assert sum(taken.values()) - smaller == pytest.approx(together, rel=0.01)
    assert together == pytest.approx(loaded.plan.total_bytes, rel=0.01) and together < 6 << 30
    assert "107520 pixels" in table[5] and "10 pictures and 4 sounds each" in table[7]
    # So small a model is unpacked to floats.
    assert taken["weights of the backbone"] == pytest.approx(4 * loaded.model_config.num_parameters, rel=0.1)
    assert sum(value for name, value in taken.items() if "weights" in name) == pytest.approx(4 * 10.1e6, rel=0.06)


def test_the_largest_picture_must_fit_or_the_mend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mend works, and a pixel more does not."""
    free_bytes = 800 << 20
    monkeypatch.setattr(loading, "CpuModelRunner", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(ConfigError, match=r"encode 11760000 .* 0\.84 GB are free; mend: --max-pixels") as caught:
        load_glm4v(monkeypatch, free_bytes)
    possible = int(str(caught.value).split("--max-pixels ")[1].split(",")[0])
    assert 1_000_000 < possible < 11_760_000
    with pytest.raises(ConfigError, match=f"mend: --max-pixels {possible}"):
        load_glm4v(monkeypatch, free_bytes, max_pixels=possible + 1000)
    monkeypatch.undo()
    loaded = load_glm4v(monkeypatch, free_bytes, max_pixels=possible)
    assert loaded.plan.total_bytes <= free_bytes and loaded.most_pixels is not None
    assert possible <= loaded.most_pixels < 11_760_000


def test_a_machine_too_small_for_any_picture_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="do not fit into memory.*mend: close other programs, or take a smaller"):
        load_glm4v(monkeypatch, 300 << 20)


def test_requests_may_ask_for_more_than_the_default_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_glm4v(monkeypatch, 8 << 30, max_pixels=500_000).most_pixels == 11_760_000


def test_a_max_pixels_without_effect_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="must lie between 12544 and 11760000"):
        load_glm4v(monkeypatch, 8 << 30, max_pixels=20_000_000)


def test_a_model_that_fits_a_cache_runs_in_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told apart by the activations that a program holds room for, and by the encoder's own matrices."""
    loaded = load(monkeypatch, 6 << 30, NANO.path, NANO.mmproj)
    with GGUFFile.open(NANO.path) as text, GGUFFile.open(NANO.mmproj) as mmproj:
        assert runs_in_floats(text, mmproj)
        runners = [
            CpuModelRunner(text, loaded.engine_config, in_floats=in_floats, in_background=True)
            for in_floats in (False, True)
        ]
        for runner in runners:
            runner.reader.wait()
    sizes = [runner._program.nbytes for runner in runners]
    assert loaded.engine.runner._program.nbytes == sizes[1] != sizes[0]
    assert loaded.multimodal is not None
    assert loaded.multimodal._vision._blocks[0].qkv.weight.type_id == GGMLType.F32


def test_a_larger_model_keeps_its_types(smollm2_path: Path) -> None:
    with GGUFFile.open(smollm2_path) as gguf:
        assert not runs_in_floats(gguf)
