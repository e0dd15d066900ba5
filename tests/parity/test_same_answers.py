"""Nano in floats on the native engine, over HTTP, against PyTorch on the same dequantized weights: equal replies.

With float weights neither side rounds activations, so nothing but a mistake can tell them apart; all 920 replies of
the whole held-out set were equal to the last character. As it ships the kernels read activations in 8 bits:
test_nano_answers.py bounds what that changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from autoglm.cli.api_client import ApiClient, connect  # noqa: E402
from autoglm.cli.loading import ModelOptions  # noqa: E402
from autoglm.cli.served import served_replier  # noqa: E402
from autoglm.deploy.shipped import SHIPPED_MODELS  # noqa: E402
from autoglm.pack.requantize import requantize  # noqa: E402
from autoglm.pack.type_plan import FileType  # noqa: E402
from autoglm.train.agreement import Recorder, agreement  # noqa: E402
from autoglm.train.evaluate import evaluate  # noqa: E402
from autoglm.train.inference import load_phone, replier  # noqa: E402
from autoglm.train.world.tasks import Task  # noqa: E402
from tests.train.conftest import hum  # noqa: E402, F401

NANO = SHIPPED_MODELS["nano"]
COUNTS: dict[Task, int] = {"typed_action": 8, "spoken_action": 6, "describe": 2, "is_here": 2, "transcribe": 4}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano in F32, its mmproj beside it."""
    folder = tmp_path_factory.mktemp("floats")
    requantize(NANO.path, folder / "Nano-F32.gguf", FileType.F32)
    requantize(NANO.mmproj, folder / "mmproj-Nano-F32.gguf", FileType.F32)
    return folder / "Nano-F32.gguf"


@pytest.fixture(scope="module")
def client(text: Path) -> Iterator[ApiClient]:
    with connect(ModelOptions(model=str(text), takes_media=True, ctx_size=2048), None, None) as client:
        yield client


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch's threads and the engine's would wait for each other on a machine of two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread", "hum")
def test_the_engine_in_floats_writes_what_pytorch_writes(client: ApiClient, text: Path) -> None:
    """Screens of every shape the world draws, hummed commands, both, and sounds alone."""
    twin, native = Recorder(replier(load_phone(text))), Recorder(served_replier(client))
    for generate in (twin, native):
        evaluate(generate, counts=COUNTS)
    heights = {example.screen.image.height for example in native.examples if example.screen is not None}
    assert len(heights) >= 3 and 796 in heights, "screens of one shape alone would hide a wrong resize"
    found = agreement(native.examples, twin.replies, native.replies)
    assert found.media_answers.total == sum(COUNTS.values())
    assert found.same_replies.right == found.same_replies.total, found.differences
