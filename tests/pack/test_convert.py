"""autoglm convert against the community's converter, transformers and the rule of real Q4_K_M files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from autoglm import cli
from autoglm.errors import ConfigError, FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.formats.quant_types import GGMLType
from autoglm.pack.convert import Converted, convert
from autoglm.pack.type_plan import FileType
from tests.pack import hf_folder
from tests.pack.hf_folder import FIXTURE, fixture_checkpoint
from tests.parity.native import NativeModel
from tests.tiny_models import rounded_cache

LAYERS, WIDTH, FFN, VOCAB = 3, 256, 384, 384  # 384 = 128 mod 256, as 13696 is; of 3 layers the last has more bits
HEADS, HEAD_DIM, ROTARY = 4, 64, 32
QK_ORDER = [*range(0, ROTARY, 2), *range(1, ROTARY, 2), *range(ROTARY, HEAD_DIM)]


@pytest.fixture(scope="module")
def oracle() -> Glm4vForConditionalGeneration:
    """A random model whose weights bf16 holds exactly."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [4, 6, 6]}
    text = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_parameters": rope, "pad_token_id": 300, "eos_token_id": 300,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": WIDTH,
        "image_size": 84, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    config = Glm4vConfig(text_config=text, vision_config=vision, image_token_id=314, tie_word_embeddings=False)
    model = Glm4vForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                noise *= 0.8 / parameter[0].numel() ** 0.5
            else:
                noise = noise * 0.2 + (0.0 if name.endswith("bias") else 1.0)
            parameter.copy_(noise.bfloat16())
    return model


