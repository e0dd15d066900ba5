"""Fit context and KV pool to the memory there is: EngineConfig with None fields -> one without.

What is counted: the weights as they lie in memory after loading (about their size in the file), the KV pool, the
working arrays of one step, and what pictures and sounds take beside the text model. What is not: the page cache behind
the mapped file, which the system takes back at need.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from autoglm.config import DEFAULT_BATCHED_TOKENS, EngineConfig, ModelConfig
from autoglm.errors import ConfigError
from autoglm.kernels import KvCache

# The pool takes this share of what weights and working arrays leave; the rest is for everything else on the machine.
_POOL_SHARE = 0.6
# Python, its libraries, the tokenizer and the HTTP server, measured at about 150 MB with SmolLM2 loaded.
_PROCESS_BYTES = 200 << 20
# Padding and block sums the kernels' own weight layout adds to the file's size, at most.
_REPACK_OVERHEAD = 1.05
# Tokens one step may process, longest first; the last one is taken however little memory there is.
_TOKEN_BUDGETS = (DEFAULT_BATCHED_TOKENS, 256, 128, 64)
# Below this many tokens of context a chat is of no use; the machine is then too small.
_MIN_CONTEXT = 512


# Decoded pictures and sounds of all requests may take this share of what is free, within these bounds: the lower one
# holds a large phone's screenshot while it is decoded, the upper one any picture that is read at all.
_DECODED_SHARE = 16
_MIN_DECODED_BYTES, MAX_DECODED_BYTES = 128 << 20, 1 << 30


class MediaMemory(Struct, frozen=True):
    """What pictures and sounds take beside the text model, in bytes.

    min_pixels, max_pixels  the least a picture can be held to, and the budget of one where a request names none
    picture_bytes           max_pixels -> working memory of the encoder; one medium is encoded at a time
    sound_bytes             the same for the longest sound, 0 without ears
    decoded_bytes           pictures and sounds of all requests, decoded
    kept_bytes              embeddings kept for later turns
    """

    min_pixels: int
    max_pixels: int
    picture_bytes: Callable[[int], int]
    sound_bytes: int
    decoded_bytes: int
    kept_bytes: int

    @property
    def encoder_bytes(self) -> int:
        """Working memory of the largest medium."""
        return max(self.picture_bytes(self.max_pixels), self.sound_bytes)

    @property
    def total_bytes(self) -> int:
        return self.encoder_bytes + self.decoded_bytes + self.kept_bytes

    def largest_picture(self, room_bytes: int, most_pixels: int) -> int:
        """The largest max_pixels up to most_pixels that can be encoded in so many bytes; 0 where none can."""
        if self.picture_bytes(self.min_pixels) > room_bytes:
            return 0
        low, high = self.min_pixels, most_pixels
        while low < high:
            middle = (low + high + 1) // 2
            if self.picture_bytes(middle) <= room_bytes:
                low = middle
            else:
                high = middle - 1
        return low


def decoded_media_bytes(available_bytes: int) -> int:
    """What decoded pictures and sounds of all requests may take on a machine with so much memory free."""
    return min(MAX_DECODED_BYTES, max(_MIN_DECODED_BYTES, available_bytes // _DECODED_SHARE))


class MemoryPlan(Struct, frozen=True):
    """Where the memory goes, in bytes; kv_token_bytes is what one token takes in the pool."""

    weights_bytes: int
    workspace_bytes: int
    kv_token_bytes: int
    kv_pool_bytes: int
    available_bytes: int
    media_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.workspace_bytes + self.media_bytes + self.kv_pool_bytes


def kv_token_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes that one token's keys and values take in all layers."""
    block_bytes = KvCache.block_bytes(
        model.num_key_value_heads, model.head_dim, config.cache_type_k, config.cache_type_v
    )
    return -(-model.num_hidden_layers * block_bytes // config.block_size)


def workspace_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Working arrays of the largest step, and the process itself: an upper estimate in bytes.

    Per token f32: residual, normed and attention rows of hidden_size, the fused QKV row, gate and up of
    intermediate_size, their int8 copies, and a row of logits. Per sequence: two copies of its logits while sampling.
    """
    query_and_kv = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    per_token = 4 * (3 * model.hidden_size + query_and_kv + 2 * model.intermediate_size)
    per_token += model.hidden_size + model.intermediate_size + 4 * model.vocab_size
    return _PROCESS_BYTES + config.token_budget * per_token + config.max_num_seqs * 2 * 4 * model.vocab_size


def memory_plan(
    model: ModelConfig,
    weights_bytes: int,
    config: EngineConfig,
    available_bytes: int,
    media: MediaMemory | None = None,
) -> MemoryPlan:
    """The memory a fitted configuration takes; without num_kv_blocks the pool counts as empty."""
    per_token = kv_token_bytes(model, config)
    return MemoryPlan(
        weights_bytes=round(weights_bytes * _REPACK_OVERHEAD),
        workspace_bytes=workspace_bytes(model, config),
        kv_token_bytes=per_token,
        kv_pool_bytes=(config.num_kv_blocks or 0) * config.block_size * per_token,
        available_bytes=available_bytes,
        media_bytes=media.total_bytes if media is not None else 0,
    )


def fit_engine_config(
    model: ModelConfig,
    weights_bytes: int,
    config: EngineConfig,
    available_bytes: int,
    media: MediaMemory | None = None,
) -> EngineConfig:
    """Fill ctx_size, num_kv_blocks and max_num_batched_tokens where they are None, from available_bytes of memory.

    weights_bytes  size of all weight tensors, those of the mmproj too
    media          what pictures and sounds take; None: the model reads text only
    The pool holds at most max_num_seqs full contexts; a context never exceeds the pool.
    Raises ConfigError, with the numbers and the mend, if the weights or what was asked for do not fit.
    """
    if config.ctx_size is not None and config.ctx_size > model.max_position_embeddings:
        raise ConfigError(
            f"a context of {config.ctx_size} tokens was asked for, and {model.name} was made for "
            f"{model.max_position_embeddings}; mend: --ctx-size {model.max_position_embeddings} or less"
        )
    config = _with_token_budget(model, weights_bytes, config, available_bytes, media)
    plan = memory_plan(model, weights_bytes, replace(config, num_kv_blocks=None), available_bytes, media)
    left_bytes = available_bytes - plan.total_bytes
    smallest = min(_MIN_CONTEXT, model.max_position_embeddings)
    if media is not None and left_bytes < smallest * plan.kv_token_bytes:
        raise _media_too_large(model, media, plan, left_bytes - smallest * plan.kv_token_bytes)
    if left_bytes < smallest * plan.kv_token_bytes:
        raise ConfigError(
            f"{model.name} does not fit into memory: {_gb(plan.weights_bytes)} of weights, "
            f"{_gb(plan.workspace_bytes)} of working memory and {_gb(smallest * plan.kv_token_bytes)} for "
            f"{smallest} tokens are needed, and {_gb(available_bytes)} are free; "
            "mend: close other programs, or take a smaller model or a smaller quantization of it"
        )
    if config.num_kv_blocks is not None:
        return _with_given_pool(model, config, plan, left_bytes)
    wanted = config.ctx_size or model.max_position_embeddings
    pool_tokens = _pool_tokens(config, wanted, plan.kv_token_bytes, left_bytes)
    if config.ctx_size is not None and pool_tokens < config.ctx_size:
        raise _context_too_large(config.ctx_size, pool_tokens, plan)
    blocks = -(-pool_tokens // config.block_size)
    return replace(config, ctx_size=min(wanted, blocks * config.block_size), num_kv_blocks=blocks)


def _with_token_budget(
    model: ModelConfig, weights_bytes: int, config: EngineConfig, available_bytes: int, media: MediaMemory | None
) -> EngineConfig:
    """The longest step whose working memory takes at most a quarter of what the weights leave."""
    if config.max_num_batched_tokens is not None:
        return config
    fitted = config
    for tokens in _TOKEN_BUDGETS:
        fitted = replace(config, max_num_batched_tokens=tokens)
        plan = memory_plan(model, weights_bytes, replace(fitted, num_kv_blocks=None), available_bytes, media)
        free_bytes = available_bytes - plan.weights_bytes - plan.media_bytes - _PROCESS_BYTES
        if plan.workspace_bytes - _PROCESS_BYTES <= free_bytes // 4:
            break
    return fitted


def _pool_tokens(config: EngineConfig, context: int, token_bytes: int, left_bytes: int) -> int:
    """Tokens in the pool: whole blocks, enough for every sequence at full context if the memory's share allows."""
    share = int(left_bytes * _POOL_SHARE) // token_bytes
    # One full context matters more than the reserve for other programs, up to nearly all that is left.
    one_context = min(context, int(left_bytes * 0.9) // token_bytes)
    tokens = min(config.max_num_seqs * context, max(share, one_context))
    if tokens >= context:
        return -(-tokens // config.block_size) * config.block_size
    return max(config.block_size, tokens // config.block_size * config.block_size)


def _with_given_pool(model: ModelConfig, config: EngineConfig, plan: MemoryPlan, left_bytes: int) -> EngineConfig:
    assert config.num_kv_blocks is not None
    pool_tokens = config.num_kv_blocks * config.block_size
    if pool_tokens * plan.kv_token_bytes > left_bytes:
        raise ConfigError(
            f"a KV pool of {config.num_kv_blocks} blocks takes {_gb(pool_tokens * plan.kv_token_bytes)}, and "
            f"{_gb(left_bytes)} are left beside the weights; mend: --kv-blocks "
            f"{left_bytes // plan.kv_token_bytes // config.block_size} or less, or leave it out"
        )
    if config.ctx_size is not None and config.ctx_size > pool_tokens:
        raise ConfigError(
            f"a context of {config.ctx_size} tokens does not fit a KV pool of {config.num_kv_blocks} blocks "
            f"({pool_tokens} tokens); mend: --kv-blocks {-(-config.ctx_size // config.block_size)} or more, "
            f"or --ctx-size {pool_tokens}"
        )
    return replace(config, ctx_size=config.ctx_size or min(model.max_position_embeddings, pool_tokens))


def _media_too_large(model: ModelConfig, media: MediaMemory, plan: MemoryPlan, short_bytes: int) -> ConfigError:
    """short_bytes: how much is left after the smallest context, below zero."""
    possible = media.largest_picture(media.encoder_bytes + short_bytes, media.max_pixels)
    mend = "close other programs, or take a smaller model or a smaller quantization of it"
    if possible and media.sound_bytes <= media.encoder_bytes + short_bytes:
        mend = f"--max-pixels {possible}, or close other programs"
    return ConfigError(
        f"{model.name} and its largest picture do not fit into memory: {_gb(plan.weights_bytes)} of weights, "
        f"{_gb(plan.workspace_bytes)} of working memory, {_gb(media.encoder_bytes)} to encode {media.max_pixels} "
        f"pixels and {_gb(media.decoded_bytes + media.kept_bytes)} for decoded media and embeddings are needed, and "
        f"{_gb(plan.available_bytes)} are free; mend: {mend}"
    )


def _context_too_large(asked: int, possible: int, plan: MemoryPlan) -> ConfigError:
    return ConfigError(
        f"a context of {asked} tokens takes {_gb(asked * plan.kv_token_bytes)} beside {_gb(plan.weights_bytes)} of "
        f"weights, and {_gb(plan.available_bytes)} of memory are free; mend: --ctx-size {possible} or less, "
        "or halve the cache: --cache-type-k q8_0 --cache-type-v q8_0"
    )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{max(0, num_bytes) / 1e6:.1f} MB"
