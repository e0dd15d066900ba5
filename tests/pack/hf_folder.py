"""Checkpoint folders as they are published: config.json, shards with an index, tokenizer files."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

FIXTURE = Path(__file__).parent.parent / "fixtures" / "glm4v-tiny"
SHARDS = {
    "model-00001-of-00002.safetensors": "text.safetensors",
    "model-00002-of-00002.safetensors": "vision.safetensors",
}
INDEX = "model.safetensors.index.json"


def copy_small_files(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
        shutil.copy(FIXTURE / name, folder / name)


def fixture_checkpoint(folder: Path) -> Path:
    """The tiny checkpoint that the community's converter was run on, in two shards."""
    folder.mkdir()
    copy_small_files(folder)
    shutil.copy(FIXTURE / "config.json", folder / "config.json")
    for shard, source in SHARDS.items():
        shutil.copy(FIXTURE / source, folder / shard)
    write_index(folder)
    return folder


def write_index(folder: Path) -> None:
    shards = {shard: read_safetensors(folder / shard)[0] for shard in SHARDS}
    weight_map = {name: shard for shard, header in shards.items() for name in header if name != "__metadata__"}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_safetensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(path: Path, change: Any) -> None:
    """change(header) edits the header of a file in place."""
    header, data = read_safetensors(path)
    change(header)
    write_safetensors(path, header, data)


def edit_json(path: Path, **values: Any) -> None:
    """Set keys, "a.b" for one inside another; None takes a key away."""
    content = json.loads(path.read_text())
    for dotted, value in values.items():
        *outer, last = dotted.split("__")
        place = content
        for key in outer:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(content))


def poke(path: Path, name: str, value: float) -> None:
    """Set the first element of an F32 tensor."""
    header, data = read_safetensors(path)
    begin = header[name]["data_offsets"][0]
    write_safetensors(path, header, data[:begin] + np.float32(value).tobytes() + data[begin + 4 :])
