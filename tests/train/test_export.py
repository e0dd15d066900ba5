"""What is exported is what was trained, to the last bit, and any reader of the files finds it."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import autoglm
from autoglm.errors import ConfigError, FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.formats.quant_types import GGMLType
from autoglm.formats.tensor_names import gguf_name, torch_name
from autoglm.train import quantization as quant
from autoglm.train.checkpoint_gguf import load_pair, read_pair
from autoglm.train.export import Exported, export_pair, export_text
from autoglm.train.folding import fold_stem
from autoglm.train.model import PRESETS, AutoGLMPhone, PhoneConfig, preset
from autoglm.train.tokenizer import load_tokenizer
from tests.parity.native import NativeModel
from tests.train.phones import make_phone, some_inputs

TOKENIZER = load_tokenizer()
METADATA = TOKENIZER.gguf_metadata()
PROMPT = TOKENIZER.prompt("who are you?")


def four_layers(*pruned: int) -> PhoneConfig:
    return preset("smoke").with_text(num_layers=4, pruned_ffn=pruned)


@pytest.fixture(scope="module")
def trained() -> AutoGLMPhone:
    """QAT attached, and weights that have moved since the grids were fitted; layers 0 and 2 have no FFN."""
    model = quant.attach_qat(make_phone(four_layers(0, 2), fold=True))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) * 0.003)
    return model


@pytest.fixture(scope="module")
def pair(trained: AutoGLMPhone, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_pair(trained.state_dict(), trained.config, METADATA, tmp_path_factory.mktemp("pair"))


def test_names_and_sizes(pair: Exported) -> None:
    assert pair.text.name == "AutoGLM-Phone-Nano-Q4_K_M.gguf"
    assert pair.mmproj.name == "mmproj-AutoGLM-Phone-Nano-Q8_0.gguf"
    assert [p.name for p in pair.text.parent.iterdir() if p.suffix != ".gguf"] == []


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_parameter_has_one_name_in_the_file(name: str) -> None:
    with torch.device("meta"):
        parameters = list(AutoGLMPhone(preset(name).without_stem_norms()).state_dict())
    stored = [gguf_name(parameter) for parameter in parameters]
    assert len(set(stored)) == len(parameters)
    assert [torch_name(tensor) for tensor in stored] == parameters


def test_unknown_names_are_refused() -> None:
    for name in ("text.layers.0.mlp.gate_proj.weight", "lessons.characters.weight", "blk"):
        with pytest.raises(FormatError, match="no known part"):
            gguf_name(name)
    with pytest.raises(FormatError, match="no known part"):
        torch_name("blk.0.attn_q_norm.weight")


def test_every_weight_of_the_files_is_the_trained_one_bit_for_bit(trained: AutoGLMPhone, pair: Exported) -> None:
    """Read by the gguf package: a reader that shares no code with ours."""
    readers = [gguf.GGUFReader(path) for path in (pair.text, pair.mmproj)]
    stored = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    seen = 0
    for name, module in trained.named_modules():
        if not isinstance(module, quant.QuantLinear | quant.QuantEmbedding):
            continue
        tensor = stored[gguf_name(f"{name}.weight")]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(module.weight.shape)
        expected = module.rounded().detach().numpy()
        if name.endswith(("q_proj", "k_proj")):
            # Neighbouring pairs of the 32 rotated dims become halves, head by head.
            order = [*range(0, 32, 2), *range(1, 32, 2), *range(32, 64)]
            expected = expected.reshape(-1, 64, 256)[:, order].reshape(-1, 256)
        np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32), err_msg=name)
        seen += 1
    assert seen == 1 + 1 + 4 * 4 + 2 * 2 + (4 * 2 + 2) + (11 * 2 + 2) + 5 * 2
    others = {n: p for n, p in trained.named_parameters() if tuple(p.shape) and p.dim() != 2 and "_proj." not in n}
    for name, p in others.items():
        np.testing.assert_array_equal(stored[gguf_name(name)].data.reshape(p.shape), p.detach().numpy(), err_msg=name)
    assert set(stored) == {gguf_name(name) for name, _ in trained.named_parameters()}


def test_a_pair_read_back_is_the_model_that_was_written(trained: AutoGLMPhone, pair: Exported) -> None:
    model, tokenizer = load_pair(pair.text, pair.mmproj)
    assert model.config == trained.config
    assert tokenizer == TOKENIZER
    inputs = some_inputs()
    with torch.no_grad():
        assert torch.equal(model(inputs), trained(inputs))


def test_what_is_read_back_exports_to_the_same_bytes(pair: Exported, tmp_path: Path) -> None:
    read = read_pair(pair.text, pair.mmproj)
    again = export_pair(read.state, read.config, read.tokenizer.gguf_metadata(), tmp_path)
    assert again.text.read_bytes() == pair.text.read_bytes()
    assert again.mmproj.read_bytes() == pair.mmproj.read_bytes()


def test_unattached_weights_are_rounded_to_the_best_grids(tmp_path: Path) -> None:
    """PTQ: an export of plain weights is an export of the same weights with QAT attached and no training."""
    plain = make_phone()
    first = export_pair(plain.state_dict(), plain.config, METADATA, tmp_path / "plain")
    attached = quant.attach_qat(make_phone(fold=True))
    second = export_pair(attached.state_dict(), attached.config, METADATA, tmp_path / "attached")
    assert first.text.read_bytes() == second.text.read_bytes()
    assert first.mmproj.read_bytes() == second.mmproj.read_bytes()


def test_models_without_ears_fusion_or_stem(tmp_path: Path) -> None:
    vision = replace(preset("smoke").vision, stem_channels=())
    config = replace(preset("smoke"), vision=vision, audio=None, fusion=replace(preset("smoke").fusion, mode="concat"))
    model = make_phone(config)
    files = export_pair(model.state_dict(), config, METADATA, tmp_path)
    read = read_pair(files.text, files.mmproj)
    assert read.config == fold_stem(model.state_dict(), config)[1]
    with GGUFFile.open(files.mmproj) as file:
        assert file.get("clip.has_audio_encoder", bool) is False
        assert not any(name.startswith(("a.", "gcmf.", "v.conv_stem")) for name in file.tensors)
        assert file.tensors["v.patch_embd.weight"].shape == (64, 3, 16, 16)


def test_our_engine_gives_the_logits_of_training(
    trained: AutoGLMPhone, pair: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same weights, same rounded activations: what is left is summation order.

    Keys and values are rounded to half precision here as the engine's cache does; else that alone would turn over one
    activation code in thirty. A code at a tie that falls the other way is felt by every later token, so sequences are
    short and most rows, not all, must be equal: within a twentieth of what rounding activations does.
    """
    native = NativeModel(pair.text)
    assert native.runner.model_config.pruned_ffn_layers == (0, 2)
    sequences = np.random.default_rng(1).integers(0, 2000, (12, 6)).tolist()
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **options: attention(q, k.half().float(), v.half().float(), **options),
    )
    theirs = np.concatenate([text_logits(trained, tokens) for tokens in sequences])
    quant.set_activation_rounding(trained, False)
    unrounded = np.concatenate([text_logits(trained, tokens) for tokens in sequences])
    quant.set_activation_rounding(trained, True)
    ours = np.concatenate([native.logits(tokens) for tokens in sequences])
    noise = np.abs(unrounded - theirs).mean()
    difference = np.abs(ours - theirs).mean(axis=1)
    assert (difference < noise / 20).mean() > 0.6, f"{difference / noise}"
    assert difference.mean() < 0.5 * noise


