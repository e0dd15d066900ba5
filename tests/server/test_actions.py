"""response_format autoglm_action and --actions: every reply is an action, whatever the model writes."""

from __future__ import annotations

from typing import Any

import pytest

from autoglm.actions import Back, Tap, Wait, parse_action
from autoglm.server.chat import _ActionStart, _JsonStart
from autoglm.server.settings import ServerSettings
from tests.server.conftest import MODEL_ID, ServedModel, ServeFunction, chat_body, client_of, events_of, joined

ACTION = {"type": "autoglm_action"}
TAP = 'do(action="Tap", element=[512,7])'
DEFAULT = ServerSettings(actions=True)


async def ask(served: ServedModel, **fields: Any) -> dict[str, Any]:
    async with client_of(served) as client:
        response = await client.post("/v1/chat/completions", json=chat_body(**fields))
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


async def refused(served: ServedModel, **fields: Any) -> dict[str, Any]:
    async with client_of(served) as client:
        response = await client.post("/v1/chat/completions", json=chat_body(**fields))
    assert response.status_code == 400
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize(
    "thinking", [{}, {"enable_thinking": False}, {"enable_thinking": True}, {"thinking_budget": 8}], ids=str
)
@pytest.mark.parametrize("where", [{}, {"return_reasoning": False}], ids=str)
async def test_noise_is_an_action_whole_and_streamed(
    serve: ServeFunction, thinking: dict[str, Any], where: dict[str, Any]
) -> None:
    served = serve()
    for seed in range(3):
        fields = {"response_format": ACTION, "seed": seed, "temperature": 1.0, "max_tokens": 120, **thinking, **where}
        reply = await ask(served, **fields)
        async with client_of(served) as client:
            body = chat_body(**{**fields, "stream": True})
            events = events_of((await client.post("/v1/chat/completions", json=body)).text)
        [choice] = reply["choices"]
        content = choice["message"]["content"]
        parse_action(content)
        assert content.startswith(("do(", "finish(")) and joined(events, "content") == content
        assert reply["timings"]["forced_tokens"] > 0 and reply["usage"]["completion_tokens"] <= 120
    served.assert_idle()


async def test_the_thought_and_the_answer_tag_do_not_stand_in_the_content(serve: ServeFunction) -> None:
    served = serve(f"<think>It is at the top.</think>\n<answer>{TAP}</answer>")
    choice = (await ask(served, response_format=ACTION))["choices"][0]
    assert choice["message"]["content"] == TAP and choice["finish_reason"] == "stop"
    assert choice["message"]["reasoning_content"] == "It is at the top."
    free = (await ask(served, response_format={"type": "text"}))["choices"][0]["message"]["content"]
    assert free == f"<think>It is at the top.</think>\n<answer>{TAP}"


async def test_a_tag_inside_a_typed_text_is_text(serve: ServeFunction) -> None:
    typed = 'do(action="Type", text="<think>a</think><answer>")'
    choice = (await ask(serve(typed), response_format=ACTION))["choices"][0]
    assert choice["message"]["content"] == typed and choice["message"]["reasoning_content"] is None


async def test_by_default_for_requests_that_name_no_format(serve: ServeFunction) -> None:
    """The thought stays where the client looks for it; one that names a format or tools gets what it names."""
    served = serve(f"<think>hm</think>\n<answer>{TAP} and more", settings=DEFAULT)
    content = (await ask(served))["choices"][0]["message"]["content"]
    assert content == f"<think>hm</think>\n<answer>{TAP}" and parse_action(content) == Tap(512, 7)
    split = (await ask(served, return_reasoning=True))["choices"][0]["message"]
    assert (split["content"], split["reasoning_content"]) == (TAP, "hm")
    tools = [{"type": "function", "function": {"name": "back"}}]
    for fields in ({"response_format": {"type": "text"}}, {"tools": tools}):
        assert "and more" in (await ask(served, **fields))["choices"][0]["message"]["content"]
    json = (await ask(served, response_format={"type": "json_object"}, max_tokens=20))["choices"][0]["message"]
    assert json["content"].lstrip().startswith("{")
    async with client_of(served) as client:
        plain = await client.post("/v1/completions", json={"model": MODEL_ID, "prompt": "hi", "max_tokens": 5})
    assert plain.status_code == 200


