"""Real weights: SmolLM2-135M-Instruct (Q4_1) against transformers on the same dequantized weights.

Perplexity = exp(mean over tokens 1..T-1 of -log p(token | tokens before it)), one window of the first 2,000
tokens of tests/fixtures/english.txt, a text written for this project.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autoglm.chat.tokenizer import Tokenizer
from autoglm.formats.gguf import GGUFFile
from tests.parity.native import NativeModel
from tests.tiny_models import Shape, gguf_name, rotary_row_order

NUM_TOKENS = 2000
TEXT = Path(__file__).parent.parent / "fixtures" / "english.txt"


def dequantized_transformers_model(path: Path) -> LlamaForCausalLM:
    """transformers' llama with the file's weights, read and dequantized by the gguf package."""
    with GGUFFile.open(path) as file:
        get = {key.removeprefix("llama."): value for key, value in file.metadata.items()}
    config = LlamaConfig(
        vocab_size=get["vocab_size"],
        hidden_size=get["embedding_length"],
        intermediate_size=get["feed_forward_length"],
        num_hidden_layers=get["block_count"],
        num_attention_heads=get["attention.head_count"],
        num_key_value_heads=get["attention.head_count_kv"],
        max_position_embeddings=get["context_length"],
        rms_norm_eps=get["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": get["rope.freq_base"]},
        tie_word_embeddings=True,
    )
    shape = Shape(config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").float().eval()
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no parameter of the file
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            target = gguf_name("llama", name)
            tensor = tensors.pop(target)
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(parameter.shape)
            if ".attn_q." in target or ".attn_k." in target:
                heads = config.num_attention_heads if ".attn_q." in target else config.num_key_value_heads
                order = rotary_row_order("llama", shape, heads)
                assert order is not None
                values = values[np.argsort(order)]
            parameter.copy_(torch.from_numpy(np.array(values)))
    assert not tensors, f"unused tensors: {sorted(tensors)[:5]}"
    return model


def negative_log_likelihood(logits: np.ndarray, next_tokens: np.ndarray) -> float:
    """Sum over rows of -log softmax(logits)[next token], in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    log_sum = np.log(np.exp(wide - top[:, None]).sum(axis=1)) + top
    return float((log_sum - wide[np.arange(len(wide)), next_tokens]).sum())


def test_perplexity_within_one_percent(smollm2_path: Path) -> None:
    with GGUFFile.open(smollm2_path) as file:
        tokens = Tokenizer.from_gguf(file).encode(TEXT.read_text(encoding="utf-8"))[:NUM_TOKENS]
    assert len(tokens) == NUM_TOKENS
    native = NativeModel(smollm2_path, max_tokens=250)
    table = np.arange(NUM_TOKENS // 16)
    ours, theirs, same, judged = 0.0, 0.0, 0, 0
    model = dequantized_transformers_model(smollm2_path)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
        for begin in range(0, NUM_TOKENS, 250):
            expected = np.array(tokens[begin + 1 : begin + 251])
            mine = native.step([(tokens[begin : begin + 250], begin, table)])[0][: len(expected)]
            reference = model.lm_head(hidden[begin : begin + len(expected)]).numpy()
            ours += negative_log_likelihood(mine, expected)
            theirs += negative_log_likelihood(reference, expected)
            ranked = np.sort(reference, axis=1)
            sure = ranked[:, -1] - ranked[:, -2] > 1.0
            same += int((mine.argmax(1) == reference.argmax(1))[sure].sum())
            judged += int(sure.sum())
    ours, theirs = (float(np.exp(total / (NUM_TOKENS - 1))) for total in (ours, theirs))
    print(f"perplexity: native {ours:.4f}, transformers {theirs:.4f}, same choice {same} of {judged}")
    assert abs(ours / theirs - 1) < 0.01, f"perplexity: native {ours:.4f}, transformers {theirs:.4f}"
    # A lead of 1.0 is far beyond what int8 activations move a logit.
    assert judged > 500 and same >= 0.995 * judged


def test_greedy_answer_is_sane(smollm2_path: Path) -> None:
    """The file answers a plain question through our tokenizer and template form."""
    with GGUFFile.open(smollm2_path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    answer = tokenizer.decode(NativeModel(smollm2_path).greedy(tokenizer.encode(prompt), 12))
    assert "Paris" in answer


@pytest.mark.parametrize("chunk", [16, 100])
def test_chunks_give_the_same_bits(smollm2_path: Path, chunk: int) -> None:
    tokens = list(range(1000, 1100))
    native = NativeModel(smollm2_path)
    np.testing.assert_array_equal(native.logits(tokens, chunk=chunk)[-1], native.logits(tokens)[-1])
