"""The test quantizer is held to gguf's dequantizer: a wrong bit layout would show as a large error."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from tests.kquants import K_TYPES, quantize

# A uniform step of the group's range / levels gives these relative errors on Gaussian data.
RELATIVE_ERROR = {K_TYPES[0]: 0.09, K_TYPES[1]: 0.045, K_TYPES[2]: 0.025}


@pytest.mark.parametrize("qtype", K_TYPES, ids=lambda t: t.name)
def test_round_trip_error_is_that_of_the_bit_width(qtype: gguf.GGMLQuantizationType) -> None:
    values = np.random.default_rng(0).normal(0.01, 0.1, (37, 768)).astype(np.float32)
    values[3, :256] = 0
    values[4, 256:] = 0.5
    back = gguf.quants.dequantize(quantize(values, qtype), qtype)
    error = np.sqrt(np.mean((back - values) ** 2)) / values.std()
    assert error < RELATIVE_ERROR[qtype], error
    assert not back[3, :256].any()
    np.testing.assert_allclose(back[4, 256:], 0.5, rtol=0.02)
