"""Tiny random checkpoints: made with transformers, written to GGUF, each with its torch model as oracle.

Weights are re-randomised: the default initialisation has unit norms and zero biases and would hide a
forgotten norm, bias or rotation. Matrices are N(0, 0.8 / sqrt(K)), embedding and head N(0, 0.3 / sqrt(K)), norms
1 + N(0, 0.2), biases N(0, 0.2). Larger matrices (1.2 / sqrt(K)) were tried: attention gets so sharp that an
f16 KV cache alone moves a logit by 3e-3 and int8 activations by 0.3, which would test chaos, not kernels.
The oracle runs on the weights as the file holds them (dequantized), in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import Glm4Config, Glm4ForCausalLM, Glm4vTextConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm4v.modeling_glm4v import Glm4vTextModel

from autoglm.kernels import reference
from tests.kquants import quantize
from tests.tiny_vocabulary import VOCAB_SIZE, TinyVocabulary, tiny_vocabulary

QType = gguf.GGMLQuantizationType
TypePlan = Callable[[str, int], QType]  # (GGUF tensor name, row width) -> type of a matrix

KINDS = ("glm4", "glm4_mrope", "llama")
SIMPLE_TYPES = (QType.F32, QType.F16, QType.BF16, QType.Q4_0, QType.Q4_1, QType.Q5_0, QType.Q5_1, QType.Q8_0)
K_TYPES = (QType.Q4_K, QType.Q5_K, QType.Q6_K)
MAX_POSITIONS = 2048

# --- models ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int = 2
    mrope_section: tuple[int, int, int] = (1, 1, 2)  # glm4_mrope only; sums to head_dim / 4
    key_length: int | None = None  # llama only: a head_dim that is not hidden_size / num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.key_length or self.hidden_size // self.num_attention_heads


TINY = Shape(64, 96, 4, 2)
TINY_LLAMA = Shape(96, 160, 6, 2)  # three query heads to a KV head, as SmolLM2 has
# 384 = 128 mod 256, so ffn_down takes the fallback types, as 13696 does in the 9B model.
WIDE = Shape(256, 384, 4, 2, num_hidden_layers=4, mrope_section=(4, 6, 6))


class Glm4vText(torch.nn.Module):
    """The text part of GLM-4.1V: its decoder and an untied head."""

    def __init__(self, config: Glm4vTextConfig) -> None:
        super().__init__()
        self.model = Glm4vTextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)


def _torch_model(kind: str, shape: Shape, untied: bool) -> torch.nn.Module:
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if kind == "llama":
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        config = LlamaConfig(
            **common, **ids, head_dim=shape.head_dim, rope_parameters=rope, tie_word_embeddings=not untied
        )
        return LlamaForCausalLM(config)
    rope["partial_rotary_factor"] = 0.5
    if kind == "glm4":
        return Glm4ForCausalLM(Glm4Config(**common, head_dim=shape.head_dim, rope_parameters=rope, eos_token_id=0))
    rope["mrope_section"] = list(shape.mrope_section)
    return Glm4vText(Glm4vTextConfig(**common, rope_parameters=rope))


def _randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                outer = "embed_tokens" in name or "lm_head" in name
                parameter.copy_(noise * ((0.3 if outer else 0.8) / parameter.shape[1] ** 0.5))
            else:
                parameter.copy_(noise * 0.2 + (0.0 if name.endswith("bias") else 1.0))


def rotary_row_order(kind: str, shape: Shape, num_heads: int) -> np.ndarray | None:
    """Row r of the GGUF's q or k matrix is row order[r] of transformers'; None where they are the same.

    glm4 with sections: interleaved pairs become half-split over the rotary dims.
    llama: half-split pairs become interleaved over the whole head.
    """
    dim = shape.head_dim
    if kind == "glm4":
        return None
    if kind == "glm4_mrope":
        rotary = dim // 2
        head = np.concatenate([np.arange(0, rotary, 2), np.arange(1, rotary, 2), np.arange(rotary, dim)])
    else:
        head = np.arange(dim).reshape(2, dim // 2).T.reshape(-1)
    return (np.arange(num_heads)[:, None] * dim + head).reshape(-1)


_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_GLM4_NAMES = {
    "post_self_attn_layernorm.weight": "post_attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_up_proj.weight": "ffn_up.weight",
    "post_mlp_layernorm.weight": "post_ffw_norm.weight",
}
_LLAMA_NAMES = {
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
}


def gguf_name(kind: str, name: str) -> str:
    """The GGUF tensor a transformers parameter is stored as."""
    name = name.removeprefix("model.")
    top = {
        "embed_tokens.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{(_LAYER_NAMES | (_LLAMA_NAMES if kind == 'llama' else _GLM4_NAMES))[rest]}"


# --- type plans --------------------------------------------------------------------------------------------

FALLBACK = {QType.Q4_K: QType.Q5_0, QType.Q5_K: QType.Q5_1, QType.Q6_K: QType.Q8_0}


def fitted(qtype: QType, width: int) -> QType:
    """The type llama.cpp's quantizer falls back to where a row is no whole number of blocks."""
    if qtype in FALLBACK and width % 256:
        qtype = FALLBACK[qtype]
    return QType.F16 if width % gguf.GGML_QUANT_SIZES[qtype][0] else qtype


