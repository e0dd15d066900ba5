"""What encoding is said to take, against what it takes: native buffers by their own count, arrays by tracemalloc."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from autoglm.deploy.shipped import SHIPPED_MODELS
from autoglm.formats.gguf import GGUFFile
from autoglm.kernels import KvCache, Program, Runtime
from autoglm.media.glm4v_pixels import PatchGrid, patch_grid, pixel_values
from autoglm.media.log_mel import SAMPLE_RATE_HZ, log_mel
from autoglm.media.screen_pixels import encoder_pixels
from autoglm.model import encoder, encoder_memory, gcmf_vision, glm4v_vision, layers
from autoglm.model.encoder import finish
from autoglm.model.gcmf_audio import GcmfAudio, read_gcmf_audio_config
from autoglm.model.gcmf_vision import GcmfVision, read_gcmf_vision_config
from autoglm.model.glm4v_vision import Glm4vVision, read_glm4v_config
from autoglm.model.loader import WeightReader

NANO = SHIPPED_MODELS["nano"]
FIXTURE = Path(__file__).parent.parent / "fixtures" / "glm4v-tiny"
Measure = Callable[..., int]
SCRATCH_BYTES = 8 << 20  # of threads: it does not grow with the picture


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Bytes that a call takes at once; of its native programs those that live at the same time, by `alive`."""
    made: dict[int, Any] = {}

    def recording(what: Any) -> Any:
        def make(*arguments: Any) -> Any:
            made[len(made)] = result = what(*arguments)
            return result

        return make

    for module in (glm4v_vision, gcmf_vision, layers):
        monkeypatch.setattr(module, "Program", recording(Program))
    monkeypatch.setattr(encoder, "KvCache", recording(KvCache))

    def run(work: Callable[[], object], alive: Callable[[set[int]], int] = max) -> int:
        made.clear()
        tracemalloc.start()
        work()
        arrays = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        programs = {program.nbytes for program in made.values() if isinstance(program, Program)}
        keys = max((cache.nbytes for cache in made.values() if isinstance(cache, KvCache)), default=0)
        return arrays + alive(programs) + keys

    return run


def test_rows_of_programs_and_keys_are_counted_as_they_lie() -> None:
    program = Program(Runtime(1), 100)
    for width in (588, 64, 192, 1):
        program.buffer(width)
    assert program.nbytes == 100 * encoder_memory._buffers(588, 64, 192, 1)
    program = Program(Runtime(1), 100)
    program.set_full_attention(3, 48, False, (0, 12, 12), 48, np.ones(24, np.float32))
    assert program.nbytes == Program.full_attention_bytes(100, 3, 48)
    for rows in (15, 16, 17):
        assert encoder_memory._keys(rows, 4, 32) == encoder.key_value_room(rows, 4, 32).nbytes


def check(said: int, took: int, most: float) -> None:
    said -= SCRATCH_BYTES
    assert took - (1 << 20) < said < most * took, (said, took, said / took)


@pytest.mark.parametrize("name", ["mmproj-f32.gguf", "mmproj-q8_0.gguf"])
def test_glm4v(name: str, measure: Measure) -> None:
    gguf = GGUFFile.open(FIXTURE / name)
    runtime = Runtime(1)
    tower = Glm4vVision(runtime, WeightReader(gguf, runtime), read_glm4v_config(gguf))
    rgb = np.zeros((1400, 640, 3), np.uint8)
    grid = patch_grid(640, 1400, max_pixels=2 * 500_000)
    _, rows, columns = grid.image_grid_thw

    def encode() -> object:
        return finish(tower.encode(partial(pixel_values, rgb, PatchGrid(grid.width, grid.height)), rows, columns))

    check(encoder_memory.picture_bytes(gguf, 2 * 500_000), measure(encode), 1.3)


def test_nanos_eyes(measure: Measure) -> None:
    gguf = GGUFFile.open(NANO.mmproj)
    eyes = GcmfVision(WeightReader(gguf, Runtime(1)), read_gcmf_vision_config(gguf))
    screen = Image.new("RGB", (1080, 2400))

    def encode() -> object:
        return finish(eyes.encode(encoder_pixels(screen, max_pixels=400_000)))

    check(encoder_memory.picture_bytes(gguf, 400_000), measure(encode, sum), 1.6)


def test_nanos_ears(measure: Measure) -> None:
    gguf = GGUFFile.open(NANO.mmproj)
    ears = GcmfAudio(WeightReader(gguf, Runtime(1)), read_gcmf_audio_config(gguf))
    wave = np.zeros(60 * SAMPLE_RATE_HZ, np.float32)
    check(encoder_memory.sound_bytes(gguf, 60), measure(lambda: finish(ears.encode(log_mel(wave)))), 1.6)
    assert encoder_memory.sound_bytes(gguf, 10) < encoder_memory.sound_bytes(gguf, 60) / 3


def test_pictures_of_one_size_share_what_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    gguf, runtime = GGUFFile.open(FIXTURE / "mmproj-q8_0.gguf"), Runtime(1)
    made: list[Program] = []

    def recorded(*arguments: Any) -> Program:
        made.append(Program(*arguments))
        return made[-1]

    monkeypatch.setattr(glm4v_vision, "Program", recorded)
    towers = [Glm4vVision(runtime, WeightReader(gguf, runtime), read_glm4v_config(gguf)) for _ in range(2)]

    def encode(tower: Glm4vVision, seed: int, rows: int, columns: int) -> np.ndarray:
        patches = np.random.default_rng(seed).normal(0, 1, (rows * columns, 588)).astype(np.float32)
        return finish(tower.encode(lambda: patches, rows, columns))

    first, second = (encode(towers[0], seed, 8, 12) for seed in (0, 1))
    assert len(made) == 2, "a tower and a merger"
    assert not np.array_equal(first, second), "each its own patches"
    encode(towers[0], 0, 12, 8)
    assert len(made) == 4
    np.testing.assert_array_equal(encode(towers[0], 0, 8, 12), first)
    np.testing.assert_array_equal(encode(towers[1], 1, 8, 12), second)
