"""What a phone agent's next request begins with, as far as it is known when an answer ends.

Open-AutoGLM's client (phone_agent/agent.py and model/client.py, restated) carries out the action of an answer, waits
a second or more, and sends its history again with three changes: the newest user turn has lost its screenshot, the
answer follows as think and answer tags around its parts, and a turn with a new screenshot comes last. All up to that
screenshot can be computed in the meantime.

It is predicted only where no other client is likely: the last turn, and none before it, holds a picture, no tools are
given, and the answer is an action that is not the last one. Clients that keep their pictures find them in the prefix
cache anyway.
"""

from __future__ import annotations

from autoglm.engine.sampling import SamplingParams
from autoglm.engine.sequence import Sequence
from autoglm.errors import RequestError
from autoglm.server.media import is_media
from autoglm.server.prompts import render_chat, template_extra
from autoglm.server.schemas import ChatRequest, Message
from autoglm.server.service import Service
from autoglm.server.thinking import ThinkingSetting

ACTION, LAST_ACTION = "do(action=", "finish(message="


def next_messages(request: ChatRequest, answer: str) -> list[Message] | None:
    """The messages the next request is likely to begin with; the last one stands for the turn with the new screenshot.

    answer  the content the client got
    """
    *earlier, last = request.messages
    if request.tools or last.role != "user" or not _has_media(last) or any(_has_media(message) for message in earlier):
        return None
    thought, action, arguments = answer.partition(ACTION)
    if not action or LAST_ACTION in answer:
        return None
    words = [part for part in last.content if isinstance(part, dict) and part.get("type") == "text"]
    resent = f"<think>{thought.strip()}</think><answer>{action}{arguments}</answer>"
    return [*earlier, Message(role="user", content=words), Message(role="assistant", content=resent), last]


def next_prefix(service: Service, request: ChatRequest, setting: ThinkingSetting, answer: str) -> Sequence | None:
    """The prefix for the engine to build, its last token the placeholder of the new screenshot; None without one.

    Renders and tokenizes: runs on a worker thread.
    """
    messages = next_messages(request, answer)
    if messages is None or service.media is None:
        return None
    try:
        token_ids, _ = render_chat(service, messages, None, setting.enabled, template_extra(request))
    except RequestError:  # grown too long, or a template that refuses it
        return None
    tokens = service.media.multimodal.tokens
    places = [i for i, token_id in enumerate(token_ids) if token_id in (tokens.image, tokens.audio)]
    if not places:
        return None
    salt = (request.cache_salt or "").encode()
    return Sequence(
        "next turn", token_ids[: places[0] + 1], SamplingParams(max_tokens=1), cache_salt=salt, is_prebuild=True
    )


def _has_media(message: Message) -> bool:
    return isinstance(message.content, list) and any(is_media(part) for part in message.content)
