"""How cost grows: prefill and decode by length of context, tokens a second by number of streams, memory by both.

    python benchmarks/growth.py [--quick] [--threads N] [--model NAME ...] [--repeats N] [--no-llama] [--docs]

autoglm and llama.cpp (flash attention, its default) in processes of their own (growth_worker.py says how the context
gets there), in turn at every point:

Context   512 to 32,768 tokens (SmolLM2 to the 8,192 it knows): tokens a second of the 512 that end there, and
          milliseconds of a decode step behind them.
Streams   1 to 64, each with 240 tokens of context: milliseconds of a step that gives each a token, tokens a second in
          all.
Memory    bytes the KV cache takes for the tokens, and the resident size of autoglm's process with them in it: pages
          of the KV pool count from when they are written.

Medians; llama.cpp runs once at each point, autoglm --repeats times. A table (--docs writes it into
docs/performance.md), growth.json and growth.png.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from compare_llamacpp import (
    HERE,
    Worker,
    Workload,
    install_missing,
    machine,
    parse_run,
    run_options,
    save_figure,
    workloads,
)
from compare_report import COLORS, conditions, fill_between
from growth_worker import CHUNK, MAX_STREAMS, STEPS, STREAM_ROOM, STREAM_TOKENS

DEPTHS = {"glm4": (512, 1024, 2048, 4096, 8192, 16384, 32768), "smollm2": (512, 1024, 2048, 4096, 8192)}
STREAMS = (1, 2, 4, 8, 16, 32, 64)


def measure(
    load: Workload, threads: int, repeats: int, engines: list[str], depths: tuple[int, ...], streams: tuple[int, ...]
) -> dict[str, Any]:
    """Every point of one model, the engines in turn."""
    found: dict[str, Any] = {"model": load.path.name}
    # From few tokens to many: the resident size then tells what each point needs.
    requests = {
        "context": (max(depths) + 2 * CHUNK, [{"op": "depth", "context": depth} for depth in depths]),
        "streams": (MAX_STREAMS * STREAM_ROOM, [{"op": "streams", "streams": count} for count in streams]),
    }
    for kind, (pool, points) in requests.items():
        workers = {engine: Worker("growth_worker.py", engine, load.path, threads, pool) for engine in engines}
        found["engines"] = {engine: worker.description for engine, worker in workers.items()}
        found[kind] = {engine: [] for engine in engines}
        for worker in workers.values():
            worker.ask(**points[0], repeats=1)  # nobody counts this one
        for request in points:
            for engine, worker in workers.items():
                reply = worker.ask(**request, repeats=repeats if engine == "autoglm" else 1)
                found[kind][engine].append(point(request, reply))
            print(f"{load.name}: {request} done", file=sys.stderr)
        for worker in workers.values():
            worker.close()
    found["kv_token_bytes"] = reply["kv_token_bytes"]
    return found


def point(request: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
    """One point of a curve: medians, samples, the resident size."""
    step_s = statistics.median(reply["decode_s"])
    found = {
        "tokens": request.get("context", request.get("streams", 0) * STREAM_TOKENS),
        "decode_ms": 1000 * step_s,
        "samples_decode_s": reply["decode_s"],
        "resident_bytes": reply["resident_bytes"],
    }
    if request["op"] == "streams":
        return {**found, "streams": request["streams"], "tokens_per_s": request["streams"] / step_s}
    rate = CHUNK / statistics.median(reply["prefill_s"])
    return {**found, "prefill_tokens_per_s": rate, "samples_prefill_s": reply["prefill_s"]}


def table(results: dict[str, Any]) -> str:
    """Both tables of every model as Markdown, as docs/performance.md has them."""
    parts = []
    for name, model in results["models"].items():
        engines = list(model["context"])
        heads = [f"{what}, {engine}" for engine in engines for what in ("prefill, tokens/s", "decode step, ms")]
        rows = [row(f"{name}: context", *heads, "KV, MB", "resident, GB"), "| ---: " * (len(heads) + 3) + "|"]
        for points in zip(*model["context"].values(), strict=True):
            cells = [f"{p[key]:.1f}" for p in points for key in ("prefill_tokens_per_s", "decode_ms")]
            rows.append(row(f"{points[0]['tokens']:,}", *cells, *memory_cells(points[0], model["kv_token_bytes"])))
        heads = [f"{what}, {engine}" for engine in engines for what in ("step, ms", "tokens/s in all")]
        rows += ["", row(f"{name}: streams", *heads, "KV, MB", "resident, GB"), "| ---: " * (len(heads) + 3) + "|"]
        for points in zip(*model["streams"].values(), strict=True):
            cells = [f"{p[key]:.1f}" for p in points for key in ("decode_ms", "tokens_per_s")]
            rows.append(row(str(points[0]["streams"]), *cells, *memory_cells(points[0], model["kv_token_bytes"])))
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def memory_cells(point: dict[str, Any], kv_token_bytes: int) -> tuple[str, str]:
    resident = point["resident_bytes"]
    return f"{point['tokens'] * kv_token_bytes / 1e6:.1f}", "" if resident is None else f"{resident / 1e9:.2f}"


def plot(results: dict[str, Any], path: Path) -> None:
    """A row a model: prefill and decode by context, throughput by streams, memory by tokens held."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = results["models"]
    figure, axes = pyplot.subplots(len(models), 4, figsize=(14, 3.3 * len(models)), squeeze=False)
    for line, (name, model) in zip(axes, models.items(), strict=True):
        curves = (
            ("context", "tokens", "prefill_tokens_per_s", "prefill, tokens/s", "tokens of context"),
            ("context", "tokens", "decode_ms", "decode, ms a step", "tokens of context"),
            ("streams", "streams", "tokens_per_s", "decode, tokens/s in all", "streams"),
        )
        for axis, (kind, x, y, title, unit) in zip(line, curves, strict=False):
            for engine, points in model[kind].items():
                axis.plot(
                    [p[x] for p in points], [p[y] for p in points], "o-", ms=4, color=COLORS[engine], label=engine
                )
            axis.set_title(f"{name}: {title}", fontsize=10)
            axis.set_xlabel(unit)
        for kind, style in (("context", "o-"), ("streams", "s--")):
            points = [p for p in model[kind]["autoglm"] if p["resident_bytes"] is not None]
            sizes = [p["resident_bytes"] / 1e9 for p in points]
            label = "one stream" if kind == "context" else f"streams of {STREAM_TOKENS}"
            line[3].plot([p["tokens"] for p in points], sizes, style, ms=4, color=COLORS["autoglm"], label=label)
        line[3].set_title(f"{name}: autoglm's resident GB", fontsize=10)
        line[3].set_xlabel("tokens held")
        for axis in line:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1024 else f"{value / 1024:g}k")
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
            axis.legend(fontsize=8, frameon=False)
            axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, results, path)


