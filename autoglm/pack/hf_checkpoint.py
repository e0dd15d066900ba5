"""A Hugging Face checkpoint folder: its JSON files, and where each tensor of its safetensors shards lies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from autoglm.errors import ConfigError, FormatError
from autoglm.formats.safetensors import SafeTensor, read_header

ARCHITECTURE = "Glm4vForConditionalGeneration"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FETCH = "fetch the whole repository again, e.g. with 'hf download OWNER/REPO --local-dir FOLDER'"

T = TypeVar("T")


class JsonObject:
    """A JSON object out of a file, asked for values of one type each.

    where  what messages call it: the file, and the part of it
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def is_object(self, key: str) -> bool:
        return isinstance(self._values.get(key), dict)

    @overload
    def get(self, key: str, type_: type[T]) -> T: ...
    @overload
    def get(self, key: str, type_: type[T], default: T) -> T: ...
    def get(self, key: str, type_: type[T], default: T | None = None) -> T:
        """The value of a key, the default where it is absent or null; a float takes integers too.

        Raises FormatError for another type, or an absent key without a default.
        """
        value = self._values.get(key)
        if value is None:
            if default is not None:
                return default
            raise FormatError(f"{self.where} has no {key!r}, expected {type_.__name__}; {_FETCH}")
        if type_ is float and type(value) is int:
            value = float(value)
        if type(value) is not type_:
            raise FormatError(f"{self.where}: {key!r} is a {type(value).__name__}, expected {type_.__name__}")
        result: T = value
        return result

    def section(self, key: str, default: Mapping[str, Any] | None = None) -> JsonObject:
        """An object inside this one."""
        values: dict[str, Any] = self.get(key, dict) if default is None else self.get(key, dict, dict(default))
        return JsonObject(values, f"{self.where}: {key}")


@dataclass(frozen=True)
class HfCheckpoint:
    """An opened folder.

    config   config.json
    tensors  name -> where it lies, over all shards
    """

    folder: Path
    config: JsonObject
    tensors: Mapping[str, SafeTensor]

    def json(self, name: str) -> JsonObject | None:
        """A further JSON file of the folder; None if there is none."""
        path = self.folder / name
        return JsonObject(_read_json(path), str(path)) if path.is_file() else None

    def sources(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change (ns) of every shard: what a later run compares to know the weights again."""
        paths = sorted({tensor.path for tensor in self.tensors.values()})
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def open_checkpoint(folder: Path) -> HfCheckpoint:
    """Read config.json and the header of every shard.

    Raises ConfigError if the folder is none, FormatError for another architecture, and for missing or damaged files.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {what}, expected the folder of a checkpoint, with config.json and *.safetensors")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json, so it is no checkpoint folder; {_FETCH}")
    config = JsonObject(_read_json(folder / "config.json"), str(folder / "config.json"))
    _check_architecture(folder, config)
    return HfCheckpoint(folder, config, _read_tensors(folder))


def _check_architecture(folder: Path, config: JsonObject) -> None:
    names = config.get("architectures", list, [])
    if ARCHITECTURE in names:
        return
    found = names[0] if names and isinstance(names[0], str) else config.get("model_type", str, "of unknown kind")
    raise FormatError(f"{folder} is {ascii(found)[:60]}, and only {ARCHITECTURE} can be converted")


def _read_tensors(folder: Path) -> dict[str, SafeTensor]:
    if (folder / _INDEX).is_file():
        return _read_shards(folder)
    if (folder / _SINGLE).is_file():
        return read_header(folder / _SINGLE)
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
    reason = "pickled weights are never opened; fetch the safetensors files" if pickled else _FETCH
    raise FormatError(f"{folder} has neither {_INDEX} nor {_SINGLE}: {reason}")


def _read_shards(folder: Path) -> dict[str, SafeTensor]:
    index = JsonObject(_read_json(folder / _INDEX), str(folder / _INDEX))
    shard_of = index.get("weight_map", dict)
    shards = sorted({str(shard) for shard in shard_of.values()})
    for shard in shards:
        if Path(shard).name != shard:  # an index never leads out of its folder
            raise FormatError(f"{folder / _INDEX}: shard {ascii(shard)[:80]} is no plain file name; {_FETCH}")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise FormatError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing, the first is {missing[0]}; {_FETCH}"
        )
    headers = {shard: read_header(folder / shard) for shard in shards}
    for name, shard in shard_of.items():
        if name not in headers[shard]:
            raise FormatError(f"{folder / shard}: tensor {ascii(name)[:80]} is missing, the index says it is there")
    return {name: headers[shard][name] for name, shard in shard_of.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise FormatError(f"{path}: is no JSON object; {_FETCH}")
    return values
