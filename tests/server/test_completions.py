"""/v1/completions: forms of a prompt, echo, log probabilities, streaming."""

from __future__ import annotations

from typing import Any

from tests.server.conftest import ServeFunction, client_of, events_of


async def test_text_and_its_token_ids_give_the_same_answer(serve: ServeFunction) -> None:
    served = serve()
    token_ids = served.tokenizer.encode("the phone")
    async with client_of(served) as client:
        replies = [
            (await client.post("/v1/completions", json={"prompt": prompt, "temperature": 0, "max_tokens": 6})).json()
            for prompt in ("the phone", ["the phone"], token_ids, [token_ids])
        ]
    assert len({reply["choices"][0]["text"] for reply in replies}) == 1
    assert replies[0]["object"] == "text_completion"
    assert replies[0]["usage"] == {
        **replies[1]["usage"],
        "prompt_tokens_details": {
            "cached_tokens": 0,
            "image_tokens": 0,
            "audio_tokens": 0,
        },
    }
    assert replies[0]["choices"][0]["finish_reason"] == "length"


async def test_the_default_is_sixteen_tokens(serve: ServeFunction) -> None:
    async with client_of(serve()) as client:
        reply = (await client.post("/v1/completions", json={"prompt": "a", "ignore_eos": True})).json()
    assert reply["usage"]["completion_tokens"] == 16


async def test_every_prompt_gets_n_choices_in_order(serve: ServeFunction) -> None:
    served = serve()
    async with client_of(served) as client:
        both = (
            await client.post(
                "/v1/completions", json={"prompt": ["the phone", "the user"], "n": 2, "temperature": 0, "max_tokens": 4}
            )
        ).json()
        single = [
            (await client.post("/v1/completions", json={"prompt": text, "temperature": 0, "max_tokens": 4})).json()
            for text in ("the phone", "the user")
        ]
    texts = [choice["text"] for choice in both["choices"]]
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    expected = [reply["choices"][0]["text"] for reply in single]
    assert texts == [expected[0], expected[0], expected[1], expected[1]]
    served.assert_idle()


async def test_echo_and_zero_tokens(serve: ServeFunction) -> None:
    served = serve()
    async with client_of(served) as client:

        async def text_of(**fields: Any) -> tuple[str, str]:
            body = {"prompt": "the phone", "temperature": 0, **fields}
            choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
            streamed = events_of((await client.post("/v1/completions", json={**body, "stream": True})).text)
            joined = "".join(event["choices"][0]["text"] for event in streamed[:-1])
            assert joined == choice["text"]
            assert streamed[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]
            return choice["text"], choice["finish_reason"]

        plain, _ = await text_of(max_tokens=5)
        echoed, _ = await text_of(max_tokens=5, echo=True)
        assert echoed == "the phone" + plain
        assert await text_of(max_tokens=0, echo=True) == ("the phone", "length")
        assert await text_of(max_tokens=0) == ("", "length")


async def test_logprobs_and_offsets(serve: ServeFunction) -> None:
    async with client_of(serve()) as client:
        body = {"prompt": "the phone", "temperature": 0, "max_tokens": 5, "logprobs": 2}
        choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 5
    assert all(len(top) <= 2 for top in logprobs["top_logprobs"])
    assert logprobs["text_offset"] == [sum(map(len, logprobs["tokens"][:i])) for i in range(5)]


async def test_stream_with_usage(serve: ServeFunction) -> None:
    async with client_of(serve()) as client:
        body = {"prompt": ["a", "b"], "max_tokens": 3, "stream": True, "ignore_eos": True}
        body["stream_options"] = {"include_usage": True}
        events = events_of((await client.post("/v1/completions", json=body)).text)
    assert events[-1] == "[DONE]" and events[-2]["usage"]["completion_tokens"] == 6
    assert all(event["usage"] is None for event in events[:-2])


async def test_bad_prompts_are_named(serve: ServeFunction) -> None:
    served = serve(max_context=64)
    async with client_of(served) as client:
        for fields, param in (
            ({"prompt": [served.tokenizer.vocab_size]}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": ["a", []]}, "prompt"),
            ({"prompt": ["a", ""]}, "prompt[1]"),
            ({"prompt": "a b " * 100}, "prompt"),
            ({"prompt": ["a"] * 20, "n": 10}, "n"),
            ({"prompt": "a", "suffix": "b"}, "suffix"),
            ({}, "prompt"),
        ):
            response = await client.post("/v1/completions", json=fields)
            assert response.status_code == 400, fields
            assert response.json()["error"]["param"] == param, response.text
    served.assert_idle()
