"""AutoGLM-Phone-9B's image encoder in autoglm beside llama.cpp: seconds a screenshot and memory at the peak.

    python benchmarks/encode_tower.py [--quick] [--layers N] [--threads N] [--repeats N]

Both load one mmproj (tower_file.py: full width, random weights, Q8_0), each engine in its own process
(tower_worker.py), and take turns within one run. llama.cpp runs through its mtmd API, once with flash attention and
once without; the faster stands for it.

Check    a 532x1204 screenshot, which neither engine resizes, must give the same features, or nothing is timed. It is
         also the warm-up: the timed pictures have as many patches.
Speed    a 540x1200 screenshot. Both resize it to 532x1204, 817 tokens; autoglm stretches it as the model's own
         processor does, llama.cpp keeps its proportions and adds bars, so features differ and work does not. Timed:
         normalized pixels to decoder tokens (patch embedding, positions, layers, merger). Resizing and normalizing are
         listed apart; decoding a PNG is in neither.
Memory   a 1080x2400 screenshot (3354 tokens) in fresh processes: the largest resident size while it is preprocessed
         and encoded, less the resident size after loading. llama.cpp runs with flash attention, its leaner way.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from compare_llamacpp import (
    ENGINES,
    HERE,
    Worker,
    cache_folder,
    draw_pair,
    install_missing,
    machine,
    run_options,
    save_figure,
)

FULL_LAYERS = 24
UNRESIZED, SCREEN, LARGE_SCREEN = (532, 1204), (540, 1200), (1080, 2400)
TARGET_RATIO = 3.0
TARGET_PEAK_BYTES = 1_500_000_000
LEAST_COSINE = 0.99  # a rotary embedding left out gives 0.95 with one layer; two right engines 0.999 with all
SAMPLE_S = 0.02


def files(num_layers: int) -> tuple[Path, Path]:
    """The mmproj and the vocabulary llama.cpp wants beside it, written where they are not there yet."""
    from tower_file import write_tower_file, write_vocabulary_file

    mmproj = cache_folder() / f"mmproj-glm4v-random-{num_layers}-layers-Q8_0.gguf"
    vocabulary = cache_folder() / "glm4-vocabulary.gguf"
    if not mmproj.exists():
        print(f"writing {mmproj} (once)", file=sys.stderr)
        write_tower_file(mmproj, num_layers)
    if not vocabulary.exists():
        write_vocabulary_file(vocabulary)
    return mmproj, vocabulary


def start(engine: str, mmproj: Path, vocabulary: Path, threads: int) -> Worker:
    kind, *flash = ENGINES[engine]
    return Worker("tower_worker.py", kind, mmproj, vocabulary, threads, *flash)


def likeness(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Cosines of two f32 [tokens, width]: all in one, the worst token's, and all less what their tokens share."""

    def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    return {
        "cosine": float(cosine(a.ravel(), b.ravel())),
        "lowest_token": float(cosine(a, b).min()),
        "without_mean_token": float(cosine((a - a.mean(0)).ravel(), (b - b.mean(0)).ravel())),
    }


