"""autoglm info: what a GGUF file holds, as a table or as JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msgspec import structs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autoglm.chat.tokenizer import Tokenizer
from autoglm.cli.console import parameter_count, printable, size
from autoglm.config import EngineConfig, ModelConfig
from autoglm.deploy.machine import available_memory_bytes
from autoglm.engine.fit import fit_engine_config, memory_plan
from autoglm.errors import AutoglmError
from autoglm.formats.gguf import GGUFFile, StringArray, TensorInfo
from autoglm.model.encoder_memory import picture_bytes, sound_bytes
from autoglm.model.gcmf_audio import read_gcmf_audio_config
from autoglm.model.gcmf_vision import read_gcmf_vision_config
from autoglm.model.glm4v_vision import read_glm4v_config
from autoglm.model.loader import read_model_config
from autoglm.model.projector import has_audio_encoder, picture_size, pixel_budget, read_projector_type

# Screens of phones that `info` gives token counts for: upright, on its side, a small one.
_SCREENS = ((1080, 2400), (2400, 1080), (540, 1200))
_BLOCK_NUMBER = re.compile(r"^((?:v\.|a\.|mm\.)?blk)\.\d+\.")


def show_info(path: Path, *, as_json: bool, all_tensors: bool) -> None:
    """Print what the file holds. Raises FormatError for a damaged file."""
    with GGUFFile.open(path) as gguf:
        facts = collect_facts(gguf, all_tensors=all_tensors)
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print_tables(facts, Console())


def collect_facts(gguf: GGUFFile, *, all_tensors: bool) -> dict[str, Any]:
    """Everything `autoglm info` shows, as plain values for JSON."""
    tensors = list(gguf.tensors.values())
    elements = sum(_num_elements(tensor) for tensor in tensors)
    weights_bytes = sum(tensor.nbytes for tensor in tensors)
    facts: dict[str, Any] = {
        "file": str(gguf.path),
        "file_bytes": gguf.file_bytes,
        "architecture": gguf.metadata.get("general.architecture"),
        "name": gguf.metadata.get("general.name"),
        "num_parameters": elements,
        "num_tensors": len(tensors),
        "weights_bytes": weights_bytes,
        "bits_per_weight": round(8 * weights_bytes / elements, 2) if elements else None,
        "types": _type_counts(tensors),
        "groups": _groups(tensors),
        "metadata": {key: _short_value(value) for key, value in gguf.metadata.items()},
    }
    is_projector = facts["architecture"] == "clip"
    facts.update(_projector_facts(gguf) if is_projector else _served_facts(gguf, weights_bytes))
    if all_tensors:
        facts["tensors"] = [
            {"name": t.name, "shape": list(t.shape), "type": t.type.name, "bytes": t.nbytes} for t in tensors
        ]
    return facts


def _served_facts(gguf: GGUFFile, weights_bytes: int) -> dict[str, Any]:
    """What depends on the file being a text model this build serves; the reason where it is not."""
    facts: dict[str, Any] = {"model": None, "tokenizer": None, "memory": None, "projector": None, "problem": None}
    try:
        model = read_model_config(gguf)
        facts["model"] = structs.asdict(model)
        tokenizer = Tokenizer.from_gguf(gguf)
        facts["tokenizer"] = {
            "kind": gguf.metadata.get("tokenizer.ggml.model"),
            "pre_tokenizer": gguf.metadata.get("tokenizer.ggml.pre"),
            "vocab_size": tokenizer.vocab_size,
            "bos": None if tokenizer.bos_token_id is None else tokenizer.token_text(tokenizer.bos_token_id),
            "stops_at": [tokenizer.token_text(token_id) for token_id in sorted(tokenizer.eos_token_ids)],
            "chat_template": "in the file"
            if "tokenizer.chat_template" in gguf.metadata
            else "built in, by architecture",
        }
        facts["memory"] = _memory_facts(model, weights_bytes)
    except AutoglmError as error:
        facts["problem"] = str(error)
    return facts


def _projector_facts(gguf: GGUFFile) -> dict[str, Any]:
    """The same for an mmproj: its encoders, and what a picture and a sound become."""
    facts: dict[str, Any] = {"model": None, "tokenizer": None, "memory": None, "projector": None, "problem": None}
    try:
        kind = read_projector_type(gguf)
        vision = read_glm4v_config(gguf) if kind == "glm4v" else read_gcmf_vision_config(gguf)
        audio = read_gcmf_audio_config(gguf) if kind == "gcmf" and has_audio_encoder(gguf) else None
        budget = pixel_budget(gguf)
        sizes = {f"{width}x{height}": picture_size(gguf, width, height) for width, height in _SCREENS}
        facts["projector"] = {
            "type": kind,
            "text_size": vision.text_size,
            "vision": asdict(vision),
            "audio": None if audio is None else asdict(audio),
            "fusion": gguf.get("gcmf.mode", str) if kind == "gcmf" else None,
            "max_pixels": budget.max_pixels,
            "pictures": {name: {**asdict(size), "tokens": size.rows * size.columns} for name, size in sizes.items()},
            "encoding_bytes": {
                "picture": picture_bytes(gguf, budget.max_pixels),
                "sound": 0 if audio is None else sound_bytes(gguf, audio.max_seconds),
            },
        }
    except AutoglmError as error:
        facts["problem"] = str(error)
    return facts


def _memory_facts(model: ModelConfig, weights_bytes: int) -> dict[str, int]:
    available = available_memory_bytes()
    config = fit_engine_config(model, weights_bytes, EngineConfig(), available)
    plan = memory_plan(model, weights_bytes, config, available)
    return {**structs.asdict(plan), "total_bytes": plan.total_bytes, "ctx_size": config.ctx_size or 0}


def _num_elements(tensor: TensorInfo) -> int:
    count = 1
    for length in tensor.shape:
        count *= length
    return count


def _type_counts(tensors: list[TensorInfo]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        entry = counts.setdefault(tensor.type.name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    return dict(sorted(counts.items(), key=lambda item: -item[1]["bytes"]))


def _groups(tensors: list[TensorInfo]) -> list[dict[str, Any]]:
    """One entry per role: the tensors that differ only in their block number."""
    groups: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault(_BLOCK_NUMBER.sub(r"\1.*.", tensor.name), []).append(tensor)
    result = []
    for role, members in groups.items():
        shapes = {member.shape for member in members}
        types = Counter(member.type.name for member in members)
        result.append(
            {
                "role": role,
                "count": len(members),
                "shape": list(members[0].shape) if len(shapes) == 1 else None,
                "types": dict(types.most_common()),
                "bytes": sum(member.nbytes for member in members),
            }
        )
    return result


def _short_value(value: object) -> object:
    """Metadata for reading: a long list as its length, a long text as its beginning."""
    if isinstance(value, (list, StringArray)):
        return list(value) if len(value) <= 8 else f"list of {len(value)}"
    return printable(value, 200) if isinstance(value, str) else value


def _print_tables(facts: dict[str, Any], console: Console) -> None:
    console.print(_overview(facts))
    if facts["problem"] is not None:
        console.print(f"This file is not served by this build: {escape(printable(facts['problem'], 400))}")
    roles = Table(title="Tensors by role (* = every block)", title_justify="left")
    for column in ("role", "count", r"shape \[out, in]", "types", "size"):
        roles.add_column(column, justify="right" if column in ("count", "size") else "left")
    for group in facts["groups"]:
        types = ", ".join(name if len(group["types"]) == 1 else f"{n} {name}" for name, n in group["types"].items())
        shape = "varies" if group["shape"] is None else str(group["shape"])
        roles.add_row(escape(printable(group["role"])), str(group["count"]), escape(shape), types, size(group["bytes"]))
    console.print(roles)
    if "tensors" in facts:
        listing = Table(title="All tensors", title_justify="left")
        for column in ("name", r"shape \[out, in]", "type", "size"):
            listing.add_column(column)
        for tensor in facts["tensors"]:
            shape = escape(str(tensor["shape"]))
            listing.add_row(escape(printable(tensor["name"])), shape, tensor["type"], size(tensor["bytes"]))
        console.print(listing)


def _overview(facts: dict[str, Any]) -> Table:
    table = Table(title=escape(printable(Path(facts["file"]).name)), title_justify="left", show_header=False)
    table.add_column("what", style="bold")
    table.add_column("value")

    def row(what: str, value: object) -> None:
        table.add_row(what, escape(printable(str(value), 400)))

    row("name", facts["name"] or "not named")
    row("architecture", facts["architecture"])
    row("parameters", f"{parameter_count(facts['num_parameters'])} ({facts['num_parameters']:,})")
    row(
        "file", f"{size(facts['file_bytes'])}, {facts['num_tensors']} tensors, {facts['bits_per_weight']} bits a weight"
    )
    row("types", ", ".join(f"{name} {size(entry['bytes'])}" for name, entry in facts["types"].items()))
    model, tokenizer, memory = facts["model"], facts["tokenizer"], facts["memory"]
    if model is not None:
        pruned = f", none in layers {list(model['pruned_ffn_layers'])}" if model["pruned_ffn_layers"] else ""
        layers = f"{model['num_hidden_layers']} of width {model['hidden_size']}"
        row("layers", f"{layers}, FFN {model['intermediate_size']}{pruned}")
        heads = f"{model['num_attention_heads']} query, {model['num_key_value_heads']} key/value"
        row("attention heads", f"{heads}, {model['head_dim']} wide")
        rope = f"theta {model['rope_theta']:g}, {model['rotary_dim']} of {model['head_dim']} dimensions"
        row("rotary", rope + (f", M-RoPE sections {list(model['mrope_section'])}" if model["mrope_section"] else ""))
        row("context", f"{model['max_position_embeddings']} tokens")
    if tokenizer is not None:
        row("tokenizer", f"{tokenizer['kind']} ({tokenizer['pre_tokenizer']}), {tokenizer['vocab_size']} tokens")
        row("stops at", " ".join(tokenizer["stops_at"]))
        row("chat template", tokenizer["chat_template"])
    if memory is not None:
        row("memory, weights", f"{size(memory['weights_bytes'])} and {size(memory['workspace_bytes'])} to work in")
        row("memory, context", f"{size(memory['kv_token_bytes'] * 1000)} for 1000 tokens (f16 KV cache)")
        pool = memory["kv_pool_bytes"] // memory["kv_token_bytes"]
        row(
            "fits here",
            f"context of {memory['ctx_size']} tokens, {pool} in all; {size(memory['available_bytes'])} free",
        )
    if facts["projector"] is not None:
        for what, value in _projector_rows(facts["projector"]):
            row(what, value)
    return table


def _projector_rows(projector: dict[str, Any]) -> list[tuple[str, str]]:
    vision, audio, takes = projector["vision"], projector["audio"], projector["encoding_bytes"]
    grids = (f"{name} as {p['width']}x{p['height']}: {p['tokens']}" for name, p in projector["pictures"].items())
    rows = [
        ("projector", f"{projector['type']}, tokens of width {projector['text_size']}"),
        ("vision encoder", f"{_encoder(vision)}, patches of {vision['patch_size']} pixels"),
        ("tokens per picture", ", ".join(grids)),
        ("memory, picture", f"{size(takes['picture'])} at max_pixels {projector['max_pixels']}, its most"),
    ]
    if audio is not None:
        rows.append(("audio encoder", f"{_encoder(audio)}, {audio['num_mels']} mel bins"))
        rows.append(("tokens per sound", f"25 a second, at most {audio['max_seconds']} s"))
        rows.append(("memory, sound", f"{size(takes['sound'])} to encode {audio['max_seconds']} s"))
    if projector["fusion"] is not None:
        rows.append(("fusion", "gated, over a user turn" if projector["fusion"] == "gcmf" else projector["fusion"]))
    return rows


def _encoder(config: dict[str, Any]) -> str:
    return f"{config['num_layers']} layers of width {config['hidden_size']}, {config['num_heads']} heads"
