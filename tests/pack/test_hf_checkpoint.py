"""One broken checkpoint per error, named for what is wrong: one line each that names the thing, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autoglm.errors import AutoglmError, ConfigError, FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.formats.safetensors import read_header, to_float32
from autoglm.pack.convert import convert
from autoglm.pack.type_plan import FileType
from tests.pack.hf_folder import INDEX, edit_header, edit_json, fixture_checkpoint, poke, write_index, write_safetensors

TEXT, VISION = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.language_model.norm.weight"
Break = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fixture_checkpoint(tmp_path / "hf")


def run(folder: Path, out: Path, kind: FileType = FileType.Q8_0) -> None:
    convert(folder, out, file_type=kind, mmproj_type=FileType.F16, name="M")


def refused(folder: Path, out: Path, kind: FileType = FileType.Q8_0) -> str:
    with pytest.raises(AutoglmError) as caught:
        run(folder, out, kind)
    assert isinstance(caught.value, ConfigError | FormatError)
    assert not list(out.glob("*.gguf")), "a file got its name"
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def rename_tensor(folder: Path, old: str, new: str) -> None:
    def change(header: dict[str, object]) -> None:
        header[new] = header.pop(old)

    edit_header(folder / TEXT, change)
    write_index(folder)


def drop_tensor(folder: Path, name: str, shard: str = TEXT) -> None:
    edit_header(folder / shard, lambda header: header.pop(name))
    write_index(folder)


def set_shape(folder: Path, shape: list[int]) -> None:
    edit_header(folder / TEXT, lambda header: header[NORM].update(shape=shape))


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def only_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


def point_outside(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NORM] = "../secret.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def another_split(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("\\\\p{N}{1,3}", "\\\\p{N}"))


CASES: dict[str, tuple[Break, str]] = {
    "no folder": (lambda f: shutil.rmtree(f), "does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is no object": (lambda f: (f / "config.json").write_text("[]"), "config.json: is no JSON object"),
    "other model": (
        lambda f: edit_json(f / "config.json", architectures=["Qwen2ForCausalLM"]),
        "is 'Qwen2ForCausalLM', and only Glm4vForConditionalGeneration can be converted",
    ),
    "missing shard": (lambda f: (f / VISION).unlink(), f"1 of 2 shards are missing, the first is {VISION}"),
    "no weights": (lambda f: (f / INDEX).unlink(), "neither model.safetensors.index.json nor model.safetensors"),
    "only pickles": (only_pickles, "pickled weights are never opened"),
    "index leads out": (point_outside, "no plain file name"),
    "index names more": (
        lambda f: edit_header(f / TEXT, lambda header: header.pop(NORM)),
        f"tensor '{NORM}' is missing, the index says",
    ),
    "missing tensor": (lambda f: drop_tensor(f, NORM), f"1 tensors are missing, the first is {NORM}"),
    "missing in tower": (
        lambda f: drop_tensor(f, "model.visual.downsample.bias", VISION),
        "the first is model.visual.downsample.bias",
    ),
    "unknown tensor": (
        lambda f: edit_json(f / "config.json", text_config__num_hidden_layers=1),
        "13 tensors are no part of the model",
    ),
    "renamed tensor": (lambda f: rename_tensor(f, NORM, "model.language_model.extra"), f"the first is {NORM}"),
    "wrong shape": (lambda f: set_shape(f, [8, 8]), f"{NORM} has shape [8, 8], expected [64]"),
    "shape against bytes": (lambda f: set_shape(f, [65]), "has 256 bytes, expected 260 by its shape"),
    "cut short": (lambda f: cut(f / TEXT, 400_000), "the download is not complete"),
    "cut in the header": (lambda f: cut(f / TEXT, 100), "header fits its 100 bytes"),
    "empty shard": (lambda f: cut(f / TEXT, 0), "header fits its 0 bytes"),
    "git lfs pointer": (lambda f: (f / TEXT).write_bytes(b"version https://git-lfs"), "a Git LFS pointer"),
    "header is no json": (lambda f: (f / TEXT).write_bytes(b"\4\0\0\0\0\0\0\0abcd"), "no JSON object"),
    "other element type": (
        lambda f: edit_header(f / TEXT, lambda header: header[NORM].update(dtype="I64")),
        "is of type 'I64', expected one of F32, F16, BF16",
    ),
    "not a number": (lambda f: poke(f / TEXT, "lm_head.weight", np.nan), "lm_head.weight holds NaN or infinity"),
    "field missing": (
        lambda f: edit_json(f / "config.json", text_config__num_attention_heads=None),
        "text_config has no 'num_attention_heads'",
    ),
    "field of another type": (
        lambda f: edit_json(f / "config.json", vision_config__depth="2"),
        "vision_config: 'depth' is a str, expected int",
    ),
    "heads do not divide": (
        lambda f: edit_json(f / "config.json", text_config__num_attention_heads=5),
        "do not go into a hidden size of 64",
    ),
    "sections against factor": (
        lambda f: edit_json(f / "config.json", text_config__rope_parameters__mrope_section=[2, 2, 2]),
        "turns 12 of 16 dimensions, expected 8",
    ),
    "scaled positions": (
        lambda f: edit_json(f / "config.json", text_config__rope_parameters__rope_type="yarn"),
        "'rope_type' is 'yarn', and only 'default' can be converted",
    ),
    "other activation": (
        lambda f: edit_json(f / "config.json", vision_config__hidden_act="gelu"),
        "'hidden_act' is 'gelu'",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "other tokenizer": (
        lambda f: edit_json(f / "tokenizer.json", model__type="Unigram"),
        "no byte-level BPE",
    ),
    "token outside the vocabulary": (
        lambda f: edit_json(f / "tokenizer.json", model__vocab={"a": 384}),
        "has id 384, expected 0 to 383",
    ),
    "no special tokens": (lambda f: edit_json(f / "tokenizer.json", added_tokens=[]), "not a GLM-4 tokenizer"),
    "other split": (another_split, "splits text in another way"),
    "bad means": (
        lambda f: edit_json(f / "preprocessor_config.json", image_mean=[0.5]),
        "'image_mean' must hold three",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_that_names_it(case: str, folder: Path, tmp_path: Path) -> None:
    damage, message = CASES[case]
    damage(folder)
    assert message in refused(folder, tmp_path / "out")


def test_what_f16_cannot_hold(folder: Path, tmp_path: Path) -> None:
    poke(folder / TEXT, "lm_head.weight", 1e5)
    assert "lm_head.weight holds 1e+05, too large for F16" in refused(folder, tmp_path, FileType.F16)


def test_a_full_disk_is_said_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "0.00 GB free" in refused(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "--out" in refused(folder, tmp_path / "file" / "out")


def test_older_spellings_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Names and rotary settings as before transformers 4.53 and 5, merges as strings, everything in one file."""
    run(folder, tmp_path / "new")
    headers, blobs, at = {}, [], 0
    for shard in (TEXT, VISION):
        path = folder / shard
        for name, tensor in read_header(path).items():
            old = name.removeprefix("model.") if ".visual." in name else name.replace("model.language_model.", "model.")
            blob = tensor.array().tobytes()
            headers[old] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + len(blob)]}
            blobs.append(blob)
            at += len(blob)
        path.unlink()
    headers["model.rotary_emb.inv_freq"] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    write_safetensors(folder / "model.safetensors", headers, b"".join(blobs))
    (folder / INDEX).unlink()
    edit_json(
        folder / "config.json",
        text_config__rope_parameters=None,
        text_config__rope_scaling={"type": "default", "mrope_section": [1, 1, 2]},
        text_config__rope_theta=10000.0,
        text_config__partial_rotary_factor=0.5,
    )
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    eos = {"content": "<|endoftext|>", "special": True}
    edit_json(folder / "tokenizer_config.json", chat_template=template, eos_token=eos)
    run(folder, tmp_path / "old")
    for name in ("M-Q8_0.gguf", "mmproj-M-F16.gguf"):
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_a_tied_head_is_left_out(folder: Path, tmp_path: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    run(folder, tmp_path, FileType.Q4_K_M)
    with GGUFFile.open(tmp_path / "M-Q4_K_M.gguf") as file:
        assert "output.weight" not in file.tensors
        assert file.tensors["token_embd.weight"].type.name == "Q8_0"  # of the output's Q6_K, for a width of 64


def test_bf16_and_f16_are_widened_exactly(tmp_path: Path) -> None:
    halves = np.array([1.5, -65504, 2.0**-24, 0], np.float16)
    bits = np.array([0x3FC0, 0xC2F7, 0x0001, 0x8000], np.uint16)
    header = {
        "a": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [8, 16]},
    }
    write_safetensors(tmp_path / "x", header, halves.tobytes() + bits.tobytes())
    tensors = read_header(tmp_path / "x")
    np.testing.assert_array_equal(to_float32(tensors["a"].array(), "F16").reshape(-1), halves.astype(np.float32))
    widened = to_float32(tensors["b"].array(), "BF16")
    np.testing.assert_array_equal(widened.view(np.uint32), bits.astype(np.uint32) << 16)
    assert widened[0] == 1.5 and widened[1] == -123.5
