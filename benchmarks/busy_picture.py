"""How long other people's streams stand still while a full-size 1080x2400 screenshot is encoded and read.

    python benchmarks/busy_picture.py [--models nano,glm4v] [--threads N]

Two streams decode over HTTP; after some quiet seconds somebody sends a screenshot, and the gaps between two tokens of
one stream are taken until its answer is there. A round does so twice, once as the engine is and once with slicing
switched off: encoding in one piece, prompts in steps of 512 tokens. The streams' tokens are forced to one letter
(logit_bias), so that each shows as a chunk. What is reported beside the gaps is what the picture's sender waits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from served import about_the_run, load, screen, served, write_results
from stream_client import stream

from autoglm.engine import engine as engine_module
from autoglm.engine import step_speed
from autoglm.server.driver import EngineDriver

# Encoding of one medium at a time, seconds for prompts in a step beside decoding sequences.
SLICED = (engine_module.ENCODE_SLICE_S, step_speed.PREFILL_BESIDE_S)
WHOLE = (float("inf"), 1e6)
NUM_STREAMS = 2
# Before the picture comes; nano writes a thousand tokens a second, and its context ends at 4096.
QUIET_S = {"nano": 1.0, "glm4v": 4.0}
ROUNDS = {"nano": 5, "glm4v": 1}


class Listener:
    """One stream of tokens, read by a process of its own."""

    def __init__(self, port: int, letter: int) -> None:
        body = {
            "messages": [{"role": "user", "content": "go on"}],
            "temperature": 0,
            "max_tokens": 3000,
            "ignore_eos": True,
            "logit_bias": {str(letter): 100},
        }
        reader = [sys.executable, str(Path(__file__).parent / "stream_client.py"), str(port)]
        self.times_s: list[float] = []
        self._process = subprocess.Popen(reader, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(body))
        self._process.stdin.close()
        for _ in range(5):
            self._read()

    def _read(self) -> bool:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            self.times_s.append(float(line))
        return bool(line)

    def stop(self) -> None:
        """Leave, and take in what was read."""
        self._process.terminate()
        while self._read():
            pass
        self._process.wait()

    def gaps_ms(self, start_s: float, end_s: float) -> list[float]:
        """Between neighbours of which the later came within the time."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return [(b - a) * 1e3 for a, b in pairs if start_s <= b <= end_s]


def play(port: int, letter: int, number: int, quiet_s: float) -> dict[str, Any]:
    """One picture among streams: gaps before it and while it is made, and its time to first token."""
    listeners = [Listener(port, letter) for _ in range(NUM_STREAMS)]
    message = {"role": "user", "content": [screen(number), {"type": "text", "text": "what is this?"}]}
    quiet_from_s = time.perf_counter()
    time.sleep(quiet_s)
    picture_s = time.perf_counter()
    body = {"messages": [message], "temperature": 0, "max_tokens": 1}
    timings = next(chunk["timings"] for _, chunk in stream(port, body) if "timings" in chunk)
    answered_s = time.perf_counter()
    time.sleep(0.3)  # so that a gap which the picture's end closes is in
    end_s = time.perf_counter()
    for listener in listeners:
        listener.stop()
    return {
        "quiet_ms": [gap for listener in listeners for gap in listener.gaps_ms(quiet_from_s, picture_s)],
        "busy_ms": [gap for listener in listeners for gap in listener.gaps_ms(picture_s, end_s)],
        "picture_s": answered_s - picture_s,
        "image_tokens": timings["images"][0]["tokens"],
        "encode_ms": timings["encode_ms"],
        "prefill_ms": timings["prefill_ms"],
    }


def gap_figures(gaps_ms: list[float]) -> dict[str, float]:
    ordered = sorted(gaps_ms)
    return {
        "median_ms": round(statistics.median(ordered), 1),
        "p99_ms": round(ordered[round(0.99 * (len(ordered) - 1))], 1),
        "worst_ms": round(ordered[-1], 1),
        "num_gaps": len(ordered),
    }


def measure(name: str, threads: int) -> dict[str, Any]:
    loaded = load(name, threads)
    letter = loaded.tokenizer.encode("a")[0]
    driver = EngineDriver(loaded.engine)
    found: dict[str, list[dict[str, Any]]] = {"sliced": [], "whole": []}
    with served(loaded, driver) as port:
        for number in range(ROUNDS[name]):
            for mode, (slice_s, beside_s) in (("sliced", SLICED), ("whole", WHOLE)):
                engine_module.ENCODE_SLICE_S, step_speed.PREFILL_BESIDE_S = slice_s, beside_s
                found[mode].append(play(port, letter, 2 * number + (mode == "whole"), QUIET_S[name]))
                last = found[mode][-1]
                print(name, mode, gap_figures(last["quiet_ms"]), gap_figures(last["busy_ms"]), flush=True)
    result: dict[str, Any] = {"image_tokens": found["sliced"][0]["image_tokens"]}
    every = [play for plays in found.values() for play in plays]
    result["without_picture"] = gap_figures([gap for play in every for gap in play["quiet_ms"]])
    for mode, plays in found.items():
        result[mode] = gap_figures([gap for play in plays for gap in play["busy_ms"]])
        for field in ("picture_s", "encode_ms", "prefill_ms"):
            result[mode][field] = round(statistics.median(play[field] for play in plays), 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="nano,glm4v")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    about = about_the_run(options.threads)
    models = {name: measure(name, options.threads) for name in options.models.split(",")}
    write_results("busy_picture", {**about, "streams": NUM_STREAMS, "rounds": ROUNDS, "models": models})


if __name__ == "__main__":
    main()
