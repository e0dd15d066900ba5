"""The action grammar walked at random, and cut short: whatever comes of it is an action."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import astuple

from autoglm.actions import FORMS, Action, Slot, Swipe, Tap, Wait, format_action, parse_action
from autoglm.chat.action_grammar import MAX_END_BYTES, MAX_TEXT_CHARS, ActionConstraint, find_end
from autoglm.chat.constraint import GrammarConstraint
from autoglm.chat.grammar import GrammarFactory
from autoglm.chat.tokenizer import Tokenizer
from autoglm.errors import EngineError
from autoglm.formats.gguf import GGUFFile
from tests.test_actions import WRITTEN

TINY_GLM4V = Path(__file__).parent.parent / "fixtures" / "glm4v-tiny" / "main-f32.gguf"


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    with GGUFFile.open(TINY_GLM4V) as file:
        yield Tokenizer.from_gguf(file)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> GrammarFactory:
    return GrammarFactory(tokenizer)


def allowed_ids(constraint: GrammarConstraint) -> list[int]:
    bits = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")
    return [int(i) for i in np.flatnonzero(bits)]


def walk(constraint: ActionConstraint, choose: Callable[[list[int]], int], room: int) -> list[int]:
    """What the engine does, with tokens chosen among the allowed ones."""
    tokens: list[int] = []
    while not constraint.is_stopped():
        left = room - len(tokens)
        assert left > 0, "max_tokens ended the action"
        forced = constraint.forced()
        if not forced or constraint.closing(forced, left):
            token_id = choose(allowed_ids(constraint))
            forced = constraint.closing([token_id], left) or [token_id]
        for token_id in forced:
            constraint.accept(token_id)
        tokens += forced
    assert len(tokens) <= room
    return tokens


def accepts(constraint: GrammarConstraint, tokenizer: Tokenizer, text: str) -> bool:
    """Whether text is a whole answer, token by token under the mask."""
    for token_id in tokenizer.encode(text, parse_special=False):
        if constraint.is_stopped() or token_id not in allowed_ids(constraint):
            return False
        constraint.accept(token_id)
    return constraint.is_stopped()


@pytest.mark.parametrize("lead", ["", "\n", "\n<answer>", "\n\n<answer>\n"])
@pytest.mark.parametrize("action, text", WRITTEN)
def test_every_action_may_be_written(
    grammars: GrammarFactory, tokenizer: Tokenizer, action: Action, text: str, lead: str
) -> None:
    assert accepts(grammars.action(), tokenizer, lead + text)
    assert parse_action(lead + text) == action


@pytest.mark.parametrize(
    "text",
    [
        'do(action="Tap", element=[1,1000])', 'do(action="Tap", element=[1,01])', 'do(action="Tap", element=[1, 2])',
        'do(action="Fly")', 'do(action="Back") ', 'do(action="Back")</answer>', ' do(action="Back")',
        'finish(message="a\nb")', 'finish(message="\\x41")', "do(action='Back')",
        'do(action="Wait", duration="0 seconds")', 'finish(message="a', 'do(action="Back"', "", "hello",
    ],
)  # fmt: skip
def test_nothing_else_may_be_written(grammars: GrammarFactory, tokenizer: Tokenizer, text: str) -> None:
    assert not accepts(grammars.action(), tokenizer, text)


def test_random_walks_of_any_length_end_in_an_action(grammars: GrammarFactory, tokenizer: Tokenizer) -> None:
    """From the least room there is on; Python's own parser reads them too, and no coordinate is made up."""
    kinds, chosen_digits = set(), 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        room = grammars.min_action_tokens() + seed
        tokens = walk(grammars.action(), lambda ids, rng=rng: int(rng.choice(ids)), room)  # type: ignore[misc]
        text = b"".join(map(tokenizer.token_bytes, tokens)).decode()
        action = parse_action(text)
        assert isinstance(ast.parse(text.strip().removeprefix("<answer>").strip(), mode="eval").body, ast.Call)
        kinds.add(type(action))
        chosen_digits += isinstance(action, (Tap, Swipe))
    assert len(kinds) > 8 and chosen_digits > 5