def main() -> None:
    parser = run_options(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--model", nargs="+", choices=list(DEPTHS), default=list(DEPTHS))
    parser.add_argument("--no-llama", action="store_true", help="autoglm alone: a tenth of the time")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/performance.md")
    arguments = parse_run(parser)
    sys.path[:0] = [str(HERE.parent)]
    install_missing(not arguments.no_install, with_llama=not arguments.no_llama)
    results: dict[str, Any] = {
        "machine": machine(),
        "threads": arguments.threads,
        "chunk_tokens": CHUNK,
        "steps": STEPS - 1,
        "stream_tokens": STREAM_TOKENS,
        "models": {},
    }
    engines = ["autoglm"] if arguments.no_llama else ["autoglm", "llama.cpp"]
    for load in workloads(arguments.model):
        depths, streams = DEPTHS[load.name], STREAMS
        if arguments.quick:
            depths, streams = depths[::3], streams[::3]
        repeats = 1 if arguments.quick else arguments.repeats
        results["models"][load.name] = measure(load, arguments.threads, repeats, engines, depths, streams)
    print(table(results))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "growth.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, arguments.output / "growth.png")
    print(f"written: {arguments.output}/growth.json and .png")
    if arguments.docs:
        picture = "![Cost by context and by streams](../benchmarks/results/growth.png)"
        text = f"{conditions(results)}:\n\n{table(results)}\n\n{picture}"
        fill_between(HERE.parent / "docs" / "performance.md", "growth", text)


if __name__ == "__main__":
    main()
