"""Whether model, mmproj, tokenizer and chat template belong together, found out before anything slow."""

from __future__ import annotations

from pathlib import Path

from autoglm.chat.template import ChatTemplate
from autoglm.chat.tokenizer import Tokenizer
from autoglm.config import ModelConfig
from autoglm.errors import FormatError, RequestError
from autoglm.formats.gguf import GGUFFile
from autoglm.model.projector import check_projector, check_tokens, find_media_tokens, has_audio_encoder


def open_mmproj(path: Path, backbone: ModelConfig) -> GGUFFile:
    """The projector's header, checked against the backbone's. Raises FormatError."""
    gguf = GGUFFile.open(path)
    check_projector(gguf, backbone)
    return gguf


def check_markers(mmproj: GGUFFile, backbone: ModelConfig, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Raises FormatError unless vocabulary and chat template have a place for what the mmproj encodes."""
    tokens = find_media_tokens(tokenizer.token_id)
    check_tokens(mmproj, backbone, tokens)
    needed = [("image", tokens.image)] + ([("audio", tokens.audio)] if has_audio_encoder(mmproj) else [])
    for kind, token in needed:
        parts = [{"type": kind}, {"type": "text", "text": "?"}]
        try:
            num_places = template.render_tokens(tokenizer, [{"role": "user", "content": parts}]).count(token or 0)
        except RequestError:
            num_places = 0
        if num_places != 1:
            raise FormatError(
                f"{mmproj.path}: the chat template of {backbone.name} makes {num_places} places for a part of type "
                f"{kind!r}, expected 1 {tokenizer.token_text(token or 0)}; mend: give one that knows it with "
                "--chat-template-file"
            )
