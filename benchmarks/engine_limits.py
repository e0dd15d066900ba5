"""What the machine gives in the minute of a comparison: memory read, and int8 products by oneDNN and by ours.

Decode reads every matrix but the token table once a token, so its speed has the memory's read bandwidth for a limit;
prefill multiplies, and oneDNN's int8 product is the fastest there is for that (product_worker.py).
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoglm.deploy.machine import read_test_bytes
from autoglm.formats.gguf import GGUFFile
from autoglm.kernels import MemoryReader, Runtime

READ_SECONDS = 0.06


class Memory:
    """Memory that is read by all threads now and then. It is held all the time: a virtual machine gives what was freed
    back to its host two seconds later, which holds up what runs then."""

    def __init__(self, threads: int) -> None:
        self._reader = MemoryReader(Runtime(threads), read_test_bytes())

    def gb_per_s(self) -> float:
        return self._reader.bytes_per_s(READ_SECONDS) / 1e9


def measure_products(workers: dict[str, Any]) -> dict[str, float]:
    """Multiply-adds a second of either engine's products, now."""
    found = {}
    for engine, worker in workers.items():
        seconds = min(worker.ask()["seconds"] for _ in range(2))
        found[f"products_{engine}_gmac_s"] = worker.description["num_macs"] / seconds / 1e9
    return found


def start_products(model: Path, threads: int, start: Callable[..., Any]) -> dict[str, Any]:
    """A worker each for oneDNN's products and ours; none where torch is not there."""
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: no comparison with oneDNN (pip install torch, or --no-onednn)", file=sys.stderr)
        return {}
    return {kind: start("product_worker.py", kind, model, threads) for kind in ("autoglm", "onednn")}


def streamed_bytes(path: Path) -> int:
    """What a decode step reads of the file at least: every tensor, the token table only where it is the head too."""
    with GGUFFile.open(path) as file:
        is_tied = "output.weight" not in file.tensors
        return sum(t.nbytes for t in file.tensors.values() if is_tied or t.name != "token_embd.weight")


def product_macs(path: Path) -> int:
    """Multiply-adds a prefilled token takes in the layers' matrices; few are computed past the last attention."""
    with GGUFFile.open(path) as file:
        layers = [t for t in file.tensors.values() if t.name.startswith("blk.") and len(t.shape) == 2]
    last = max(int(t.name.split(".")[1]) for t in layers)
    ends = tuple(f"blk.{last}.{part}" for part in ("attn_output", "ffn"))
    return sum(t.shape[0] * t.shape[1] for t in layers if not t.name.startswith(ends))


def shares(
    model: Path,
    prefill: float,
    decode: dict[str, list[float]],
    memory: dict[str, list[float]],
    products: dict[str, list[float]],
) -> dict[str, Any]:
    """How near decode comes to the memory's read bandwidth, and products and whole prefill to oneDNN's products.

    A shared machine's memory may change its speed from second to second, so every decode is held against what was read
    right before and after it.

    prefill  our median in tokens a second; decode, memory  samples of each engine in tokens a second, and GB a second
    read beside each; products  samples of measure_products
    """
    limit = {name: statistics.median(values) for name, values in products.items()}
    limit["memory_gb_s"] = statistics.median(value for values in memory.values() for value in values)
    weights = streamed_bytes(model) / 1e9
    found: dict[str, Any] = {
        "limit": limit,
        "decode_weight_bytes": round(weights * 1e9),
        "decode_gb_s": {engine: statistics.median(rates) * weights for engine, rates in decode.items()},
        "decode_share_of_bandwidth": {
            engine: statistics.median(r * weights / m for r, m in zip(rates, memory[engine], strict=True))
            for engine, rates in decode.items()
        },
    }
    if "products_onednn_gmac_s" in limit:
        onednn = limit["products_onednn_gmac_s"]
        found["products_share_of_onednn"] = limit["products_autoglm_gmac_s"] / onednn
        found["prefill_share_of_onednn"] = prefill * product_macs(model) / 1e9 / onednn
    return found
