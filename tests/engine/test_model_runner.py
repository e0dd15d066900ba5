"""The native runner: refusals before anything slow, and memory given back after loading."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from autoglm.config import EngineConfig
from autoglm.engine.model_runner import CpuModelRunner
from autoglm.errors import ConfigError, FormatError
from autoglm.formats.gguf import GGUFFile
from tests.tiny_models import TinyModel


def test_kernels_that_cannot_run_here_are_a_setting_to_mend(
    tiny_llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOGLM_ISA", "sparc")
    with GGUFFile.open(tiny_llama.path) as gguf, pytest.raises(ConfigError, match="AUTOGLM_ISA 'sparc'.*or scalar"):
        CpuModelRunner(gguf, EngineConfig())


def test_a_released_tensor_reads_the_same_again(tmp_path: Path, tiny_llama: TinyModel) -> None:
    with GGUFFile.open(tiny_llama.path) as gguf:
        for name in gguf.tensors:
            before = gguf.data(name).copy()
            gguf.release(name)
            np.testing.assert_array_equal(gguf.data(name), before)


@pytest.mark.parametrize("left", [0.5, 0.999], ids=["half", "a little less"])
def test_a_file_cut_short_while_it_is_read(tmp_path: Path, tiny_llama: TinyModel, left: float) -> None:
    """It was whole when it was opened: one sentence, where a mapped file would end the process by a signal."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_llama.path.read_bytes())
    with GGUFFile.open(path) as gguf:
        first = min(tensor.offset for tensor in gguf.tensors.values())
        os.truncate(path, first + int((gguf.file_bytes - first) * left))
        with pytest.raises(FormatError, match=r"cut.gguf: became shorter while it was read; .*fetch it again"):
            CpuModelRunner(gguf, EngineConfig())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not tell")
def test_loading_leaves_the_file_unmapped(smollm2_path: Path) -> None:
    """Beside the copy that is computed with, hardly a page of the file is this process's memory."""
    with GGUFFile.open(smollm2_path) as gguf:
        progress: list[tuple[int, int]] = []
        CpuModelRunner(gguf, EngineConfig(num_kv_blocks=4), progress=lambda *done: progress.append(done))
        assert resident_bytes(smollm2_path) < 0.1 * gguf.file_bytes
        total = sum(tensor.nbytes for tensor in gguf.tensors.values())
    assert progress[0] == (0, total) and progress[-1] == (total, total) and progress == sorted(progress)


def resident_bytes(path: Path) -> int:
    """Of the mappings of a file, what counts as this process's memory."""
    found, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = line.endswith(str(path))
        elif is_ours and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def test_kv_pool_size_is_told(tiny_llama: TinyModel) -> None:
    with GGUFFile.open(tiny_llama.path) as gguf:
        small = CpuModelRunner(gguf, EngineConfig(num_kv_blocks=4))
        large = CpuModelRunner(gguf, EngineConfig(num_kv_blocks=8))
    assert large.kv_bytes == 2 * small.kv_bytes
    assert small.model_id == large.model_id