@pytest.mark.parametrize("text", [text for _, text in WRITTEN])
def test_a_model_that_knows_what_it_wants_is_cut_to_what_fits(
    grammars: GrammarFactory, tokenizer: Tokenizer, text: str
) -> None:
    """With room to spare its own action comes; with less, an action that has no coordinate the model did not write."""
    wanted = parse_action(text)
    ids = tokenizer.encode(text, parse_special=False)

    def answer(room: int) -> Action:
        written = 0

        def choose(allowed: list[int]) -> int:
            nonlocal written
            return ids[written] if ids[written] in allowed else allowed[0]

        constraint = grammars.action()
        accept = constraint.accept

        def counting(token_id: int) -> None:
            nonlocal written
            accept(token_id)
            written += 1

        constraint.accept = counting  # type: ignore[method-assign]
        return parse_action(tokenizer.decode(walk(constraint, choose, room)))

    least = grammars.min_action_tokens()
    assert answer(MAX_END_BYTES + len(ids)) == wanted
    for room in range(least, least + len(ids)):
        got = answer(room)
        points = [value for value in astuple(got) if isinstance(value, int)]
        wanted_points = [value for value in astuple(wanted) if isinstance(value, int)]
        assert points == wanted_points or got == Wait(1) or not points


def test_forced_tokens_are_those_the_mask_leaves(grammars: GrammarFactory, tokenizer: Tokenizer) -> None:
    """One by one under the mask, or at once: the same tokens, and they are the tokenizer's own."""
    num_forced = 0
    for _, text in WRITTEN:
        constraint = grammars.action()
        ids = tokenizer.encode(text, parse_special=False)
        place = 0
        while not constraint.is_stopped():
            forced = list(constraint.forced()) or [ids[place]]
            assert forced == ids[place : place + len(forced)]
            if len(forced) > 1 or constraint.forced():
                num_forced += len(forced)
                for token_id in forced:
                    assert allowed_ids(constraint) == [token_id]
                    constraint.accept(token_id)
            else:
                constraint.accept(forced[0])
            place += len(forced)
    total = sum(len(tokenizer.encode(text, parse_special=False)) for _, text in WRITTEN)
    assert num_forced > total / 2


def test_a_json_schema_forces_tokens_too(grammars: GrammarFactory, tokenizer: Tokenizer) -> None:
    constraint = grammars.json_schema({"const": "stop here"})
    assert tokenizer.decode(list(constraint.forced())).startswith('"stop')
    assert constraint.closing([1, 2, 3], 1) == ()


def test_text_cannot_go_on_for_ever(grammars: GrammarFactory, tokenizer: Tokenizer) -> None:
    constraint = grammars.action()
    [letter] = tokenizer.encode("x", parse_special=False)
    for token_id in tokenizer.encode('finish(message="', parse_special=False):
        constraint.accept(token_id)
    for _ in range(MAX_TEXT_CHARS):
        constraint.accept(letter)
    assert tokenizer.decode(list(constraint.forced()))[0] == '"'
    with pytest.raises(EngineError):
        constraint.accept(letter)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name or "finish")
def test_every_beginning_has_an_end(form: object) -> None:
    """The end of each beginning of each form, texts with an escape and a half character in them."""
    filled = {Slot.NUMBER: "120", Slot.SECONDS: "10", Slot.TEXT: 'a\\"你'}
    text = "\n<answer>" + "".join(part if isinstance(part, str) else filled[part] for part in form.parts())  # type: ignore[attr-defined]
    for size in range(len(text) + 1):
        end = find_end(text[:size])
        assert isinstance(parse_action(text[:size] + end.text), object) and len(end.text.encode()) <= MAX_END_BYTES
        assert not end.owes_coordinates or "=[" in text + end.text
    assert find_end(text) == ("", False)
    assert find_end("").text == format_action(Wait(1))
