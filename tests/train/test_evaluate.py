"""Scores: the right reply is right, each kind of wrong reply is wrong; intervals and tables by known numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from autoglm.actions import Finish, LongPress, Tap, format_action, parse_action
from autoglm.errors import FormatError
from autoglm.train.evaluate import (
    COUNTS,
    ROWS,
    Rate,
    count_rows,
    evaluate,
    evaluation_examples,
    from_json,
    markdown_table,
    score,
    split_reply,
    to_json,
)
from autoglm.train.world.labels import LANGUAGES
from autoglm.train.world.tasks import Example, Task

SMALL: dict[Task, int] = {
    "typed_action": 30, "spoken_action": 16, "describe": 10, "which_app": 8, "is_here": 10,
    "transcribe": 8, "identity": 10,
}  # fmt: skip
WIDTH = 240


def reply(example: Example, *, thought: str | None = None, answer: str | None = None) -> str:
    thought = example.thought if thought is None else thought
    return f"<think>{thought}</think>\n<answer>{example.answer if answer is None else answer}</answer>"


@pytest.fixture(scope="module")
def examples() -> dict[Task, list[Example]]:
    return {task: evaluation_examples(task, count, width=WIDTH) for task, count in SMALL.items()}


def test_every_reply_as_taught_is_right_by_every_metric(examples: dict[Task, list[Example]]) -> None:
    for each in examples.values():
        for example in each:
            scores = score(example, reply(example))
            assert scores and set(scores) == set(example.scored) and all(scores.values()), example.answer


@pytest.mark.parametrize("wrong", ["", "<think>", "hello", "<think>a</think>\n<answer>do(</answer>", "<answer>"])
def test_no_reply_or_half_a_reply_is_wrong_by_every_metric(wrong: str, examples: dict[Task, list[Example]]) -> None:
    for each in examples.values():
        for example in each:
            assert not any(score(example, wrong).values())


def test_another_examples_reply_is_wrong(examples: dict[Task, list[Example]]) -> None:
    for task in ("typed_action", "spoken_action", "is_here", "transcribe"):
        each = [e for e in examples[task] if e.language == "en"]
        for one in each:
            for other in each:
                if one.target is None and one.answer != other.answer:
                    scores = score(one, reply(one, answer=other.answer))
                    assert not scores.get("action_exact") and not scores.get("answer_exact")


def touched(examples: dict[Task, list[Example]], kind: type) -> list[Example]:
    found = [
        e for task in ("typed_action", "spoken_action") for e in examples[task]  # type: ignore[index]
        if type(parse_action(e.answer)) is kind
    ]  # fmt: skip
    assert found
    return found


def test_a_tap_counts_anywhere_in_the_box_and_nowhere_else(examples: dict[Task, list[Example]]) -> None:
    for example in touched(examples, Tap):
        assert example.target is not None
        x0, y0, x1, y1 = example.target.box
        for x, y, inside in [
            (x0 + 0.002, y0 + 0.002, True), (x1 - 0.002, y1 - 0.002, True), (x0 - 0.004, (y0 + y1) / 2, False),
            ((x0 + x1) / 2, y1 + 0.004, False),
        ]:  # fmt: skip
            if not (0 <= x < 1 and 0 <= y < 1):
                continue
            scores = score(example, reply(example, answer=format_action(Tap(int(x * 1000), int(y * 1000)))))
            assert scores["tap_in_box"] == scores["action_exact"] == inside
        pressed = parse_action(example.answer)
        assert isinstance(pressed, Tap)
        scores = score(example, reply(example, answer=format_action(LongPress(pressed.x, pressed.y))))
        assert not scores["tap_in_box"] and not scores["action_exact"]


def test_a_transcript_forgives_case_and_signs_but_no_word(examples: dict[Task, list[Example]]) -> None:
    for example in examples["transcribe"]:
        assert example.spoken is not None

        def says(example: Example, words: str) -> bool:
            return score(example, reply(example, answer=format_action(Finish(words))))["transcript_exact"]

        assert says(example, example.spoken.upper() + "。") and says(example, example.spoken + "!")
        assert not says(example, example.spoken + ("吧吧" if example.language == "zh" else " it"))
        assert not says(example, example.spoken[:-1]) and not says(example, "")


def test_a_spoken_instructions_transcript_is_read_from_the_thought(examples: dict[Task, list[Example]]) -> None:
    for example in examples["spoken_action"]:
        last = example.thought.partition("\n")[2]
        assert not score(example, reply(example, thought=last))["transcript_exact"]
        assert score(example, reply(example, thought=last))["action_exact"]


def test_english_words_are_kept_apart_and_chinese_ones_are_not(examples: dict[Task, list[Example]]) -> None:
    zh = next(e for e in examples["transcribe"] if e.language == "zh")
    en = next(e for e in examples["transcribe"] if e.language == "en" and " " in (e.spoken or ""))
    assert zh.spoken and en.spoken
    spaced = format_action(Finish(" ".join(zh.spoken)))
    joined = format_action(Finish(en.spoken.replace(" ", "")))
    assert score(zh, reply(zh, answer=spaced))["transcript_exact"]
    assert not score(en, reply(en, answer=joined))["transcript_exact"]


def change(example: Example, edit: Callable[[str], str]) -> bool:
    action = parse_action(example.answer)
    assert isinstance(action, Finish)
    return score(example, reply(example, answer=format_action(Finish(edit(action.message)))))["answer_exact"]


def test_a_description_has_to_be_true_and_complete(examples: dict[Task, list[Example]]) -> None:
    told = [
        e for e in examples["describe"]
        if e.language == "en" and e.screen and not e.screen.loading and e.answer.count(", ") == 2
    ]  # fmt: skip
    assert told
    for example in told:
        names = example.answer.partition(" with ")[2].rstrip('.")').split(", ")
        assert change(example, lambda text: text)
        listed = ", ".join(names)
        turned = ", ".join(names[::-1])
        assert change(example, lambda text, a=listed, b=turned: text.replace(a, b)), "any order is true"
        doubled = ", ".join([names[0], names[0], names[1]])
        for untrue in (doubled, ", ".join(names[:2]), ", ".join([*names[:2], "Nothing"])):
            assert not change(example, lambda text, a=listed, b=untrue: text.replace(a, b))
        assert not change(example, lambda text: text.replace("This is the ", "This is the other "))


def test_identity_holds_for_plain_words_and_for_a_message(examples: dict[Task, list[Example]]) -> None:
    for example in examples["identity"]:
        assert score(example, reply(example, answer=format_action(Finish(example.answer))))["identity_ok"]
        assert not score(example, reply(example, answer=example.answer.replace("-Nano", "")))["identity_ok"]


def test_the_answer_may_end_with_the_turn_instead_of_its_tag() -> None:
    assert split_reply("<think>a\nb</think>\n<answer>c<|endoftext|>") == ("a\nb", "c")
    assert split_reply("<think>a</think>\n<answer>c") == ("a", "c")


def test_examples_are_the_same_each_time_and_ask_both_languages_alike() -> None:
    first, again = (evaluation_examples("is_here", 6, width=WIDTH) for _ in range(2))
    assert [(e.typed, e.answer) for e in first] == [(e.typed, e.answer) for e in again]
    assert [e.language for e in first] == [*LANGUAGES] * 3
    other = evaluation_examples("is_here", 6, width=WIDTH, seed=1)
    assert [e.answer for e in other] != [e.answer for e in first]


def test_a_blank_screen_shows_nothing_and_keeps_what_was_said() -> None:
    seen, blank = (evaluation_examples("spoken_action", 4, width=WIDTH, blank=blank)[1] for blank in (False, True))
    assert seen.screen is not None and blank.screen is not None
    assert np.ptp(np.asarray(blank.screen.image)) == 0 < np.ptp(np.asarray(seen.screen.image))
    assert blank.spoken == seen.spoken and replace(blank, screen=None) == replace(seen, screen=None)


def test_evaluate_counts_rows_and_tells_its_progress() -> None:
    asked: list[int] = []
    seen: list[tuple[int, int]] = []

    def generate(examples: list[Example]) -> list[str]:
        asked.append(len(examples))
        return [reply(e) if e.language == "en" else "" for e in examples]

    rates = evaluate(generate, counts=SMALL, width=WIDTH, chunk=10, progress=lambda *at: seen.append(at))
    assert set(rates) == {name for name, *_ in ROWS}
    assert rates["identity_en"] == Rate(5, 5) and rates["identity_zh"] == Rate(0, 5)
    assert rates["transcript"] == Rate(12, 24) and rates["questions"].total == 28
    assert max(asked) == 10 and sum(asked) == sum(SMALL.values()) and seen[-1] == (sum(asked), sum(asked))


def test_a_generator_that_loses_a_reply_is_refused() -> None:
    with pytest.raises(ValueError, match="gave 0 replies to 2 examples"):
        evaluate(lambda examples: [], counts={"identity": 2})


def test_the_counts_asked_for_fill_every_row() -> None:
    assert {task for _, _, tasks, *_ in ROWS for task in tasks} == set(COUNTS)


@pytest.mark.parametrize(
    "right, total, low, high", [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (45, 50, 0.7864, 0.9565), (0, 0, 0, 1)]
)
def test_wilson_intervals_equal_published_values(right: int, total: int, low: float, high: float) -> None:
    assert Rate(right, total).interval() == pytest.approx((low, high), abs=5e-5)


def test_no_examples_is_no_share() -> None:
    assert math.isnan(Rate(0, 0).share) and str(Rate(0, 0)) == "–" and count_rows([]) == {}


def test_the_table_has_a_column_for_each_model() -> None:
    table = markdown_table({"teacher": {"typed_tap": Rate(45, 50)}, "student": {"typed_tap": Rate(40, 50)}})
    lines = table.splitlines()
    assert lines[0] == "| measured on the held-out set | asked | teacher | student | examples |"
    assert lines[2] == (
        "| typed instruction: tap inside the box | 90 % | 90.0 % (78.6 to 95.7) | 80.0 % (67.0 to 88.8) | 50 |"
    )
    assert len(lines) == 3 and {line.count("|") for line in lines} == {6}


def test_rates_come_back_from_their_file() -> None:
    rates = {"typed_tap": Rate(45, 50), "identity_zh": Rate(3, 3)}
    assert from_json(to_json(rates)) == rates
    for damaged in ({"typed_tap": {"right": 1}}, {"typed_tap": {"right": 5, "total": 3}}, {"typed_tap": 4}):
        with pytest.raises(FormatError, match="run `autoglm eval` again"):
            from_json(damaged)  # type: ignore[arg-type]