def uniform_plan(qtype: QType) -> TypePlan:
    return lambda name, width: fitted(qtype, width)


def has_more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def medium_plan(base: QType, num_layers: int) -> TypePlan:
    """Q4_K_M and Q5_K_M: `base`, with Q6_K for the head and for the more-bits layers' attn_v and ffn_down."""

    def plan(name: str, width: int) -> QType:
        if name == "output.weight":
            return fitted(QType.Q6_K, width)
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            if part in ("attn_v", "ffn_down") and has_more_bits(int(layer), num_layers):
                return fitted(QType.Q6_K, width)
        return fitted(base, width)

    return plan


# --- GGUF --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TinyModel:
    """A GGUF on disk and the torch model that holds exactly its (dequantized) weights."""

    path: Path
    kind: str
    shape: Shape
    vocabulary: TinyVocabulary
    torch_model: torch.nn.Module

    def logits(
        self,
        token_ids: Iterable[int],
        positions: np.ndarray | None = None,
        *,
        activation_block: int | None = None,
        cache_type: str | None = None,
    ) -> np.ndarray:
        """f32 [T, vocab] of transformers in float32.

        positions         i32 [3, T] for M-RoPE; None = 0, 1, 2, ... on all axes
        activation_block  round the input of every linear layer to int8 with a scale per that many elements,
                          as a quantized engine does: an independent measure of that noise
        cache_type        round keys and values as a cache of that type ("f16", "i16", "q8_0") does; None keeps float32
        """
        ids = torch.tensor([list(token_ids)])
        where = torch.arange(ids.shape[1])[None]
        if self.kind == "glm4_mrope":
            where = where.expand(3, 1, -1) if positions is None else torch.from_numpy(positions).long()[:, None]
        hooks = []
        if activation_block is not None:
            layers = [m for m in self.torch_model.modules() if isinstance(m, torch.nn.Linear)]
            hooks = [m.register_forward_pre_hook(_rounding_hook(activation_block)) for m in layers]
        try:
            with torch.no_grad(), rounded_cache(self.torch_model.model, cache_type):
                hidden = self.torch_model.model(input_ids=ids, position_ids=where, use_cache=False).last_hidden_state
                return self.torch_model.lm_head(hidden)[0].numpy()
        finally:
            for hook in hooks:
                hook.remove()

    def greedy(self, prompt: Iterable[int], num_tokens: int) -> list[int]:
        """transformers' greedy continuation, whole prefix recomputed each step."""
        ids = list(prompt)
        start = len(ids)
        for _ in range(num_tokens):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[start:]


def _register_rounded_attention(cache_type: str) -> str:
    """transformers' sdpa attention with keys and values rounded as our cache stores them."""

    def attention(module, query, key, value, mask, **options):  # type: ignore[no-untyped-def]
        key, value = (
            torch.from_numpy(reference.round_kv(x.contiguous().numpy(), cache_type, part))
            for x, part in ((key, "keys"), (value, "values"))
        )
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    name = f"rounded_{cache_type}"
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
    return name


@contextmanager
def rounded_cache(decoder: torch.nn.Module, cache_type: str | None) -> Iterator[None]:
    """Run a transformers decoder with its keys and values rounded to cache_type; None changes nothing."""
    config = decoder.config
    before = config._attn_implementation
    if cache_type is not None:
        config._attn_implementation = _register_rounded_attention(cache_type)
    try:
        yield
    finally:
        config._attn_implementation = before