def text_logits(model: AutoGLMPhone, tokens: list[int]) -> np.ndarray:
    """f32 [T, vocabulary] of text alone."""
    ids = torch.tensor([tokens])
    positions = torch.arange(len(tokens)).expand(3, 1, -1)
    mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        hidden = model.text(model.text.embed_tokens(ids), positions, mask)
        return model.text.lm_head(hidden)[0].numpy()


def greedy(model: AutoGLMPhone, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens, and by how much each one's logit leads the second best."""
    ids, leads = list(prompt), []
    for _ in range(count):
        logits = text_logits(model, ids)[-1]
        best = np.sort(logits)
        leads.append(float(best[-1] - best[-2]))
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], leads


def test_compatibility_export_says_the_same_in_llama_cpp(trained: AutoGLMPhone, tmp_path: Path) -> None:
    """Greedy tokens of llama.cpp (which insists on every feed-forward part) and of PyTorch on dequantized weights.

    llama.cpp rounds activations to 8 bits, which moves a logit of this model by 0.02, and a random model has near ties:
    a token counts where its lead is five times that.
    """
    llama_cpp = pytest.importorskip("llama_cpp", reason="the comparison needs llama-cpp-python")
    path = tmp_path / "compatible.gguf"
    export_text(path, trained.state_dict(), trained.config, METADATA, compatible=True)
    with GGUFFile.open(path) as file:
        assert "autoglm.pruned_ffn_layers" not in file.metadata
        assert file.tensors["blk.2.ffn_down.weight"].type == GGMLType.Q6_K
    model = AutoGLMPhone(trained.config).eval()
    quant.attach_qat(model, "fast").load_state_dict(trained.state_dict())
    quant.detach_qat(model)
    theirs = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False, seed=1)
    compared = 0
    for text in ("who are you?", "你是谁", "open WeChat", "tap 123 456", "打开设置", "swipe up"):
        prompt = TOKENIZER.prompt(text)
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == TOKENIZER.encode(text)
        expected, leads = greedy(model, prompt, 12)
        theirs.reset()
        theirs.eval([*prompt, *expected[:-1]])
        logits = theirs.scores[len(prompt) - 1 : len(prompt) - 1 + len(expected)]
        sure = np.array(leads) > 0.1
        np.testing.assert_array_equal(logits.argmax(1)[sure], np.array(expected)[sure], err_msg=text)
        assert np.abs(logits - text_logits(model, [*prompt, *expected])[len(prompt) - 1 : -1]).max() < 0.15
        compared += int(sure.sum())
    assert compared >= 36


