"""/tokenize and /detokenize, in llama-server's form and in vLLM's."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from autoglm.server.body import read_object, validate
from autoglm.server.prompts import render_chat
from autoglm.server.schemas import DetokenizeRequest, TokenizeRequest
from autoglm.server.service import Service


def _tokenize(service: Service, request: TokenizeRequest) -> list[int]:
    if request.messages is not None:
        return render_chat(service, request.messages, request.tools, None, {})[0]
    tokenizer = service.tokenizer
    text = request.content if request.content is not None else request.prompt or ""
    token_ids = tokenizer.encode(text, parse_special=request.parse_special)
    # llama-server adds BOS when asked to, vLLM unless asked not to; both only where the model has one.
    wants_bos = request.add_special if request.content is not None else request.add_special_tokens is not False
    if wants_bos and tokenizer.add_bos and tokenizer.bos_token_id is not None:
        token_ids = [tokenizer.bos_token_id, *token_ids]
    return token_ids


async def tokenize(service: Service, http: Request) -> Response:
    """`content` answers {"tokens"}, `prompt` and `messages` also {"count", "max_model_len", "token_strs"}."""
    request = validate(TokenizeRequest, await read_object(http, service.settings))
    service.check_model(request.model)
    token_ids = await service.prepare(partial(_tokenize, service, request))
    tokens: list[Any] = list(token_ids)
    if request.with_pieces:
        tokens = [{"id": token_id, "piece": service.tokenizer.token_text(token_id)} for token_id in token_ids]
    reply: dict[str, Any] = {"tokens": tokens, "count": len(token_ids), "max_model_len": service.max_context}
    if request.return_token_strs:
        reply["token_strs"] = [service.tokenizer.token_text(token_id) for token_id in token_ids]
    return JSONResponse(reply)


async def detokenize(service: Service, http: Request) -> Response:
    """The text of token ids, under both servers' names for it."""
    request = validate(DetokenizeRequest, await read_object(http, service.settings))
    service.check_model(request.model)
    text = await service.prepare(partial(service.tokenizer.decode, request.tokens, skip_special=False))
    return JSONResponse({"content": text, "prompt": text})