def encode(workers: dict[str, Worker], size: tuple[int, int], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """One picture through every engine in turn: their replies, and how alike our features are to each."""
    width, height = size
    replies, features = {}, {}
    for engine, worker in workers.items():
        path = folder / f"{engine}.npy"
        replies[engine] = worker.ask(width=width, height=height, features=str(path))
        features[engine] = np.load(path)
    tokens = {engine: reply["num_tokens"] for engine, reply in replies.items()}
    if len(set(tokens.values())) != 1:
        raise SystemExit(f"the engines made a {width}x{height} picture into different numbers of tokens: {tokens}")
    return replies, {e: likeness(features["autoglm"], f) for e, f in features.items() if e != "autoglm"}


def measure_speed(mmproj: Path, vocabulary: Path, threads: int, repeats: int) -> dict[str, Any]:
    """The check, then all repeats, the engines in turn, and the medians."""
    workers = {engine: start(engine, mmproj, vocabulary, threads) for engine in ENGINES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, check = encode(workers, UNRESIZED, folder)
        print(f"cosines of autoglm's features with: {json.dumps(check)}", file=sys.stderr)
        # Written so that a NaN fails too.
        if not all(alike["without_mean_token"] > LEAST_COSINE for alike in check.values()):
            raise SystemExit("the engines disagree, nothing was timed; their cosines are above")
        samples: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
        resized: dict[str, Any] = {}
        for _ in range(repeats):
            replies, resized = encode(workers, SCREEN, folder)
            for engine, reply in replies.items():
                samples[engine].append(reply)
    for worker in workers.values():
        worker.close()

    def median(what: str) -> dict[str, float]:
        return {engine: statistics.median(reply[what] for reply in replies) for engine, replies in samples.items()}

    seconds = median("encode_s")
    peer = min((engine for engine in ENGINES if engine != "autoglm"), key=seconds.__getitem__)
    return {
        "picture": SCREEN,
        "num_tokens": samples["autoglm"][0]["num_tokens"],
        "engines": {engine: worker.description for engine, worker in workers.items()},
        "likeness_unresized": check,
        "likeness_resized": resized,
        "samples_encode_s": {engine: [reply["encode_s"] for reply in replies] for engine, replies in samples.items()},
        "median_encode_s": seconds,
        "median_preprocess_s": median("preprocess_s"),
        "best_llama_cpp": peer,
        "ratio": seconds[peer] / seconds["autoglm"],
        "target_ratio": TARGET_RATIO,
    }


def measure_peak(worker: Worker, limit_s: float) -> dict[str, Any]:
    """Memory above the loaded weights while the large screenshot is encoded; ends an engine that takes over limit_s."""
    import psutil

    process = psutil.Process(worker.process.pid)
    loaded = peak = process.memory_info().rss
    width, height = LARGE_SCREEN
    begin, stopped = time.perf_counter(), False
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reply = pool.submit(worker.ask, width=width, height=height)
        while not (stopped or concurrent.futures.wait([reply], SAMPLE_S).done):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just died; ask() says so
                peak = max(peak, process.memory_info().rss)
            if time.perf_counter() - begin > limit_s:
                worker.process.kill()
                stopped = True
    result = {"loaded_bytes": loaded, "peak_bytes_above": peak - loaded, "finished": not stopped}
    return result if stopped else {**result, **reply.result()}


def table(results: dict[str, Any]) -> str:
    speed, memory = results["speed"], results["memory"]
    width, height = speed["picture"]
    rows = [
        f"glm4v tower, {results['layers']} layers, Q8_0, {results['threads']} threads",
        f"{'':<18}{f'{width}x{height}':>16}{'preprocess':>12}{'peak above weights, {}x{}'.format(*LARGE_SCREEN):>36}",
    ]
    for engine, samples in speed["samples_encode_s"].items():
        spread = (max(samples) - min(samples)) / 2
        seconds = f"{speed['median_encode_s'][engine]:.2f} ± {spread:.2f} s"
        preprocess = f"{speed['median_preprocess_s'][engine] * 1e3:.0f} ms"
        peak = ""
        if engine in memory:
            peak = f"{memory[engine]['peak_bytes_above'] / 1e9:.2f} GB"
            peak += "" if memory[engine]["finished"] else " (stopped at the time limit)"
        rows.append(f"{engine:<18}{seconds:>16}{preprocess:>12}{peak:>36}")
    alike = speed["likeness_unresized"][speed["best_llama_cpp"]]
    return "\n".join(
        [
            *rows,
            f"autoglm takes 1 / {speed['ratio']:.2f} of {speed['best_llama_cpp']}'s time (target {TARGET_RATIO:.1f}); "
            f"its peak target is {TARGET_PEAK_BYTES / 1e9:.1f} GB",
            f"same features on {'{}x{}'.format(*UNRESIZED)}: cosine {alike['cosine']:.5f}, worst token "
            f"{alike['lowest_token']:.5f}, without the mean token {alike['without_mean_token']:.5f}",
            "(median ± half the range)",
        ]
    )


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    speed, memory = results["speed"], results["memory"]
    figure, axes = pyplot.subplots(1, 2, figsize=(5.6, 3.6))
    seconds = [speed["median_encode_s"][engine] for engine in (speed["best_llama_cpp"], "autoglm")]
    draw_pair(axes[0], seconds, f"encoding {'{}x{}'.format(*SCREEN)}\n{speed['ratio']:.2f} times as fast")
    axes[0].set_ylabel("seconds")
    peaks = [memory[engine]["peak_bytes_above"] / 1e9 for engine in ("llama.cpp flash", "autoglm")]
    finished = all(memory[engine]["finished"] for engine in ("llama.cpp flash", "autoglm"))
    title = f"encoding {'{}x{}'.format(*LARGE_SCREEN)}\nmemory above the weights"
    draw_pair(axes[1], peaks, title if finished else title + ", unfinished")
    axes[1].set_ylabel("GB")
    save_figure(figure, results, path)


def main() -> None:
    parser = run_options(__doc__)
    parser.add_argument("--layers", type=int, default=FULL_LAYERS, help=f"fewer than {FULL_LAYERS}: a quick try")
    parser.add_argument("--limit-s", type=float, default=1800, help="how long an engine may take over its large screen")
    arguments = parser.parse_args()
    if min(arguments.layers, arguments.repeats, arguments.threads) < 1:
        parser.error("--layers, --repeats and --threads must be 1 or more")
    sys.path[:0] = [str(HERE.parent)]
    install_missing(not arguments.no_install)
    results: dict[str, Any] = {"machine": machine(), "threads": arguments.threads, "layers": arguments.layers}
    mmproj, vocabulary = files(arguments.layers)
    repeats = 1 if arguments.quick else arguments.repeats
    results["speed"] = measure_speed(mmproj, vocabulary, arguments.threads, repeats)
    results["memory"] = {"picture": LARGE_SCREEN, "target_bytes_above": TARGET_PEAK_BYTES}
    for engine in ("autoglm", "llama.cpp flash"):
        worker = start(engine, mmproj, vocabulary, arguments.threads)
        results["memory"][engine] = measure_peak(worker, arguments.limit_s)
        worker.close()
    print(table(results))
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = "encode_tower" if arguments.layers == FULL_LAYERS else f"encode_tower_{arguments.layers}_layers"
    (arguments.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, arguments.output / f"{name}.png")
    print(f"written: {arguments.output}/{name}.json and .png")


if __name__ == "__main__":
    main()
