"""Nano with a new screenshot and three seconds of speech in one message: seconds to the first content, and to the end.

    python benchmarks/spoken_tap.py [--repeats N] [--threads N]

Each request is streamed over HTTP and has a screenshot (1080x1920, drawn from docs/screen.png) and a sound
(docs/command.flac, drawn out to 3 s with silence) that nobody sent before, so nothing comes out of a cache. The clock
starts before the request is sent: sending, decoding and encoding both, prefill and answer are all in it.
"""

from __future__ import annotations

import argparse
import base64
import io
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from served import about_the_run, load, served, write_results
from stream_client import content_of, stream

from autoglm.server.driver import EngineDriver

DOCS = Path(__file__).resolve().parent.parent / "docs"
SCREEN, SPEECH_S, SAMPLE_RATE_HZ = (1080, 1920), 3, 16000


def data_uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def message(number: int) -> list[dict[str, Any]]:
    """Picture and sound with a little noise of their own, which changes their hashes and nothing else."""
    rng = np.random.default_rng(number)
    pixels = np.array(Image.open(DOCS / "screen.png").convert("RGB").resize(SCREEN))
    pixels[:2] = rng.integers(0, 255, pixels[:2].shape)
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "PNG")
    said, _ = soundfile.read(DOCS / "command.flac", dtype="float32")
    wave = rng.normal(0, 1e-4, SPEECH_S * SAMPLE_RATE_HZ).astype(np.float32)
    wave[: len(said)] += said
    sound = io.BytesIO()
    soundfile.write(sound, wave, SAMPLE_RATE_HZ, format="WAV")
    return [
        {"type": "image_url", "image_url": {"url": data_uri("image/png", picture.getvalue())}},
        {"type": "audio_url", "audio_url": {"url": data_uri("audio/wav", sound.getvalue())}},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    about, loaded = about_the_run(options.threads), load("nano", options.threads)
    first, whole, answers, timings = [], [], [], []
    driver = EngineDriver(loaded.engine)
    with served(loaded, driver) as port:
        for number in range(options.repeats + 1):
            body = {"messages": [{"role": "user", "content": message(number)}], "temperature": 0}
            begin = time.perf_counter()
            chunks = list(stream(port, body))
            if number:  # the first warms up
                first.append(next(at for at, chunk in chunks if content_of(chunk)) - begin)
                whole.append(chunks[-1][0] - begin)
                answers.append("".join(content_of(chunk) for _, chunk in chunks))
                timings.append(next(chunk["timings"] for _, chunk in reversed(chunks) if "timings" in chunk))
    steps = ("decode_media_ms", "encode_ms", "prefill_ms", "decode_ms")
    results = {
        **about,
        "first_content_s": {"median": statistics.median(first), "samples": first},
        "whole_answer_s": {"median": statistics.median(whole), "samples": whole},
        "median_ms": {step: statistics.median(timing[step] for timing in timings) for step in steps},
        "answers": sorted(set(answers)),
    }
    print(f"first content {statistics.median(first):.3f} s, whole answer {statistics.median(whole):.3f} s (medians)")
    write_results("spoken_tap", results)


if __name__ == "__main__":
    main()
