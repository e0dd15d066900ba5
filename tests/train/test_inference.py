"""Loading a model from whatever file it lies in, and asking it: the same weights give the same replies everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from autoglm.errors import ConfigError, FormatError  # noqa: E402
from autoglm.train.checkpoint import Facts, save_tensors  # noqa: E402
from autoglm.train.checkpoint_gguf import load_pair  # noqa: E402
from autoglm.train.evaluate import evaluate  # noqa: E402
from autoglm.train.export import export_pair  # noqa: E402
from autoglm.train.inference import load_phone, replier  # noqa: E402
from autoglm.train.model import AutoGLMPhone, preset  # noqa: E402
from autoglm.train.quantization import attach_qat  # noqa: E402
from autoglm.train.sizes import parameter_counts  # noqa: E402
from autoglm.train.tokenizer import load_tokenizer  # noqa: E402
from autoglm.train.world.split import rng_for  # noqa: E402
from autoglm.train.world.tasks import Example, text_only  # noqa: E402


@pytest.fixture(scope="module")
def model() -> AutoGLMPhone:
    torch.manual_seed(0)
    return AutoGLMPhone(preset("smoke")).eval()


@pytest.fixture(scope="module")
def questions() -> list[Example]:
    return [text_only(rng_for("test", "inference", number), "test") for number in range(5)]


def write(path: Path, state: dict[str, Any], *, config: dict[str, Any] | None = None) -> Path:
    config = preset("smoke").to_dict() if config is None else config
    save_tensors(path, state, Facts("teacher", "smoke", 1, config=config))
    return path


def test_every_file_gives_the_same_replies(model: AutoGLMPhone, questions: list[Example], tmp_path: Path) -> None:
    state = model.state_dict()
    lessons = {"lessons.patch_class.weight": torch.zeros(2, 2)}
    prefixed = {f"model.student.{name}": tensor for name, tensor in state.items()}
    running = {**prefixed, "model.lessons.x": torch.zeros(2), "rng.cpu.0": torch.zeros(2)}
    files = [
        write(tmp_path / "weights.safetensors", state),
        write(tmp_path / "heads.safetensors", {**state, **lessons}),
        write(tmp_path / "checkpoint.safetensors", running),
        tmp_path,  # a stage's folder
    ]
    replies = [replier(load_phone(path))(questions) for path in files]
    assert replies[0] == replies[1] == replies[2] == replies[3]
    assert len(replies[0]) == 5 and len(set(replies[0])) > 1, "an untrained model does not always say the same"


def test_batches_do_not_change_replies(model: AutoGLMPhone, questions: list[Example], tmp_path: Path) -> None:
    phone = load_phone(write(tmp_path / "weights.safetensors", model.state_dict()))
    assert replier(phone, batch_size=1)(questions) == replier(phone, batch_size=5)(questions)


def test_quantized_checkpoint_and_its_gguf_pair_reply_alike(questions: list[Example], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = attach_qat(AutoGLMPhone(preset("smoke")), "fast").eval()
    checkpoint = load_phone(write(tmp_path / "weights.safetensors", model.state_dict()))
    pair = export_pair(model.state_dict(), model.config, load_tokenizer().gguf_metadata(), tmp_path)
    assert load_pair(pair.text, pair.mmproj)[0].config.text == model.config.text
    assert replier(checkpoint)(questions) == replier(load_phone(pair.text))(questions)
    rates = evaluate(replier(checkpoint), counts={"identity": 4})
    assert rates["identity_zh"].total == rates["identity_en"].total == 2


def test_wrong_files_are_one_clear_error(model: AutoGLMPhone, tmp_path: Path) -> None:
    state = model.state_dict()
    with pytest.raises(ConfigError, match="is not there"):
        load_phone(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="0 files mmproj"):
        load_phone(tmp_path / "text.gguf")
    with pytest.raises(FormatError):
        load_phone(tmp_path / "text.gguf", mmproj=tmp_path / "text.gguf")
    with pytest.raises(ConfigError, match="stage 'teacher', which keeps no whole model"):
        load_phone(write(tmp_path / "a.safetensors", {"lessons.x": torch.zeros(2)}))
    with pytest.raises(ConfigError, match="which keeps no whole model"):
        load_phone(write(tmp_path / "b.safetensors", state, config={}))
    with pytest.raises(ConfigError, match="model config cannot be read"):
        load_phone(write(tmp_path / "c.safetensors", state, config={"vision": {}}))
    with pytest.raises(FormatError, match="does not fit the model its header describes"):
        load_phone(write(tmp_path / "d.safetensors", state, config=preset("nano").to_dict()))
    (tmp_path / "e.safetensors").write_bytes((tmp_path / "d.safetensors").read_bytes()[:-100])
    with pytest.raises(FormatError, match="cut short"):
        load_phone(tmp_path / "e.safetensors")


def test_presets_have_the_sizes_they_are_named_for() -> None:
    """phone-9b's decoder is the published one, to the last parameter (counted by hand below)."""
    counts = parameter_counts(preset("phone-9b"))
    hidden, ffn, layers, vocabulary = 4096, 13696, 40, 151552
    attention = hidden * (4096 + 2 * 256) + (4096 + 2 * 256) + 4096 * hidden  # q, k, v with biases, and o
    by_hand = 2 * vocabulary * hidden + layers * (attention + 3 * hidden * ffn + 4 * hidden) + hidden
    assert counts["text"] == by_hand == 9_400_279_040
    assert counts["all"] == sum(count for part, count in counts.items() if part != "all")
    assert 85e6 < counts["vision"] < 120e6 and 5e6 < counts["audio"] < 40e6
    nano = parameter_counts(preset("nano"))["all"]
    assert 5e6 < nano < 20e6
