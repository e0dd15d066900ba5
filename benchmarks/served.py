"""Models served on a loopback port inside the benchmark's own process, and screens to send.

    nano    the shipped pair
    glm4v   random weights in the 9B's layer shapes: 8 text layers (glm4_file.py), 2 tower layers (tower_file.py)

Random weights answer nonsense, so RecordedRunner lets the model compute and then say what was recorded.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import platform
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import uvicorn
from glm4_file import write_glm4_file
from msgspec.structs import replace
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tower_file import write_tower_file

from autoglm.cli.loading import LoadedModel, ModelOptions, find_model, load_model
from autoglm.cli.media_door import open_door
from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.engine.batch import Batch
from autoglm.formats.gguf import GGUFFile
from autoglm.media.limits import MediaLimits
from autoglm.media.sources import MediaSources
from autoglm.server.app import create_app
from autoglm.server.driver import EngineDriver
from autoglm.server.settings import ServerSettings

RESULTS = Path(__file__).resolve().parent / "results"
NANO = SHIPPED_MODELS["nano"]
TOWER_LAYERS = 2
SCREEN = (1080, 2400)
FILES = Path(platformdirs.user_cache_dir("autoglm")) / "benchmarks"


class RecordedRunner:
    """A runner that does all of a model's work and then prefers the tokens it was told; one request at a time."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.say([])

    def say(self, token_ids: list[int]) -> None:
        """What the next request is answered; after its end the model speaks for itself."""
        self._script, self._prompt_tokens = token_ids, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, batch: Batch) -> NDArray[np.float32]:
        logits = self._runner.run(batch)
        # The first row of logits is of the token in front of `place`, the others are of drafts behind it.
        place = int(batch.context_lens[0]) - len(logits) + 1
        if len(logits) and not self._prompt_tokens:
            self._prompt_tokens = place
        for row, token_id in enumerate(self._script[place - self._prompt_tokens :][: len(logits)]):
            logits[row, token_id] = 1e4
        return logits


def load_text(name: str, threads: int) -> LoadedModel:
    """A text model: glm4, which is the text part of glm4v, written first where need be, or one that has a name."""
    options = ModelOptions(model=str(_glm4_file()) if name == "glm4" else name, threads=threads, ctx_size=8192)
    return load_model(find_model(options, _quiet), replace(options, kv_memory="512M"), _quiet)


def glm4v_files(tower_layers: int) -> tuple[Path, Path, Path]:
    """Text model, mmproj and chat template of a random-weight pair, written where they are not there yet."""
    text = _glm4_file()
    mmproj = FILES / f"mmproj-glm4v-random-{tower_layers}-layers-Q8_0.gguf"
    if not mmproj.exists():
        write_tower_file(mmproj, tower_layers)
    template = FILES / "glm4v-template.jinja"
    with GGUFFile.open(Path(NANO.path)) as nano:  # GLM's, with places for pictures
        template.write_text(nano.get("tokenizer.chat_template", str), encoding="utf-8")
    return text, mmproj, template


def load(name: str, threads: int) -> LoadedModel:
    """The pair of that name, written first where it is not there yet."""
    options = ModelOptions(model="nano", threads=threads, takes_media=True)
    if name == "nano":
        return load_model(Path(NANO.path), options, _quiet)
    text, mmproj, template = glm4v_files(TOWER_LAYERS)
    options = replace(
        options, model=str(text), mmproj=mmproj, ctx_size=8192, kv_memory="512M", chat_template_file=template
    )
    return load_model(text, options, _quiet)


def _glm4_file() -> Path:
    text = FILES / "glm4-9b-shapes-8-layers-Q4_K_M.gguf"
    if not text.exists():
        write_glm4_file(text)
    return text


def _quiet(what: str, done: int, total: int) -> None:
    """No progress shown."""


@contextlib.contextmanager
def served(loaded: LoadedModel, driver: EngineDriver, **settings: Any) -> Iterator[int]:
    """The model over HTTP on a free loopback port; several may share one driver."""
    app = create_app(
        driver,
        loaded.tokenizer,
        loaded.template,
        model_id=loaded.model_id,
        settings=ServerSettings(**settings),
        media=open_door(loaded, MediaSources(MediaLimits())),
    )
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        sock.close()


def screen(number: int, size: tuple[int, int] = SCREEN) -> dict[str, Any]:
    """A phone-like screen as an image_url part: a bar, rows of icons and text, a photo; its own for each number."""
    rng = np.random.default_rng(number)
    width, height = size
    image = Image.new("RGB", size, (244, 245, 248))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width, height // 14), fill=tuple(int(v) for v in rng.integers(0, 200, 3)))
    draw.text((40, 60), f"Screen {number}", fill=(255, 255, 255), font_size=48)
    for row in range(10):
        top = height // 8 + row * height // 14
        draw.ellipse((40, top, 140, top + 100), fill=tuple(int(v) for v in rng.integers(0, 255, 3)))
        label = "".join(chr(97 + i) for i in rng.integers(0, 26, 24))
        draw.text((180, top + 20), label, fill=(30, 30, 34), font_size=40)
    photo = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize((width - 80, height // 10))
    image.paste(photo, (40, height - height // 8))
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def about_the_run(threads: int) -> dict[str, Any]:
    """Machine, commit and load, for the results file."""
    with open("/proc/cpuinfo", encoding="ascii") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": threads,
        "load_average_at_start": round(os.getloadavg()[0], 1),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_results(name: str, results: dict[str, Any]) -> None:
    """results/NAME.json, and the same as the last line printed."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))