def test_what_is_no_whole_model_is_refused(trained: AutoGLMPhone, tmp_path: Path) -> None:
    state, config = dict(trained.state_dict()), trained.config
    path = tmp_path / "out.gguf"

    def refused(message: str, changed: dict[str, torch.Tensor]) -> None:
        with pytest.raises(ConfigError, match=message):
            export_text(path, changed, config, METADATA)
        assert not list(tmp_path.iterdir())

    refused("text.norm.weight is missing", {n: v for n, v in state.items() if n != "text.norm.weight"})
    refused(r"lessons\.x is no part of the model", {**state, "lessons.x": torch.zeros(1)})
    refused(r"text.norm.weight has shape \[3\], expected \[256\]", {**state, "text.norm.weight": torch.zeros(3)})
    refused("holds NaN or infinity", {**state, "text.norm.weight": torch.full((256,), torch.nan)})
    wrong = {**state, "text.lm_head.grid_d": state["text.lm_head.grid_d"][:-1]}
    refused("text.lm_head.weight: the grid in the weights is not one of Q6_K", wrong)
    with pytest.raises(ConfigError, match="cannot be written"):
        export_text(Path("/proc/nowhere/out.gguf"), state, config, METADATA)


def test_a_pair_of_other_files_is_refused(pair: Exported, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not the text file of a pair"):
        read_pair(pair.mmproj, pair.text)
    with pytest.raises(FormatError, match="is not an mmproj with gcmf fusion"):
        read_pair(pair.text, pair.text)
    with pytest.raises(FormatError, match="file not found"):
        read_pair(tmp_path / "no.gguf", pair.mmproj)
    old = bytearray(pair.mmproj.read_bytes())
    old[old.index(b"autoglm.preprocessing_revision") + 30 + 4] = 9  # the name's length is 30, then the value's type
    (tmp_path / "old.gguf").write_bytes(old)
    with pytest.raises(FormatError, match="preprocessing revision 9, this build knows 1"):
        read_pair(pair.text, tmp_path / "old.gguf")
    other = make_phone(preset("smoke").with_text(hidden_size=512))
    files = export_pair(other.state_dict(), other.config, METADATA, tmp_path)
    with pytest.raises(FormatError, match=r"has shape \[128, 256\].*|expected \[.*512"):
        read_pair(files.text, pair.mmproj)


def test_every_key_and_tensor_is_documented(pair: Exported, tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    smoke = preset("smoke")
    assert smoke.audio is not None
    without_stems = replace(smoke.vision, stem_channels=()), replace(smoke.audio, stem_residuals=0)
    plain = make_phone(replace(smoke, vision=without_stems[0], audio=without_stems[1]))
    files = export_pair(plain.state_dict(), plain.config, METADATA, tmp_path)
    for path in (pair.text, pair.mmproj, files.mmproj):
        with GGUFFile.open(path) as file:
            keys = [key for key in file.metadata if not key.startswith(("tokenizer.ggml.", "general.architecture"))]
            assert [key for key in keys if f"`{key}`" not in document] == []
            shown = {re.sub(r"(blk|conv_stem)\.\d+", r"\1.N", name) for name in file.tensors}
            missing = [n for n in shown if f"`{n}`" not in document and f"`{n.rpartition('.')[0]}`" not in document]
            assert missing == []


def test_the_shipped_model_says_the_same_in_llama_cpp(tmp_path: Path) -> None:
    """Its compatibility export, greedily, against PyTorch on the dequantized weights: every token of every reply."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="the comparison needs llama-cpp-python")
    folder = Path(autoglm.__file__).parent
    found = sorted(folder.rglob("AutoGLM-Phone-Nano-Q4_K_M.gguf"))
    if not found:
        pytest.skip("no model is shipped yet")
    pair = read_pair(found[0], found[0].with_name("mmproj-AutoGLM-Phone-Nano-Q8_0.gguf"))
    path = tmp_path / "compatible.gguf"
    export_text(path, pair.state, pair.config, pair.tokenizer.gguf_metadata(), compatible=True)
    model = AutoGLMPhone(pair.config).eval()
    model.load_state_dict({name: value for name, value in pair.state.items() if name in pair.types})
    theirs = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, verbose=False, seed=1)
    stop = pair.tokenizer.id("<|endoftext|>")
    for text in ("who are you?", "你是谁？", "what can you do?", "你能做什么？"):
        prompt = pair.tokenizer.prompt(text)
        expected, _ = greedy(model, prompt, 48)
        expected = expected[: expected.index(stop)] if stop in expected else expected
        theirs.reset()
        answer = islice(theirs.generate(prompt, temp=0.0, repeat_penalty=1.0), len(expected))
        assert [int(token) for token in answer] == expected, text
