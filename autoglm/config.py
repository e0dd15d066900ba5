"""Frozen model and engine settings, checked on creation. Field names keep the HF spelling."""

from __future__ import annotations

from msgspec import Struct

from autoglm.errors import ConfigError


class ModelConfig(Struct, frozen=True):
    """The text decoder's shape, as read from a GGUF header.

    rope_interleaved    pairs are dims (2j, 2j+1); otherwise (j, j + rotary_dim / 2)
    mrope_section       pairs per axis (t, h, w); None means plain 1-D RoPE
    pruned_ffn_layers   layers without a feed-forward part, in rising order
    attention_mode      how picture and sound tokens see each other: causal, or media (docs/format.md)
    """

    architecture: str  # "glm4" | "llama"
    name: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    rope_interleaved: bool
    mrope_section: tuple[int, int, int] | None = None
    pruned_ffn_layers: tuple[int, ...] = ()
    attention_mode: str = "causal"
    num_parameters: int = 0

    def __post_init__(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ConfigError(f"model config: {message}")

        for field in (
            "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads "
            "head_dim vocab_size max_position_embeddings"
        ).split():
            value = getattr(self, field)
            need(0 < value <= 1 << 24, f"{field} is {value}, expected 1 to {1 << 24}")
        need(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        need(
            0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
            f"rotary_dim {self.rotary_dim} is not an even number up to head_dim {self.head_dim}",
        )
        need(0 < self.rms_norm_eps < 1, f"rms_norm_eps is {self.rms_norm_eps}, expected 0 to 1")
        need(1 <= self.rope_theta <= 1e12, f"rope_theta is {self.rope_theta}, expected 1 to 1e12")
        if self.mrope_section is not None:
            need(
                sum(self.mrope_section) == self.rotary_dim // 2,
                f"mrope_section {list(self.mrope_section)} does not sum to rotary_dim / 2 = {self.rotary_dim // 2}",
            )
        pruned = self.pruned_ffn_layers
        need(
            all(0 <= layer < self.num_hidden_layers for layer in pruned) and list(pruned) == sorted(set(pruned)),
            f"pruned_ffn_layers must name layers 0 to {self.num_hidden_layers - 1}, each once, in rising order",
        )


KV_CACHE_TYPES = ("f32", "f16", "i16", "q8_0")
# Prefill gains nothing from longer steps (the kernels block rows by 512), and people wait behind them.
DEFAULT_BATCHED_TOKENS = 512


class EngineConfig(Struct, frozen=True):
    """What the person chose, or what was fitted to the machine (None = fit it)."""

    ctx_size: int | None = None  # tokens one sequence may hold
    max_num_seqs: int = 16  # sequences running at once (--parallel)
    max_num_batched_tokens: int | None = None  # tokens one step may process, at most DEFAULT_BATCHED_TOKENS if fitted
    max_waiting: int = 256  # queue length before 429
    num_kv_blocks: int | None = None
    block_size: int = 16  # tokens a KV block holds; the attention kernel is built for 16
    cache_type_k: str = "i16"
    cache_type_v: str = "i16"
    num_threads: int | None = None
    enable_prefix_caching: bool = True
    draft_max: int = 15  # tokens one step may draft for a sequence, as many as pay; 0: none
    media_cache_bytes: int = 256 << 20  # embeddings of pictures and sounds kept for the next turn

    def __post_init__(self) -> None:
        for name in ("cache_type_k", "cache_type_v"):
            if getattr(self, name) not in KV_CACHE_TYPES:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; this build stores the KV cache as "
                    + " or ".join(KV_CACHE_TYPES)
                )
        for name in ("max_num_seqs", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("ctx_size", "max_num_batched_tokens", "num_kv_blocks", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")
        if self.draft_max < 0:
            raise ConfigError(f"draft_max is {self.draft_max}, expected 0 or more")
        if self.block_size != 16:
            raise ConfigError(f"block_size is {self.block_size}; the attention kernels are built for 16")

    @property
    def token_budget(self) -> int:
        """Tokens one step may process: as chosen or fitted, else the default."""
        return self.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS


ENGINE_DEFAULTS = EngineConfig()
