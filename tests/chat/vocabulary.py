"""Small trained byte-level vocabularies, written as GGUF and kept as transformers tokenizers to compare with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import gguf
from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "the quick brown fox taps the button, then the user types 'hello' and it's done; they'll wait. "
    'do(action="Tap", element=[512,999]) finish(message="done") I\'VE 12345 tap(x) 打开微信 发送 你好 世界 😀😀 '
    "line one\n\nline two\n  indented\n\ttab 1234 56 it's we're I'll\r\nend. <think>no</think>"
)
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Written out here again, apart from the product's table, as the published tokenizer.json files have them.
SPLITTERS: dict[str, PreTokenizer] = {
    "glm4": Sequence([Split(Regex(CL100K), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]),
    "chatglm-bpe": Sequence([Split(Regex(CL100K), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]),
    "llama-bpe": Sequence([Split(Regex(CL100K), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]),
    "qwen2": Sequence(
        [
            Split(Regex(CL100K.replace("{1,3}", "")), "isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]),
    "gpt-2": ByteLevel(add_prefix_space=False, use_regex=True),
}
GLM4_CONTROL = (
    "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> "
    "<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> <|image|> <|video|>"
).split()
GLM4_TAGS = ["<think>", "</think>", "<answer>"]
CHATML_CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF's tokenizer keys hold; hf is the same tokenizer for transformers."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    hf: PreTrainedTokenizerFast

    def write(self, path: Path, **changes: object) -> Path:
        """A GGUF without tensors; changes replace or (None) leave out a tokenizer.ggml key, or add any full key."""
        writer = gguf.GGUFWriter(path, "glm4")
        keys: dict[str, object] = {
            "model": "gpt2",
            "pre": self.pre,
            "tokens": self.tokens,
            "token_type": self.types,
            "merges": self.merges,
        } | changes
        for name, value in keys.items():
            key = name if "." in name else f"tokenizer.ggml.{name}"
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path


def train(pre: str, control: list[str], user_defined: list[str], *, num_padding: int = 5) -> Vocabulary:
    """A vocabulary trained on CORPUS, with special tokens after it and [PADn] entries at the end."""
    library = LibraryTokenizer(BPE(ignore_merges=pre in ("glm4", "llama-bpe")))
    library.pre_tokenizer = SPLITTERS[pre]
    library.train_from_iterator(
        [CORPUS] * 3,
        BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False, min_frequency=1),
    )
    library.add_tokens([AddedToken(text, special=False, normalized=False) for text in user_defined])
    library.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    model = json.loads(library.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    ids = library.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=lambda token: ids[token])
    types = [3 if token in control else 4 if token in user_defined else 1 for token in tokens]
    padding = [f"[PAD{len(tokens) + i}]" for i in range(num_padding)]
    hf = PreTrainedTokenizerFast(tokenizer_object=library, clean_up_tokenization_spaces=False)
    return Vocabulary(pre, tokens + padding, types + [5] * num_padding, merges, hf)