def _rounding_hook(block: int) -> Callable[[torch.nn.Module, tuple[torch.Tensor]], tuple[torch.Tensor]]:
    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        x = inputs[0]
        pad = -x.shape[-1] % block
        blocks = torch.nn.functional.pad(x, (0, pad)).unflatten(-1, (-1, block))
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        rounded = (torch.round(blocks / scale) * scale).flatten(-2)
        return (rounded[..., : x.shape[-1]],)

    return hook


def _write_metadata(writer: gguf.GGUFWriter, kind: str, shape: Shape, vocabulary: TinyVocabulary) -> None:
    arch = "llama" if kind == "llama" else "glm4"
    writer.add_name(f"Tiny {kind}")
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(shape.head_dim if kind == "llama" else shape.head_dim // 2)
    if kind == "glm4_mrope":
        writer.add_array(f"{arch}.rope.dimension_sections", [*shape.mrope_section, 0])
    if shape.key_length:
        writer.add_key_length(shape.key_length)
        writer.add_value_length(shape.key_length)
    if kind == "llama":
        writer.add_vocab_size(VOCAB_SIZE)
        writer.add_add_bos_token(False)
        writer.add_add_space_prefix(False)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    writer.add_token_merges(vocabulary.merges)
    for key, token_id in vocabulary.keys.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token_id)
    writer.add_chat_template(vocabulary.template)


@dataclass(frozen=True)
class StoredTensor:
    """What goes into the file: f32 vectors as they are, matrices as u8 rows of qtype's blocks."""

    data: np.ndarray
    qtype: QType | None = None


Tensors = dict[str, StoredTensor]


def _store_weights(kind: str, shape: Shape, plan: TypePlan, torch_model: torch.nn.Module) -> Tensors:
    """Quantize every parameter for the file and put what the file then holds back into the torch model."""
    stored: Tensors = {}
    for name, parameter in torch_model.named_parameters():
        target = gguf_name(kind, name)
        values = parameter.detach().numpy().copy()
        order = None
        if ".attn_q." in target or ".attn_k." in target:
            heads = shape.num_attention_heads if ".attn_q." in target else shape.num_key_value_heads
            order = rotary_row_order(kind, shape, heads)
        ordered = values if order is None else values[order]
        if values.ndim == 1:
            stored[target] = StoredTensor(ordered)
            continue
        qtype = plan(target, values.shape[1])
        stored[target] = StoredTensor(quantize(ordered, qtype), qtype)
        back = gguf.quants.dequantize(stored[target].data, qtype).astype(np.float32).reshape(values.shape)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(back if order is None else back[np.argsort(order)]))
    return stored


def write_tiny_model(
    folder: Path,
    kind: str,
    *,
    shape: Shape | None = None,
    plan: TypePlan | None = None,
    label: str = "",
    seed: int = 1,
    untied: bool = False,
    rewrite: Callable[[Tensors, torch.nn.Module, gguf.GGUFWriter], None] | None = None,
) -> TinyModel:
    """Make a checkpoint of one of KINDS, write its GGUF into `folder`, load the dequantized weights back.

    untied   llama only: a head of its own (glm4 always has one)
    rewrite  changes the tensors of the file, and the oracle with them, before they are written
    """
    shape = shape or (TINY_LLAMA if kind == "llama" else TINY)
    vocabulary = tiny_vocabulary("chatml" if kind == "llama" else "glm4")
    torch_model = _torch_model(kind, shape, untied).float().eval()
    _randomise(torch_model, seed)
    path = folder / f"tiny-{kind}{'-' + label if label else ''}.gguf"
    writer = gguf.GGUFWriter(path, "llama" if kind == "llama" else "glm4")
    _write_metadata(writer, kind, shape, vocabulary)
    stored = _store_weights(kind, shape, plan or uniform_plan(QType.F32), torch_model)
    if rewrite is not None:
        with torch.no_grad():
            rewrite(stored, torch_model, writer)
    for name, tensor in stored.items():
        raw_shape = None if tensor.qtype is None else tensor.data.shape
        writer.add_tensor(name, tensor.data, raw_dtype=tensor.qtype, raw_shape=raw_shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(path, kind, shape, vocabulary, torch_model)
