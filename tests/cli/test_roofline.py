"""autoglm bench --roofline: parts that add up, work counted a second time from the file, refusals in one line."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from autoglm import cli
from autoglm.cli import roofline
from autoglm.formats.gguf import GGUFFile
from autoglm.formats.quant_types import BLOCK
from tests.tiny_models import TINY_LLAMA, TinyModel

PROMPT, DEPTH = 24, 100
KINDS = ("int8", "int16", "float")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_LIMIT_S", 0.0)
    monkeypatch.setattr(roofline, "_STEP_S", 0.0)
    monkeypatch.setattr(roofline, "read_test_bytes", lambda: 1 << 20)


def run(capfd: pytest.CaptureFixture[str], model: TinyModel, *more: str) -> tuple[int, str, str]:
    code = cli.main(["bench", "--roofline", "-m", str(model.path), "-n", "2", "-r", "2", "-t", "2", *more])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture
def results(capfd: pytest.CaptureFixture[str], tiny_llama: TinyModel) -> dict[str, Any]:
    code, out, err = run(capfd, tiny_llama, "-p", str(PROMPT), "--depth", str(DEPTH), "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def test_the_parts_add_up(results: dict[str, Any]) -> None:
    """Operations and what lies outside them are the step; shares of limits follow from the figures beside them."""
    limits = results["limits"]
    assert set(limits) == {"read_gb_per_s", *(f"{kind}_gmac_per_s" for kind in KINDS)}
    assert min(limits.values()) > 0
    steps = results["steps"]
    assert [(step["kind"], step["num_seqs"], step["num_tokens"], step["context"]) for step in steps] == [
        ("decode", 1, 1, PROMPT + 1),
        ("decode", 8, 1, PROMPT + 1),
        ("decode", 1, 1, DEPTH),
        ("prefill", 1, PROMPT, PROMPT),
        ("prefill", 1, PROMPT, DEPTH),
    ]
    for step in steps:
        operations = step["operations"]
        assert step["ms"] == pytest.approx(sum(row["ms"] for row in operations) + step["outside_ms"])
        assert 0 < step["outside_ms"] < step["ms"] and step["plain_ms"] <= step["plain_median_ms"]
        assert 0 < step["busy_percent"] <= 100
        for total in ("bytes", *(f"{kind}_macs" for kind in KINDS)):
            assert step[total] == sum(row[total] for row in operations)
        for row in operations:
            times = {kind: row[f"{kind}_macs"] / limits[f"{kind}_gmac_per_s"] / 1e6 for kind in KINDS}
            arithmetic, times["memory"] = sum(times.values()), row["bytes"] / limits["read_gb_per_s"] / 1e6
            expected = max(times["memory"], arithmetic)
            assert row["limit_ms"] == pytest.approx(expected)
            if row["bound"] is None:
                assert expected == 0 and row["limit_percent"] is row["gb_per_s"] is row["gmac_per_s"] is None
            else:
                assert times[row["bound"]] == max(times.values())
                assert row["limit_percent"] == pytest.approx(100 * expected / row["ms"])


def test_work_is_that_of_the_files_matrices(results: dict[str, Any], tiny_llama: TinyModel) -> None:
    """Every weight is read once a step and multiplied with every token; with each sequence's last token alone the
    vocabulary and all of the last layer but its keys and values."""
    layers_bytes = layers_macs = last_macs = head_bytes = head_macs = 0
    last_layer = f"blk.{TINY_LLAMA.num_hidden_layers - 1}."
    table_row_bytes = 4 * TINY_LLAMA.hidden_size  # F32
    with GGUFFile.open(tiny_llama.path) as gguf:
        tensors = gguf.tensors
        head_name = "output.weight" if "output.weight" in tensors else "token_embd.weight"
        for name, info in tensors.items():
            if len(info.shape) != 2 or (name != head_name and not name.startswith("blk.")):
                continue
            rows, cols = info.shape
            elements, block_bytes = BLOCK[info.type]
            packed_bytes = -(-rows // 32) * 32 * (cols // elements) * block_bytes  # panels of 32 rows
            if name == head_name:
                head_bytes, head_macs = packed_bytes, rows * cols
                continue
            layers_bytes += packed_bytes
            if name.startswith(last_layer) and not name.startswith(tuple(f"{last_layer}attn_{x}." for x in "kv")):
                last_macs += rows * cols
            else:
                layers_macs += rows * cols
    shape, num_layers = TINY_LLAMA, TINY_LLAMA.num_hidden_layers
    per_key = 2 * shape.num_attention_heads * shape.head_dim
    for step in results["steps"]:
        num_tokens, context, num_seqs = step["num_tokens"], step["context"], step["num_seqs"]
        keys_seen = (num_layers - 1) * sum(context - i for i in range(num_tokens)) + context
        # Keys and values of a token and head: 2 bytes a number and a scale.
        head_bytes_of_token = 2 * (2 * shape.head_dim + 4)
        blocks_bytes = -(-context // 16) * 16 * head_bytes_of_token * shape.num_key_value_heads * num_layers
        macs, num_bytes = Counter[str](), Counter[str]()
        for row in step["operations"]:
            kind = "layers" if row["operation"] in ("qkv", "kv", "q", "o_proj", "gate_up", "down") else row["operation"]
            macs[kind] += sum(row[f"{kind}_macs"] for kind in KINDS)
            num_bytes[kind] += row["bytes"]
        assert +macs == {
            "layers": (layers_macs * num_tokens + last_macs) * num_seqs,
            "attention": per_key * keys_seen * num_seqs,
            "lm_head": head_macs * num_seqs,
        }
        assert +num_bytes == {
            "embed": table_row_bytes * num_tokens * num_seqs,
            "layers": layers_bytes,
            "attention": blocks_bytes * num_seqs,
            "lm_head": head_bytes,
        }
        assert {row["calls"] for row in step["operations"] if row["operation"] == "o_proj"} == {num_layers}


def test_equal_operations_of_all_layers_are_one_row() -> None:
    """Times, calls and work are summed; another type or shape of the same name is a row of its own, beside it."""

    def operation(name: str, types: list[int], seconds: float, num_bytes: float) -> SimpleNamespace:
        work = {"bytes": num_bytes, "int8_macs": 0.0, "int16_macs": 0.0, "float_macs": 0.0}
        return SimpleNamespace(
            name=name, rows=64, cols=32, types=types, calls=1, seconds=seconds, busy_s=seconds, **work
        )

    operations = [operation(*values) for values in [
        ("down", [12], 1.0, 4e9), ("norm", [], 0.5, 0.0), ("down", [14], 0.25, 1e9), ("down", [12], 2.0, 8e9)
    ]]  # fmt: skip
    measured = roofline._MeasuredStep(roofline._Step("decode", 1, 1, 9), 4.0, 3.9, 3.95, operations)  # type: ignore[arg-type]
    step = roofline._described(measured, roofline._Limits(8e9, 1.0, 1.0, 1.0), 2)
    shown = [(row["operation"], row["weights"], row["calls"], row["ms"]) for row in step["operations"]]
    assert shown == [
        ("down", "64 x 32 Q4_K", 2, 3000.0),
        ("down", "64 x 32 Q6_K", 1, 250.0),
        ("norm", "64 x 32 ", 1, 500.0),
    ]
    first = step["operations"][0]
    assert (first["gb_per_s"], first["limit_percent"], first["busy_percent"]) == (4.0, 50.0, 50.0)
    assert (step["outside_ms"], step["gb_per_s"]) == (250.0, 13 / 4)
    assert step["limit_percent"] == pytest.approx(100 * (13 / 8) / 4)


def test_the_engines_loop_adds_up(results: dict[str, Any]) -> None:
    assert {(cost["num_seqs"], cost["sampling"]) for cost in results["engine"]} == {
        (n, sampling) for n in (1, 16) for sampling in ("greedy", "top_p")
    }
    for cost in results["engine"]:
        parts = [cost[name] for name in ("model_us", "sampling_us", "python_us")]
        assert min(parts) > 0 and sum(parts) == pytest.approx(cost["step_us"])
        assert cost["beside_percent"] == pytest.approx(100 * (parts[1] + parts[2]) / cost["step_us"])


def test_the_table_names_operations_and_limits(capfd: pytest.CaptureFixture[str], tiny_llama: TinyModel) -> None:
    code, out, _ = run(capfd, tiny_llama, "-p", str(PROMPT), "--depth", str(DEPTH))
    assert code == 0
    for shown in ("Limits measured in this run", "decode of 1, context 100", "gate_up", "memory", "a decode step of"):
        assert shown in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "4096"], "a prefill step takes 512 tokens at most, not 4096; lower -p"),
        (["-p", "64", "--depth", "64"], "lower -p or raise --depth"),
        (["-p", "64", "--depth", "1000000"], "--depth is 1000000, and there is room for a context of"),
    ],
)
def test_refusals_are_one_line(
    capfd: pytest.CaptureFixture[str], tiny_llama: TinyModel, arguments: list[str], message: str
) -> None:
    code, out, err = run(capfd, tiny_llama, *arguments)
    assert code == 2 and out == ""
    assert message in err and err.count("ERROR") == 1 and err.count("\n") == 1
