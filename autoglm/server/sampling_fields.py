"""Request fields -> SamplingParams: defaults, aliases and the checks that need the vocabulary."""

from __future__ import annotations

from typing import Any

from autoglm.engine.sampling import SamplingParams
from autoglm.errors import RequestError
from autoglm.server.schemas import SamplingFields
from autoglm.server.service import Service

# Fields that keep SamplingParams' default when absent or null.
_PLAIN_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
)


def sampling_params(
    service: Service,
    request: SamplingFields,
    *,
    index: int,
    max_tokens: int | None,
    logprobs: int | None,
    banned: frozenset[int] = frozenset(),
) -> SamplingParams:
    """How choice `index` is sampled; with a seed, each choice has one of its own that follows from it.

    Raises RequestError naming the field.
    """
    chosen: dict[str, Any] = {name: value for name in _PLAIN_FIELDS if (value := getattr(request, name)) is not None}
    if request.repeat_penalty is not None:
        chosen["repetition_penalty"] = request.repeat_penalty
    vocab_size = service.tokenizer.vocab_size
    for name, ids in (("logit_bias", request.logit_bias), ("stop_token_ids", request.stop_token_ids or ())):
        if any(token_id >= vocab_size for token_id in ids):
            raise RequestError(
                f"{name}: names a token id of {vocab_size} or more, which is not in the vocabulary", param=name
            )
    seed = request.seed
    if seed is not None and index:
        seed = (seed + index) % (1 << 63)
    return SamplingParams(
        max_tokens=max_tokens,
        logit_bias=request.logit_bias,
        seed=seed,
        logprobs=logprobs,
        stop=tuple(request.stop),
        stop_token_ids=frozenset(request.stop_token_ids or ()),
        banned_token_ids=banned,
        **chosen,
    )
