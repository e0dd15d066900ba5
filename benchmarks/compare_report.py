"""The comparison with llama.cpp as a table, as a plot, and as the READMEs' tables.

Everything is read from the results that compare_llamacpp.py writes, so `python benchmarks/compare_report.py` makes
the plot and the READMEs' tables again from the JSON file without measuring.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COLUMNS = 4
MODELS = {
    "smollm2": ("SmolLM2-135M Q4_1", "SmolLM2-135M Q4_1"),
    "glm4": (
        "9B layer shapes (8 of its 40 layers, Q4_K_M types, random weights)",
        "9B 的层形状(40 层中的 8 层,Q4_K_M 类型,随机权重)",
    ),
}
PHASES = {
    "prefill": ("prefill of {prefill_tokens} tokens", "预填 {prefill_tokens} 个 token"),
    "prefill_long": ("prefill of {prefill_long_tokens:,} tokens", "预填 {prefill_long_tokens:,} 个 token"),
    "decode": ("decode", "解码"),
    "decode_deep": (
        "decode after {prefill_tokens} tokens",
        "在 {prefill_tokens} 个 token 之后解码",
    ),
    "decode_streams": (
        "decode of {streams} streams at once, tokens in all",
        "同时解码 {streams} 路,合计",
    ),
}


def phases(result: dict[str, Any]) -> list[str]:
    """Those this model was measured in."""
    return [phase for phase in PHASES if phase in result["ratio"]]


def gigabytes(num_bytes: float | None) -> str:
    return "not measured" if num_bytes is None else f"{num_bytes / 1e9:.2f} GB"


def table(results: dict[str, Any]) -> str:
    """What the run prints."""
    rows = [f"{'model':<10}{'phase':<16}{'autoglm':>18}{'llama.cpp':>18}{'ratio':>8}{'target':>8}"]
    notes = []
    for name, result in results["workloads"].items():
        for phase in phases(result):
            cells = []
            for engine in ("autoglm", result["best_llama_cpp"][phase]):
                values = result["samples_tokens_per_s"][engine][phase]
                spread = (max(values) - min(values)) / 2
                cells.append(f"{result['median_tokens_per_s'][engine][phase]:.1f} ± {spread:.1f}")
            target = result["target_ratio"].get(phase)
            way = result["best_llama_cpp"][phase].removeprefix("llama.cpp")
            rows.append(
                f"{name:<10}{phase:<16}{cells[0]:>18}{cells[1]:>18}{result['ratio'][phase]:>8.2f}"
                f"{'' if target is None else f'{target:.2f}':>8} {way}"
            )
        notes += limit_lines(name, result)
    legend = "(tokens per second, median ± half the range; flash, unified: where that was llama.cpp's better way)"
    return "\n".join([*rows, legend, *notes])


def limit_lines(name: str, result: dict[str, Any]) -> list[str]:
    """Decode beside the memory's bandwidth, products beside oneDNN's, memory beside file + KV; with the targets."""
    limits, memory, targets = result["limits"], result["memory"], result["target_limits"]
    limit, share = limits["limit"], limits["decode_share_of_bandwidth"]
    lines = [
        f"{name}: decode reads {limits['decode_gb_s']['autoglm']:.1f} GB/s of weights, {share['autoglm']:.0%} of what "
        f"the memory gives beside it ({limit['memory_gb_s']:.1f}); llama.cpp {share['llama.cpp']:.0%}"
        f"{wanted(targets, 'bandwidth')}"
    ]
    if "products_share_of_onednn" in limits:
        lines.append(
            f"{name}: a layer's products at {result['prefill_tokens']} rows {limit['products_autoglm_gmac_s']:.0f} "
            f"GMAC/s, {limits['products_share_of_onednn']:.0%} of oneDNN's {limit['products_onednn_gmac_s']:.0f}"
            f"{wanted(targets, 'onednn')}; prefill as a whole {limits['prefill_share_of_onednn']:.0%}"
        )
    peaks = ", ".join(f"{e} {gigabytes(memory[e]['peak_bytes'])}" for e in ("autoglm", "llama.cpp", "llama.cpp flash"))
    lines.append(
        f"{name}: peak memory with {memory['context_tokens']:,} tokens {peaks}; file + KV is "
        f"{gigabytes(memory['file_bytes'] + memory['kv_bytes'])}, target at most {gigabytes(memory['target_bytes'])}"
    )
    return lines


def wanted(targets: dict[str, float], limit: str) -> str:
    return f" (target {targets[limit]:.0%})" if limit in targets else ""


def plot(results: dict[str, Any], path: Path) -> None:
    """A grid of pairs of bars: every phase of every model, then limits and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = []
    for name, result in results["workloads"].items():
        medians, limits = result["median_tokens_per_s"], result["limits"]
        for phase in phases(result):
            pair = [medians[result["best_llama_cpp"][phase]][phase], medians["autoglm"][phase]]
            panels.append((pair, f"{name} {phase.replace('_', ' ')}\n{result['ratio'][phase]:.2f} times", "tokens/s"))
        if name == "glm4":
            rates = limits["decode_gb_s"]
            title = f"{name} decode, read of the\nmemory's {limits['limit']['memory_gb_s']:.0f} GB/s"
            panels.append(([rates["llama.cpp"], rates["autoglm"]], title, "GB/s"))
        memory = result["memory"]
        peaks = [memory[engine]["peak_bytes"] for engine in ("llama.cpp flash", "autoglm")]
        if None not in peaks:
            whole = (memory["file_bytes"] + memory["kv_bytes"]) / 1e9
            panels.append(([p / 1e9 for p in peaks], f"{name} peak memory\nfile + KV {whole:.2f} GB", "GB"))
    rows = -(-len(panels) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(2.6 * COLUMNS, 2.9 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (values, title, unit) in zip(axes.flat, panels, strict=False):
        draw_pair(axis, values, title)
        axis.set_ylabel(unit)
    save_figure(figure, results, path)


COLORS = {"llama.cpp": "#9aa5b1", "autoglm": "#1f7a8c"}


def draw_pair(axis: Any, values: list[float], title: str) -> None:
    """Two bars with their values: llama.cpp's and ours."""
    drawn = axis.bar(["llama.cpp", "autoglm"], values, color=list(COLORS.values()), width=0.65)
    axis.bar_label(drawn, fmt="%.0f" if min(values) >= 20 else "%.1f" if max(values) >= 5 else "%.2f", padding=2)
    axis.set_title(title, fontsize=10)
    axis.set_ylim(0, max(values) * 1.18)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, results: dict[str, Any], path: Path) -> None:
    """Write the plot with the machine, threads and day under it."""
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.text(0.5, 0.02, conditions(results), ha="center", fontsize=9)
    figure.savefig(path, dpi=150)


def conditions(results: dict[str, Any]) -> str:
    """What the numbers were measured on, and when."""
    about = results["machine"]
    threads = "1 thread" if results["threads"] == 1 else f"{results['threads']} threads"
    return f"{about['cpu']}, {threads}, {about['date'][:10]}"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def markdown(results: dict[str, Any], language: int) -> str:
    """The README's paragraph and table; language 0 English, 1 Chinese."""
    about = results["machine"]
    facts = {
        "cores": about["cores"],
        "cpu": about["cpu"],
        "day": about["date"][:10],
        "version": about["llama_cpp_python"],
        "repeats": max(len(r["samples_tokens_per_s"]["autoglm"]["prefill"]) for r in results["workloads"].values()),
        "rounds": max(len(r["samples_tokens_per_s"]["autoglm"]["decode"]) for r in results["workloads"].values()),
    }
    heads = (
        "The same files, threads and tokens on both engines, in turn in one run of `benchmarks/compare_llamacpp.py`, "
        "medians of\n{repeats}, decode's of {rounds}, tokens per second ({cores} cores of {cpu}, {day}; llama.cpp as "
        "`llama-cpp-python` {version} built natively\nfrom PyPI, with or without flash attention, streams in one cache "
        "or one each, whichever is fastest for it):\n\n| work | llama.cpp | autoglm | ratio |",
        "同一文件、同样的线程数和 token 数,由 `benchmarks/compare_llamacpp.py` 在一次运行中交替测量两个引擎,"
        "取 {repeats} 次(解码 {rounds} 次)的中位数,单位为\ntoken/秒({cores} 核 {cpu},{day};llama.cpp 为从 PyPI 本机编译"
        "的 `llama-cpp-python` {version},\nflash attention 开或关、多路共用一个缓存或各用一个,取其最快者):\n\n"
        "| 任务 | llama.cpp | autoglm | 倍数 |",
    )
    rows = [heads[language].format(**facts), "| --- | ---: | ---: | ---: |"]
    for name, result in results["workloads"].items():
        for i, phase in enumerate(phases(result)):
            medians, peer = result["median_tokens_per_s"], result["best_llama_cpp"][phase]
            work = PHASES[phase][language].format(**result)
            first = (MODELS[name][language], ("the same", "同上")[language])[i > 0]
            cells = f"{number(medians[peer][phase])} | {number(medians['autoglm'][phase])}"
            rows.append(f"| {first}{(', ', ',')[language]}{work} | {cells} | {result['ratio'][phase]:.2f} |")
        rows += limit_rows(result, language)
    return "\n".join(rows)


def limit_rows(result: dict[str, Any], language: int) -> list[str]:
    """Rows of the README's table that are not tokens a second."""
    limits, memory = result["limits"], result["memory"]
    limit, share, rows = limits["limit"], limits["decode_share_of_bandwidth"], []
    if "bandwidth" in result["target_limits"]:
        text = (
            "one stream's reading of weights, of what the memory gives right beside it (median {:.0f} GB/s)",
            "单路解码读取权重的速度,占其前后所测内存带宽(中位数 {:.0f} GB/秒)",
        )[language]
        rows.append(f"| {text.format(limit['memory_gb_s'])} | {share['llama.cpp']:.0%} | {share['autoglm']:.0%} | |")
    if "products_share_of_onednn" in limits:
        text = (
            "a layer's matrix products at 512 rows, of oneDNN's int8 ({:.0f} GMAC/s)",
            "512 行时一层的矩阵乘法,占 oneDNN int8({:.0f} GMAC/秒)",
        )[language]
        rows.append(
            f"| {text.format(limit['products_onednn_gmac_s'])} | | {limits['products_share_of_onednn']:.0%} | |"
        )
    text = ("peak memory with {:,} tokens; file + KV {}", "{:,} 个 token 时的内存峰值;文件加 KV 为 {}")[language]
    text = text.format(memory["context_tokens"], gigabytes(memory["file_bytes"] + memory["kv_bytes"]))
    peaks = " | ".join(gigabytes(memory[engine]["peak_bytes"]) for engine in ("llama.cpp flash", "autoglm"))
    return [*rows, f"| {text} | {peaks} | |"]


def write_readmes(results: dict[str, Any]) -> None:
    """Put the table between the READMEs' markers."""
    for language, name in enumerate(("README.md", "README.zh.md")):
        fill_between(HERE.parent / name, "compare_llamacpp", markdown(results, language))


def fill_between(path: Path, marker: str, text: str) -> None:
    """Replace what stands between <!-- marker --> and <!-- /marker --> in a file that has them once."""
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(\n<!-- /{marker} -->)", re.DOTALL)
    whole, count = pattern.subn(lambda match: match[1] + text + match[2], path.read_text("utf-8"))
    if count != 1:
        raise SystemExit(f"{path.name} needs the marker <!-- {marker} --> once, and its end; it was left alone")
    path.write_text(whole, "utf-8")


def main() -> None:
    source = HERE / "results" / "compare_llamacpp.json"
    results = json.loads(source.read_text())
    print(table(results))
    plot(results, source.with_suffix(".png"))
    write_readmes(results)


if __name__ == "__main__":
    main()