async def test_without_it_answers_are_free(serve: ServeFunction) -> None:
    assert (await ask(serve("hello")))["choices"][0]["message"]["content"] == "hello"


async def test_max_tokens_that_hold_no_action_are_refused_and_the_number_named_is_enough(serve: ServeFunction) -> None:
    served = serve("<think>" + "far too long a thought " * 50)
    error = await refused(served, response_format=ACTION, max_tokens=3)
    assert error["param"] == "max_tokens"
    least = int(error["message"].partition("at least ")[2].split()[0])
    assert (await refused(served, response_format=ACTION, max_completion_tokens=least - 1))["param"] == (
        "max_completion_tokens"
    )
    for thinking in ({}, {"enable_thinking": True}):
        reply = await ask(served, response_format=ACTION, max_tokens=least, **thinking)
        assert isinstance(parse_action(reply["choices"][0]["message"]["content"]), Wait | Back)
        assert reply["usage"]["completion_tokens"] <= least


async def test_a_thought_cut_by_max_tokens_is_followed_by_an_action(serve: ServeFunction) -> None:
    served = serve("<think>" + "far too long a thought " * 50)
    for fields in ({"response_format": ACTION}, {"response_format": ACTION, "return_reasoning": False}):
        reply = await ask(served, max_tokens=150, **fields)
        parse_action(reply["choices"][0]["message"]["content"])
    inline = await ask(serve("<think>" + "far too long " * 50, settings=DEFAULT), max_tokens=150)
    parse_action(inline["choices"][0]["message"]["content"])


async def test_a_prompt_that_leaves_no_room_for_an_action_is_refused(serve: ServeFunction) -> None:
    served = serve(num_blocks=4)  # 64 tokens
    error = await refused(served, content="word " * 8, response_format=ACTION)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "back"}}]}, "tools"),
        ({"stop": ["x"]}, "stop"),
        ({"ignore_eos": True}, "ignore_eos"),
    ],
)
async def test_what_does_not_go_with_an_action_is_named(
    serve: ServeFunction, fields: dict[str, Any], param: str
) -> None:
    assert (await refused(serve(), response_format=ACTION, **fields))["param"] == param
    if param != "tools":
        error = await refused(serve(settings=DEFAULT), **fields)
        assert error["param"] == param and '{"type": "text"}' in error["message"]


async def test_every_choice_of_n_is_an_action(serve: ServeFunction) -> None:
    reply = await ask(serve(), response_format=ACTION, n=4, seed=1, temperature=1.0, max_tokens=100)
    assert len({str(parse_action(choice["message"]["content"])) for choice in reply["choices"]}) > 1


async def test_forced_tokens_are_counted(serve: ServeFunction) -> None:
    served = serve('do(action="Back")')
    reply = await ask(served, response_format=ACTION)
    assert parse_action(reply["choices"][0]["message"]["content"]) == Back()
    async with client_of(served) as client:
        text = (await client.get("/metrics")).text
    [line] = [line for line in text.splitlines() if line.startswith("autoglm_forced_tokens_total")]
    assert float(line.split()[1]) == reply["timings"]["forced_tokens"] > 0


@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
@pytest.mark.parametrize("lead", ["", "\n", "\n<answer>", "<answer>\n", "\n\n<answer>\n"])
@pytest.mark.parametrize("thought", ["", "<think>hm</think>"])
def test_what_stands_before_the_action_is_taken_away(thought: str, lead: str, piece: int) -> None:
    """In whatever pieces it is streamed; the parser of thoughts gets the thought and nothing else."""
    text, first, start = thought + lead + TAP, _JsonStart(starts_in_thought=False), _ActionStart()
    parsed, action = "", ""
    for i in range(0, len(text), piece):
        before, rest = first.split(text[i : i + piece])
        parsed, action = parsed + before, action + start.strip(rest)
    assert (parsed, action, first.flush()) == (thought, TAP, "")
