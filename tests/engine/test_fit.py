"""Context and KV pool against memory: what is fitted stays inside, what cannot be is refused with numbers."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm.config import EngineConfig, ModelConfig
from autoglm.engine.fit import MediaMemory, fit_engine_config, kv_token_bytes, memory_plan
from autoglm.errors import ConfigError

GLM_9B = ModelConfig(
    architecture="glm4",
    name="AutoGLM-Phone-9B",
    num_hidden_layers=40,
    hidden_size=4096,
    intermediate_size=13696,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    vocab_size=151552,
    max_position_embeddings=65536,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rotary_dim=64,
    rope_interleaved=True,
)
Q4_K_M_BYTES = 6_170_000_000
GB = 1 << 30


def test_kv_bytes_of_a_token() -> None:
    # 40 layers, 2 heads of 128, keys and values, 2 bytes each, and a f32 scale for each 128.
    assert kv_token_bytes(GLM_9B, EngineConfig()) == 40 * 2 * (128 * 2 + 4) * 2
    assert kv_token_bytes(GLM_9B, EngineConfig(cache_type_k="f16", cache_type_v="f16")) == 40 * 2 * 128 * 2 * 2
    half = kv_token_bytes(GLM_9B, EngineConfig(cache_type_k="q8_0", cache_type_v="q8_0"))
    # int8 values, and an f32 scale for each 32 of them.
    assert half == 40 * 2 * 128 * 2 * 36 // 32


def test_plenty_of_memory_gives_every_sequence_its_full_context() -> None:
    config = fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(max_num_seqs=4), 256 * GB)
    assert config.ctx_size == 65536
    assert config.num_kv_blocks == 4 * 65536 // 16


def test_sixteen_gigabytes_hold_the_9b_with_a_long_context() -> None:
    """A 16 GB machine with 12 GB free, the tier the users ask for."""
    config = fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(), 12 * GB)
    assert config.ctx_size == 65536
    plan = memory_plan(GLM_9B, Q4_K_M_BYTES, config, 12 * GB)
    assert plan.total_bytes < 12 * GB


def test_eight_gigabytes_shorten_the_context() -> None:
    config = fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(), 8 * GB)
    assert config.ctx_size is not None and 4096 < config.ctx_size < 65536
    assert config.num_kv_blocks is not None and config.ctx_size <= config.num_kv_blocks * 16


def test_weights_that_do_not_fit_are_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"does not fit into memory: 6\.48 GB of weights.*4\.29 GB are free; mend"):
        fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(), 4 * GB)


def test_context_beyond_the_model_or_the_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="made for 65536"):
        fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(ctx_size=100_000), 64 * GB)
    with pytest.raises(ConfigError, match=r"--ctx-size (\d+) or less.*q8_0") as caught:
        fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(ctx_size=65536), 8 * GB)
    possible = int(str(caught.value).split("--ctx-size ")[1].split()[0])
    fitted = fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(ctx_size=possible), 8 * GB)
    assert fitted.ctx_size == possible


def test_given_pool_is_kept_or_refused() -> None:
    config = fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(num_kv_blocks=100), 16 * GB)
    assert (config.num_kv_blocks, config.ctx_size) == (100, 1600)
    with pytest.raises(ConfigError, match=r"--kv-blocks \d+ or less"):
        fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(num_kv_blocks=1_000_000), 16 * GB)
    with pytest.raises(ConfigError, match="--kv-blocks 125 or more, or --ctx-size 1600"):
        fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(num_kv_blocks=100, ctx_size=2000), 16 * GB)


@given(
    available=st.integers(0, 64 * GB),
    weights=st.integers(0, 40 * GB),
    seqs=st.integers(1, 64),
    ctx=st.none() | st.integers(1, 65536),
    cache=st.sampled_from(["f16", "i16", "q8_0"]),
)
def test_whatever_is_fitted_stays_inside_the_memory(
    available: int, weights: int, seqs: int, ctx: int | None, cache: str
) -> None:
    wanted = EngineConfig(ctx_size=ctx, max_num_seqs=seqs, cache_type_k=cache, cache_type_v=cache)
    try:
        config = fit_engine_config(GLM_9B, weights, wanted, available)
    except ConfigError as error:
        assert "mend" in str(error)
        return
    assert config.ctx_size is not None and config.num_kv_blocks is not None
    assert ctx is None or config.ctx_size == ctx
    assert 1 <= config.ctx_size <= config.num_kv_blocks * config.block_size
    assert config.num_kv_blocks * config.block_size <= max(16, seqs * (config.ctx_size + 15) + 15)
    assert memory_plan(GLM_9B, weights, config, available).total_bytes <= available


def media(max_pixels: int = 5_000_000, *, pixel_bytes: int = 500, fixed_bytes: int = 500 << 20) -> MediaMemory:
    return MediaMemory(10_000, max_pixels, lambda pixels: pixel_bytes * pixels, 200 << 20, fixed_bytes, fixed_bytes)


def test_media_take_their_memory_from_the_pool() -> None:
    plain = fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(), 12 * GB)
    seeing = fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(), 12 * GB, media())
    assert (seeing.num_kv_blocks or 0) < (plain.num_kv_blocks or 0)
    plan = memory_plan(GLM_9B, Q4_K_M_BYTES, seeing, 12 * GB, media())
    assert plan.media_bytes == 2_500_000_000 + 2 * (500 << 20) and plan.total_bytes < 12 * GB
    assert media(100_000).encoder_bytes == 200 << 20, "the sound is the larger one"


@given(available=st.integers(0, 16 * GB), pixels=st.integers(10_000, 12_000_000), kept=st.integers(0, GB))
def test_a_picture_fits_or_its_mend_does(available: int, pixels: int, kept: int) -> None:
    wanted = media(pixels, fixed_bytes=kept)
    try:
        config = fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(), available, wanted)
    except ConfigError as error:
        found = re.search(r"mend: --max-pixels (\d+)", str(error))
        if found is not None:
            possible = media(int(found[1]), fixed_bytes=kept)
            assert possible.max_pixels < pixels
            config = fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(), available, possible)
            assert memory_plan(GLM_9B, Q4_K_M_BYTES, config, available, possible).total_bytes <= available
        return
    assert memory_plan(GLM_9B, Q4_K_M_BYTES, config, available, wanted).total_bytes <= available


def test_the_step_shortens_where_memory_is_short() -> None:
    """Long steps cost working memory; on a machine that barely holds the weights the pool needs it more."""
    plenty = fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(), 64 * GB)
    tight = fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(), Q4_K_M_BYTES * 105 // 100 + GB // 2)
    chosen = fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(max_num_batched_tokens=512), 64 * GB)
    assert plenty.max_num_batched_tokens == chosen.max_num_batched_tokens == 512
    assert tight.max_num_batched_tokens is not None and 64 <= tight.max_num_batched_tokens < 512
    assert fit_engine_config(GLM_9B, Q4_K_M_BYTES, EngineConfig(max_num_batched_tokens=33), 64 * GB).token_budget == 33
