"""The action language: every action comes back from its text, everything else is one clear error."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autoglm
from autoglm.actions import (
    FORMS,
    Action,
    Back,
    CallAPI,
    DoubleTap,
    Finish,
    Home,
    Interact,
    Launch,
    LongPress,
    Note,
    Swipe,
    TakeOver,
    Tap,
    Type,
    Wait,
    format_action,
    parse_action,
)
from autoglm.errors import FormatError

WRITTEN: list[tuple[Action, str]] = [
    (Tap(5, 999), 'do(action="Tap", element=[5,999])'),
    (Tap(5, 999, "Pay 5"), 'do(action="Tap", element=[5,999], message="Pay 5")'),
    (DoubleTap(1, 2), 'do(action="Double Tap", element=[1,2])'),
    (LongPress(0, 0), 'do(action="Long Press", element=[0,0])'),
    (Swipe(499, 749, 499, 249), 'do(action="Swipe", start=[499,749], end=[499,249])'),
    (Type("晚点见"), 'do(action="Type", text="晚点见")'),
    (Launch("WeChat"), 'do(action="Launch", app="WeChat")'),
    (Back(), 'do(action="Back")'),
    (Home(), 'do(action="Home")'),
    (Wait(2), 'do(action="Wait", duration="2 seconds")'),
    (TakeOver("Log in"), 'do(action="Take_over", message="Log in")'),
    (Interact(), 'do(action="Interact")'),
    (Note("True"), 'do(action="Note", message="True")'),
    (CallAPI("sum it up"), 'do(action="Call_API", instruction="sum it up")'),
    (Finish('Say "hi", \\ then\nstop'), 'finish(message="Say \\"hi\\", \\\\ then\\nstop")'),
]
ANY_TEXT = st.text(st.characters(), max_size=40)  # lone surrogates too
COORDINATE = st.integers(0, 999)
ACTIONS = st.one_of(
    st.builds(Tap, COORDINATE, COORDINATE, st.none() | ANY_TEXT),
    *(st.builds(kind, COORDINATE, COORDINATE) for kind in (DoubleTap, LongPress)),
    st.builds(Swipe, COORDINATE, COORDINATE, COORDINATE, COORDINATE),
    *(st.builds(kind, ANY_TEXT) for kind in (Type, Launch, TakeOver, Note, CallAPI, Finish)),
    st.builds(Wait, st.integers(0, 9999)),
    *(st.just(action) for action in (Back(), Home(), Interact())),
)


def read_by_python(text: str) -> dict[str, Any]:
    """The action as Open-AutoGLM's handler reads it: the keywords of one call with literal arguments."""
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
    return {"_metadata": call.func.id, **{str(word.arg): ast.literal_eval(word.value) for word in call.keywords}}


@pytest.mark.parametrize("action, text", WRITTEN)
def test_actions_are_written_and_read(action: Action, text: str) -> None:
    assert format_action(action) == text
    assert parse_action(text) == action


def test_every_form_is_in_the_table_above() -> None:
    assert {form.kind for form in FORMS} == {type(action) for action, _ in WRITTEN}
    names = "Launch Tap Type Type_Name Swipe Back Home Double_Tap Long_Press Wait Take_over Note Call_API Interact"
    expected = {name.replace("_", " ") if name in ("Double_Tap", "Long_Press") else name for name in names.split()}
    assert {form.name for form in FORMS} == expected | {None}


@settings(deadline=None)
@given(ACTIONS)
def test_any_action_comes_back_from_its_text(action: Action) -> None:
    text = format_action(action)
    assert parse_action(text) == action
    assert "\n" not in text and "\r" not in text


@settings(deadline=None)
@given(ACTIONS)
def test_pythons_own_parser_reads_the_same(action: Action) -> None:
    read = read_by_python(format_action(action))
    assert read.pop("_metadata") == ("finish" if isinstance(action, Finish) else "do")
    read.pop("action", None)
    fields: list[Any] = []
    for word, value in read.items():
        fields += value if isinstance(value, list) else [value]
        if word == "duration":
            fields[-1] = int(fields[-1].removesuffix(" seconds"))
    assert type(action)(*fields) == action


def test_type_name_is_type() -> None:
    assert parse_action('do(action="Type_Name", text="李雷")') == Type("李雷")


def test_white_space_between_the_parts_does_not_matter() -> None:
    assert parse_action(' do( action = "Tap" ,element=[ 5 , 9 ] )\n') == Tap(5, 9)
    assert parse_action('do(element=[5,9], action="Tap")') == Tap(5, 9)
    assert parse_action('do(action="Wait", duration="1 second")') == Wait(1)


@pytest.mark.parametrize(
    "text",
    [
        '<think>It says "x".\nTap do(1)</think>\n<answer>{}</answer>', "going on</think>{}", "<answer>\n{}\n</answer>",
        "<think></think><answer>{}", "\n{}</answer>\n", "{}",
    ],
)  # fmt: skip
def test_a_thought_and_answer_tags_are_passed_over(text: str) -> None:
    for action in (Tap(3, 4), Type('</think> do(action="Back")</answer>')):
        assert parse_action(text.format(format_action(action))) == action


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_answer_is_an_action_or_a_format_error(text: str) -> None:
    for whole in (text, f"do({text})", f'do(action="Tap", {text})'):
        try:
            parse_action(whole)
        except FormatError as error:
            assert len(text) < 12 or text not in str(error)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no action"), ("Tap", "no action"), ("do()", "action="), ("finish()", "message="),
        ('do(action="Fly")', "unknown kind"), ('do(action="Tap")', "element="),
        ('do(action="Tap", element=[1])', "name="),
        ('do(action="Tap", element=[1,1000])', "0 to 999"), ('do(action="Tap", element=[-1,5])', "name="),
        ('do(action="Tap", element=[1,05])', "name="), ('do(action="Tap", element=[1,٥])', "name="),
        ('do(action="Tap", element=[1,2]', "no action"), ('do(action="Tap", element="1,2")', "element="),
        ('do(action="Tap", element=[1,2], element=[3,4])', "once"), ('do(action="Swipe", start=[1,2])', "end="),
        ('do(action="Tap", element=[1,2], text="a")', "does not take"), ('do(action="Type")', "text="),
        ('do(action="Wait", duration="soon")', "duration="), ("finish(message=[1,2])", "message="),
        ('do(action="Tap" element=[1,2])', "name="), ('do(action="Back") do(action="Home")', "name="),
        ('do(action="Back"); import os', "no action"), ("do(action='Back')", "name="),
        ('finish(message="a\nb")', "name="), (r'finish(message="\d")', "escape"), ('finish(message="\\\n")', "escape"),
        ("<think>hm", "no action"), ('hm do(action="Back")', "no action"),
    ],
)  # fmt: skip
def test_what_is_no_action_is_one_clear_error(text: str, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        parse_action(text)


@pytest.mark.parametrize("action", [Tap(1000, 0), Swipe(0, 0, -1, 0), Tap(0.5, 1), Wait(10_000), Wait(True), Finish(3)])  # type: ignore[arg-type]
def test_what_cannot_be_written_is_one_clear_error(action: Action) -> None:
    with pytest.raises(FormatError, match="belongs"):
        format_action(action)


def test_the_front_door_has_them() -> None:
    assert autoglm.parse_action(autoglm.format_action(Back())) == Back()
    assert Back in autoglm.Action.__args__  # type: ignore[attr-defined]