@pytest.fixture(scope="module")
def checkpoint(oracle: Glm4vForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as the library saves it: bf16, several shards, an index."""
    folder = tmp_path_factory.mktemp("checkpoint") / "Tiny-9B"
    state = {name: value.bfloat16() for name, value in oracle.state_dict().items()}
    oracle.save_pretrained(folder, state_dict=state, max_shard_size="1MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    hf_folder.copy_small_files(folder)
    return folder


@pytest.fixture(scope="module")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[FileType], list[Converted]]:
    """The pair at a type; each made once."""
    made: dict[FileType, list[Converted]] = {}

    def make(kind: FileType) -> list[Converted]:
        if kind not in made:
            out = tmp_path_factory.mktemp(kind.name)
            mmproj = FileType.Q8_0 if kind == FileType.Q4_K_M else kind
            made[kind] = convert(checkpoint, out, file_type=kind, mmproj_type=mmproj)
        return made[kind]

    return make


def expected_tensors(model: Glm4vForConditionalGeneration) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What the text file and the mmproj must hold in f32, written down without the converter's tables."""
    state = {name: value.float().numpy() for name, value in model.state_dict().items()}
    text = {
        "token_embd.weight": state["model.language_model.embed_tokens.weight"],
        "output.weight": state["lm_head.weight"],
        "output_norm.weight": state["model.language_model.norm.weight"],
    }
    for i in range(LAYERS):
        layer = f"model.language_model.layers.{i}."
        for ours, theirs in {
            "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
            "post_attention_norm.weight": "post_self_attn_layernorm.weight", "ffn_up.weight": "mlp.gate_up_proj.weight",
            "post_ffw_norm.weight": "post_mlp_layernorm.weight", "ffn_down.weight": "mlp.down_proj.weight",
            "attn_v.weight": "self_attn.v_proj.weight", "attn_v.bias": "self_attn.v_proj.bias",
            "attn_output.weight": "self_attn.o_proj.weight",
        }.items():  # fmt: skip
            text[f"blk.{i}.{ours}"] = state[layer + theirs]
        for part in "qk":
            for end in ("weight", "bias"):
                value = state[f"{layer}self_attn.{part}_proj.{end}"]
                heads = value.reshape(-1, HEAD_DIM, *value.shape[1:])[:, QK_ORDER]
                text[f"blk.{i}.attn_{part}.{end}"] = heads.reshape(value.shape)
    kernel = state["model.visual.patch_embed.proj.weight"]
    mmproj = {"v.patch_embd.weight": kernel[:, :, 0], "v.patch_embd.weight.1": kernel[:, :, 1]}
    for ours, theirs in {
        "v.patch_embd.bias": "patch_embed.proj.bias", "v.norm_embd.weight": "post_conv_layernorm.weight",
        "v.position_embd.weight": "embeddings.position_embedding.weight", "v.post_ln.weight": "post_layernorm.weight",
        "mm.patch_merger.weight": "downsample.weight", "mm.patch_merger.bias": "downsample.bias",
        "mm.model.fc.weight": "merger.proj.weight", "mm.post_norm.weight": "merger.post_projection_norm.weight",
        "mm.post_norm.bias": "merger.post_projection_norm.bias", "mm.gate.weight": "merger.gate_proj.weight",
        "mm.up.weight": "merger.up_proj.weight", "mm.down.weight": "merger.down_proj.weight",
    }.items():  # fmt: skip
        mmproj[ours] = state["model.visual." + theirs]
    for i in range(2):
        for ours, theirs in {
            "ln1": "norm1", "ln2": "norm2", "attn_qkv": "attn.qkv", "attn_out": "attn.proj",
            "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        }.items():  # fmt: skip
            mmproj[f"v.blk.{i}.{ours}.weight"] = state[f"model.visual.blocks.{i}.{theirs}.weight"]
    return text, mmproj


def expected_type(name: str, value: np.ndarray, kind: FileType) -> str:
    """formats: the table of real Q4_K_M files, and what the community's converter gives at the other types."""
    if value.ndim == 1 or name == "v.position_embd.weight" or kind == FileType.F32:
        return "F32"
    if value.ndim == 4:
        return "F16" if kind == FileType.F16 else "F32"
    if kind == FileType.F16:
        return "F16"
    if kind == FileType.Q8_0 or name.startswith(("v.", "mm.")):
        return "Q8_0"
    more = name.startswith(f"blk.{LAYERS - 1}.")
    if "ffn_down" in name:
        return "Q8_0" if more else "Q5_0"
    return "Q6_K" if name == "output.weight" or ("attn_v" in name and more) else "Q4_K"


# Largest relative RMS error of a Gaussian matrix; vectors and convolutions are exact.
TYPE_ERRORS = {"F32": 0.0, "F16": 3e-4, "Q8_0": 0.006, "Q6_K": 0.02, "Q5_0": 0.045, "Q4_K": 0.08}


@pytest.mark.parametrize("kind", FileType, ids=lambda kind: kind.name)
def test_every_tensor_under_gguf(
    kind: FileType, converted: Callable[[FileType], list[Converted]], oracle: Glm4vForConditionalGeneration
) -> None:
    for file, expected in zip(converted(kind), expected_tensors(oracle), strict=True):
        reader = gguf.GGUFReader(file.path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        assert set(tensors) == set(expected)
        reported = {error.name: error for error in file.errors}
        for name, value in expected.items():
            tensor = tensors[name]
            assert tensor.tensor_type.name == expected_type(name, value, kind), name
            assert tuple(reversed(tensor.shape.tolist())) == value.shape, name
            back = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(value.shape).astype(np.float64)
            error = np.sqrt(((back - value) ** 2).sum() / (value.astype(np.float64) ** 2).sum())
            assert error <= TYPE_ERRORS[tensor.tensor_type.name], (name, error)
            assert reported[name].relative_rmse == pytest.approx(error, rel=1e-3, abs=1e-9)


def test_files_and_keys(converted: Callable[[FileType], list[Converted]]) -> None:
    text, mmproj = converted(FileType.Q4_K_M)
    assert [text.path.name, mmproj.path.name] == ["Tiny-9B-Q4_K_M.gguf", "mmproj-Tiny-9B-Q8_0.gguf"]
    assert sorted(path.name for path in text.path.parent.iterdir()) == [text.path.name, mmproj.path.name]
    with GGUFFile.open(text.path) as file:
        keys = {key: value for key, value in file.metadata.items() if key.startswith(("general.", "glm4."))}
    eps = float(np.float32(1e-5))
    assert keys == {
        "general.architecture": "glm4", "general.type": "model", "general.name": "Tiny-9B",
        "general.size_label": "1.7M", "general.file_type": 15, "general.quantization_version": 2,
        "glm4.block_count": 3, "glm4.context_length": 512, "glm4.embedding_length": 256,
        "glm4.feed_forward_length": 384, "glm4.attention.head_count": 4, "glm4.attention.head_count_kv": 2,
        "glm4.attention.layer_norm_rms_epsilon": eps, "glm4.rope.dimension_count": 32,
        "glm4.rope.freq_base": 10000.0, "glm4.rope.dimension_sections": [4, 6, 6, 0],
    }  # fmt: skip


def test_equal_to_the_communitys_converter(tmp_path: Path) -> None:
    """Keys, values, types and every byte of the weights, of files their converter made from this checkpoint."""
    folder = fixture_checkpoint(tmp_path / "hf")
    files = convert(folder, tmp_path, file_type=FileType.F32, mmproj_type=FileType.F16, name="Hf")
    for file, theirs in zip(files, ("main-f32.gguf", "mmproj-f16.gguf"), strict=True):
        with GGUFFile.open(file.path) as ours, GGUFFile.open(FIXTURE / theirs) as known:
            assert ours.metadata == known.metadata
            assert set(ours.tensors) == set(known.tensors)
            for name, info in known.tensors.items():
                assert (ours.tensors[name].shape, ours.tensors[name].type) == (info.shape, info.type), name
                np.testing.assert_array_equal(ours.data(name), known.data(name), err_msg=name)


@pytest.mark.parametrize(("kind", "bound"), [(FileType.F32, 2e-4), (FileType.F16, 2e-2)], ids=["F32", "F16"])
def test_logits_agree_with_transformers(
    kind: FileType,
    bound: float,
    converted: Callable[[FileType], list[Converted]],
    oracle: Glm4vForConditionalGeneration,
) -> None:
    """The text file in our engine against the model it was saved from, keys and values rounded as our cache does."""
    ids = np.random.default_rng(8).integers(0, 300, 40).tolist()
    decoder = oracle.model.language_model
    where = torch.arange(len(ids)).expand(3, 1, -1)
    with torch.no_grad(), rounded_cache(decoder, "f16"):
        hidden = decoder(input_ids=torch.tensor([ids]), position_ids=where, use_cache=False).last_hidden_state
        wanted = oracle.lm_head(hidden)[0].numpy()
    got = NativeModel(converted(kind)[0].path, num_blocks=8, num_threads=1).logits(ids)
    difference = float(np.abs(got - wanted).max())
    assert difference < bound and np.abs(wanted).max() > 1, difference


# --- interruptions -----------------------------------------------------------------------------------------


class Stop(KeyboardInterrupt):
    """Ctrl-C at a chosen moment."""


def stop_at(what: str, call: int) -> Callable[[str, int, int], None]:
    calls = 0

    def progress(label: str, done: int, total: int) -> None:
        nonlocal calls
        assert 0 < done <= total
        calls += label.startswith(what)
        if calls == call:
            raise Stop

    return progress


def run(folder: Path, out: Path, progress: Callable[[str, int, int], None] | None = None) -> list[Converted]:
    types = {"file_type": FileType.Q8_0, "mmproj_type": FileType.F16}
    return convert(folder, out, name="M", progress=progress, **types)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fixture_checkpoint(tmp_path / "hf")


@pytest.fixture
def whole(folder: Path, tmp_path: Path) -> dict[str, bytes]:
    return {file.path.name: file.path.read_bytes() for file in run(folder, tmp_path / "whole")}


@pytest.mark.parametrize(
    ("what", "call"), [("writing M-Q8", 1), ("writing M-Q8", 17), ("checking M-Q8", 3), ("writing mmproj", 5)]
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    what: str, call: int, folder: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        run(folder, out, stop_at(what, call))
    assert not (out / what.split()[1].replace("M-Q8", "M-Q8_0.gguf")).exists()
    written: list[str] = []
    run(folder, out, lambda label, done, total: written.append(label))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    # What the first run finished is not written again: 29 tensors, each of one piece.
    finished = {"writing M-Q8": call - 1, "checking M-Q8": 29, "writing mmproj": 29}[what]
    assert sum(label.startswith("writing M-Q8") for label in written) == 29 - finished


def test_a_torn_journal_line_counts_for_nothing(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        run(folder, out, stop_at("writing", 5))
    with open(out / "M-Q8_0.gguf.part.done", "a") as journal:
        journal.write("blk.1.attn_q.weight")  # the power went before the line's end
    run(folder, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_a_changed_checkpoint_begins_anew(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        run(folder, out, stop_at("writing", 9))
    hf_folder.poke(folder / "model-00001-of-00002.safetensors", "model.language_model.norm.weight", 7.0)
    text, _ = run(folder, out)
    assert "begun anew" in caplog.text
    with GGUFFile.open(text.path) as file:
        assert file.data("output_norm.weight").view(np.float32)[0] == 7.0


def test_damage_on_the_disk_is_found(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Bytes of one block lost after they were written; the next run begins anew and succeeds."""
    out = tmp_path / "out"
    with pytest.raises(Stop):
        run(folder, out, stop_at("checking", 1))
    part = out / "M-Q8_0.gguf.part"
    with GGUFFile.open(part) as file:
        offset = file.tensors["blk.1.ffn_up.weight"].offset
        assert file.tensors["blk.1.ffn_up.weight"].type == GGMLType.Q8_0
    with open(part, "rb+") as handle:
        handle.seek(offset + 34 * 4)
        handle.write(bytes(34))
    with pytest.raises(FormatError, match=r"blk\.1\.ffn_up\.weight differs from the checkpoint, row 2 "):
        run(folder, out)
    assert not (out / "M-Q8_0.gguf").exists()
    run(folder, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_finished_files_are_read_back_and_strange_ones_refused(folder: Path, tmp_path: Path) -> None:
    first = run(folder, tmp_path)
    labels: set[str] = set()
    again = run(folder, tmp_path, lambda label, done, total: labels.add(label))
    assert again == first and not any(label.startswith("writing") for label in labels)
    (tmp_path / "M-Q8_0.gguf").write_bytes(b"GGUF of another make")
    with pytest.raises(ConfigError, match="made from something else"):
        run(folder, tmp_path)


# --- command -----------------------------------------------------------------------------------------------


def test_the_command(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(folder), "--out", str(tmp_path), "--type", "q4_k_m", "--name", "N", "-t", "1"]
    assert cli.main(arguments) == 0
    out, err = capfd.readouterr()
    for line in (f"'{tmp_path / 'N-Q4_K_M.gguf'}', 101.8 kB, 29 tensors read back", "/mmproj-N-Q8_0.gguf', "):
        assert line in out
    assert "Writing N-Q4_K_M.gguf" in err and "Checking mmproj-N-Q8_0.gguf" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--type", "q5_k_m"], "--type is 'q5_k_m', expected one of f32, f16, q8_0, q4_k_m"),
        (["--mmproj-type", "q4_k_m"], "--mmproj-type is 'q4_k_m', expected one of q8_0, f16, f32"),
        (["--name", "../x"], "--name"),
        (["-t", "0"], "--threads"),
    ],
)
def test_wrong_flags(arguments: list[str], message: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(folder), *arguments]) == 2
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1
