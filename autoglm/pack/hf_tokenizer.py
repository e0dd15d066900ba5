"""A checkpoint's tokenizer files -> the tokenizer keys of a GGUF, and the proof that both split text alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer

from autoglm.chat.tokenizer import Tokenizer, TokenType
from autoglm.errors import FormatError
from autoglm.formats.gguf import GGUFFile
from autoglm.pack.gguf_writer import MetadataValue
from autoglm.pack.hf_checkpoint import HfCheckpoint, JsonObject

_END_OF_TEXT, _USER = "<|endoftext|>", "<|user|>"
# Contractions, digits in threes, punctuation, blanks before and after line ends, other scripts, special tokens.
_PROBES = (
    "I'VE 12345 tap(x), it's  done…\r\n\r\n  next\tline \n",
    'do(action="Tap", element=[5,999])',
    "打开微信  发送\n\n  ok!!\nnaïve Ω １２３ ½ 😀👩‍👧 한국어 عربي",
    "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>hi<|assistant|>\n<think>a</think><answer>b</answer>",
)


def tokenizer_metadata(checkpoint: HfCheckpoint, vocab_size: int) -> dict[str, MetadataValue]:
    """The tokenizer.* keys, ids without a token named [PADn] and marked unused.

    Raises FormatError if tokenizer.json is missing, no byte-level BPE, or does not fit the vocabulary.
    """
    path = checkpoint.folder / "tokenizer.json"
    whole = checkpoint.json("tokenizer.json")
    if whole is None:
        raise FormatError(f"{path} is missing; fetch the tokenizer files of the checkpoint too")
    model = whole.section("model")
    if model.get("type", str, "") != "BPE" or model.get("byte_fallback", bool, False):
        raise FormatError(f"{path}: the model is no byte-level BPE, which is all a GLM tokenizer can be")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    ids: dict[str, int] = {}

    def put(text: object, token_id: object, kind: TokenType) -> None:
        if not isinstance(text, str) or type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise FormatError(
                f"{path}: token {ascii(text)[:40]} has id {ascii(token_id)[:20]}, expected 0 to {vocab_size - 1}"
            )
        tokens[token_id], types[token_id], ids[text] = text, int(kind), token_id

    for text, token_id in model.get("vocab", dict).items():
        put(text, token_id, TokenType.NORMAL)
    for entry in whole.get("added_tokens", list, []):
        added = JsonObject(entry if isinstance(entry, dict) else {}, f"{path}: an added token")
        kind = TokenType.CONTROL if added.get("special", bool, False) else TokenType.USER_DEFINED
        put(added.get("content", str), added.get("id", int), kind)
    # The two names stand for the same expression; what differs is whether whole words skip the merges.
    pre = "glm4" if model.get("ignore_merges", bool, False) else "chatglm-bpe"
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [_merge(path, merge) for merge in model.get("merges", list)],
        **_special_ids(checkpoint, path, ids),
        **_chat_template(checkpoint),
    }


def _merge(path: Path, merge: object) -> str:
    """Files of tokenizers before 0.20 hold "left right", later ones a pair."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise FormatError(f"{path}: merge {ascii(merge)[:40]} is no pair of tokens")
    return " ".join(pair)


def _special_ids(checkpoint: HfCheckpoint, path: Path, ids: dict[str, int]) -> dict[str, MetadataValue]:
    config = checkpoint.json("tokenizer_config.json") or JsonObject({}, "tokenizer_config.json")
    named = {
        "eos": _token_text(config, "eos_token"),
        "padding": _token_text(config, "pad_token"),
        "eot": _USER,
        "unknown": _END_OF_TEXT,
        "bos": _token_text(config, "bos_token"),
    }
    for text in (_END_OF_TEXT, _USER, *named.values()):
        if text not in ids:
            raise FormatError(f"{path}: token {ascii(text)[:40]} is missing; this is not a GLM-4 tokenizer")
    return {f"tokenizer.ggml.{key}_token_id": ids[text] for key, text in named.items()}


def _token_text(config: JsonObject, key: str) -> str:
    """A special token's text, which some files wrap in an object; <|endoftext|> where none is named."""
    if key not in config:
        return _END_OF_TEXT
    return config.section(key).get("content", str) if config.is_object(key) else config.get(key, str)


def _chat_template(checkpoint: HfCheckpoint) -> dict[str, MetadataValue]:
    """From chat_template.jinja, or the older homes of it; no key where the checkpoint has none."""
    path = checkpoint.folder / "chat_template.jinja"
    if path.is_file():
        try:
            return {"tokenizer.chat_template": path.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError):
            raise FormatError(f"{path}: cannot be read as UTF-8 text; fetch it again") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        config = checkpoint.json(name)
        if config is not None and "chat_template" in config:
            return {"tokenizer.chat_template": config.get("chat_template", str)}
    return {}


def check_tokenizer(checkpoint: HfCheckpoint, gguf: GGUFFile) -> None:
    """Raises FormatError unless the written file and tokenizer.json give the same ids for some telling texts."""
    path = checkpoint.folder / "tokenizer.json"
    ours = Tokenizer.from_gguf(gguf)
    theirs: Any
    try:
        theirs = LibraryTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise FormatError(
            f"{path}: the tokenizers library cannot read it ({type(error).__name__}); fetch it again"
        ) from None
    for probe in _PROBES:
        if ours.encode(probe) != theirs.encode(probe, add_special_tokens=False).ids:
            raise FormatError(
                f"{path} splits text in another way than GLM-4 tokenizers do ({ascii(probe)[:30]}...), "
                "and a GGUF cannot say how; the checkpoint needs a newer autoglm"
            )
