"""The action language: every action comes back from its text, everything else is one clear error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm.errors import FormatError
from autoglm.train.actions import (
    Action,
    Back,
    Finish,
    Home,
    Launch,
    LongPress,
    Swipe,
    Tap,
    Type,
    Wait,
    format_action,
    parse_action,
)

WRITTEN: list[tuple[Action, str]] = [
    (Tap(5, 999), 'do(action="Tap", element=[5,999])'),
    (LongPress(0, 0), 'do(action="Long Press", element=[0,0])'),
    (Swipe(499, 749, 499, 249), 'do(action="Swipe", start=[499,749], end=[499,249])'),
    (Type("晚点见"), 'do(action="Type", text="晚点见")'),
    (Launch("WeChat"), 'do(action="Launch", app="WeChat")'),
    (Back(), 'do(action="Back")'),
    (Home(), 'do(action="Home")'),
    (Wait(2), 'do(action="Wait", duration="2 seconds")'),
    (Finish('Say "hi", \\ then\nstop'), 'finish(message="Say \\"hi\\", \\\\ then\\nstop")'),
]


@pytest.mark.parametrize("action, text", WRITTEN)
def test_actions_are_written_and_read(action: Action, text: str) -> None:
    assert format_action(action) == text
    assert parse_action(text) == action


def test_white_space_between_the_parts_does_not_matter() -> None:
    assert parse_action(' do( action = "Tap" ,element=[ 5 , 9 ] )\n') == Tap(5, 9)
    assert parse_action('do(action="Wait", duration="1 second")') == Wait(1)


@given(st.text(max_size=40))
def test_any_text_can_be_typed(text: str) -> None:
    assert parse_action(format_action(Type(text))) == Type(text)


@given(st.text(max_size=60))
def test_any_answer_is_an_action_or_a_format_error(text: str) -> None:
    for whole in (text, f"do({text})", f'do(action="Tap", {text})'):
        try:
            parse_action(whole)
        except FormatError as error:
            assert len(text) < 12 or text not in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "", "Tap", "do()", "finish()", 'do(action="Fly")', 'do(action="Tap")', 'do(action="Tap", element=[1])',
        'do(action="Tap", element=[1,1000])', 'do(action="Tap", element=[-1,5])', 'do(action="Tap", element=[1,2]',
        'do(action="Tap", element=[1,2], element=[3,4])', 'do(action="Swipe", start=[1,2])', 'do(action="Type")',
        'do(action="Wait", duration="soon")', 'finish(message=[1,2])', 'do(action="Tap" element=[1,2])',
        'do(action="Back") do(action="Home")', 'do(action="Back"); import os', "do(action='Back')",
    ],
)  # fmt: skip
def test_what_is_no_action_is_one_clear_error(text: str) -> None:
    with pytest.raises(FormatError):
        parse_action(text)
