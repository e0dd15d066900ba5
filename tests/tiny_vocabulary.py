"""Tiny byte-level BPE vocabularies with the GLM-4 and ChatML special tokens, and a chat template for each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import regex

VOCAB_SIZE = 384
GLM4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GLM4_SPECIALS = (
    "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> "
    "<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> <|image|> <|video|> "
    "<think> </think> <answer> </answer>"
).split()
GLM4_USER_DEFINED = {"<think>", "</think>", "<answer>"}
CHATML_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = (
    "the phone shows the screen and the user taps the button then the phone opens the settings page "
    "what is on the screen? tap the back button, then type the text in the search box and wait. "
    'do(action="Tap", element=[512,999]) do(action="Type", text="hello") finish(message="done") '
    "你是谁?打开微信,点击搜索按钮,输入文字,然后返回桌面。打开设置,打开微信。"
)


@dataclass(frozen=True)
class TinyVocabulary:
    tokens: list[str]
    token_types: list[int]  # 1 normal, 3 control, 4 user-defined, 5 unused
    merges: list[str]
    pre: str
    keys: dict[str, int]  # tokenizer.ggml.<key>_token_id
    template: str


def byte_symbols() -> list[str]:
    """The GPT-2 table: one printable character for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def train_merges(text: str, num_merges: int) -> list[str]:
    """Plain byte-pair training, most frequent pair first, ties by text, so that every run gives the same."""
    symbols = byte_symbols()
    words = [[symbols[b] for b in piece.encode()] for piece in regex.findall(GLM4_SPLIT, text)]
    merges = []
    for _ in range(num_merges):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(f"{left} {right}")
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1
    return merges


@lru_cache(maxsize=2)
def tiny_vocabulary(chat: str) -> TinyVocabulary:
    """chat "glm4": bytes, merges, then the GLM-4 specials, as that family orders them; "chatml": specials first."""
    merges = train_merges(CORPUS, 64)
    plain = [*byte_symbols(), *(merge.replace(" ", "") for merge in merges)]
    if chat == "glm4":
        tokens = plain + GLM4_SPECIALS
        types = [1] * len(plain) + [4 if token in GLM4_USER_DEFINED else 3 for token in GLM4_SPECIALS]
        keys = {"eos": "<|endoftext|>", "eot": "<|user|>", "unknown": "<|endoftext|>", "padding": "<|endoftext|>"}
        pre, template = "glm4", GLM4_TEMPLATE
    else:
        tokens = CHATML_SPECIALS + plain
        types = [3] * len(CHATML_SPECIALS) + [1] * len(plain)
        keys = {"bos": "<|im_start|>", "eos": "<|im_end|>", "unknown": "<|endoftext|>", "padding": "<|im_end|>"}
        pre, template = "smollm", CHATML_TEMPLATE
    padding = [f"[PAD{i}]" for i in range(len(tokens), VOCAB_SIZE)]
    ids = {key: tokens.index(token) for key, token in keys.items()}
    return TinyVocabulary(tokens + padding, types + [5] * len(padding), merges, pre, ids, template)


GLM4_TEMPLATE = """[gMASK]<sop>
{%- if tools %}
<|system|>
You may call these functions, one JSON object a call:
{%- for tool in tools %}

{{ tool | tojson }}
{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
<|system|>
{{ message.content }}
    {%- elif message.role == 'user' %}
<|user|>{{ '\\n' }}
        {%- if message.content is string %}
{{ message.content }}
        {%- else %}
            {%- for item in message.content %}
                {%- if item.type == 'image' or 'image' in item %}
<|begin_of_image|><|image|><|end_of_image|>
                {%- elif item.type == 'text' %}
{{ item.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
    {%- elif message.role == 'assistant' %}
<|assistant|>
{{ message.content }}
    {%- elif message.role == 'tool' %}
<|observation|>
{{ message.content }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""

CHATML_TEMPLATE = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou answer briefly.<|im_end|>\\n' }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}"""
