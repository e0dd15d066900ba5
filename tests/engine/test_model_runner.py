"""The native runner: refusals before anything slow, and memory given back after loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autoglm.config import EngineConfig
from autoglm.engine.model_runner import CpuModelRunner
from autoglm.errors import ConfigError
from autoglm.formats.gguf import GGUFFile
from tests.tiny_models import TinyModel


def test_kernels_that_cannot_run_here_are_a_setting_to_mend(
    tiny_llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOGLM_ISA", "sparc")
    with GGUFFile.open(tiny_llama.path) as gguf, pytest.raises(ConfigError, match="AUTOGLM_ISA 'sparc'.*use scalar"):
        CpuModelRunner(gguf, EngineConfig())


def test_a_released_tensor_reads_the_same_again(tmp_path: Path, tiny_llama: TinyModel) -> None:
    with GGUFFile.open(tiny_llama.path) as gguf:
        for name in gguf.tensors:
            before = gguf.data(name).copy()
            gguf.release(name)
            np.testing.assert_array_equal(gguf.data(name), before)


def test_kv_pool_size_is_told(tiny_llama: TinyModel) -> None:
    with GGUFFile.open(tiny_llama.path) as gguf:
        small = CpuModelRunner(gguf, EngineConfig(num_kv_blocks=4))
        large = CpuModelRunner(gguf, EngineConfig(num_kv_blocks=8))
    assert large.kv_bytes == 2 * small.kv_bytes
    assert small.model_id == large.model_id
