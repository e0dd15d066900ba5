"""One native runtime per instruction set this machine has."""

from __future__ import annotations

import pytest

kernels = pytest.importorskip("autoglm.kernels", reason="the native module is not built")

ISAS = ("scalar", "avx2", "avxvnni", "avx512", "neon")


def make_runtime(isa: str, num_threads: int = 2) -> kernels.Runtime:
    try:
        return kernels.Runtime(num_threads, isa)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=ISAS)
def runtime(request: pytest.FixtureRequest) -> kernels.Runtime:
    return make_runtime(request.param)
