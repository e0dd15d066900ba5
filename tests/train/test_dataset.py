"""Batches: the same for the same number, tokens and targets in step, positions and patch targets by the book."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoglm.actions import Tap, parse_action
from autoglm.errors import ConfigError
from autoglm.train.dataset import (
    CLEAN_SNR,
    PATCH_SHARE,
    SNR_RANGE,
    Batch,
    BatchKind,
    BatchMaker,
    Sizes,
    alphabet,
    patch_targets,
    stream,
)
from autoglm.train.model import AutoGLMPhone, preset
from autoglm.train.model.audio import token_count
from autoglm.train.rows import NO_TARGET, Media, Row, RowEncoder, collate_rows
from autoglm.train.tokenizer import load_tokenizer
from autoglm.train.world.canvas import Box, Element
from autoglm.train.world.labels import LANGUAGES, VISIBLE, VISIBLE_CLASS, Label, Language
from autoglm.train.world.screens import draw_screen
from autoglm.train.world.split import Split, rng_for
from autoglm.train.world.tasks import Example, Task, centre, examples_for_screen, speech_only, text_only

TOKENIZER = load_tokenizer()
SMALL = Sizes(soups=1, screens=1, questions=3, spoken_screens=1, spoken_questions=2, sounds=2, words=3)
KINDS: tuple[BatchKind, ...] = ("soup", "screens", "names", "sounds", "typed", "spoken", "heard", "words")


def make_maker(split: Split = "train", **options: Any) -> BatchMaker:
    return BatchMaker(preset("smoke"), TOKENIZER, KINDS, split=split, sizes=SMALL, **options)


def tensors(batch: Batch) -> dict[str, Tensor]:
    named = {**vars(batch.inputs), **{f.name: getattr(batch, f.name) for f in fields(batch)}}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def same(one: Batch, other: Batch) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a)


# --- the stream ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hum")
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_made_from_its_number_alone(kind: BatchKind) -> None:
    maker, other = make_maker(), make_maker()
    other.make_batch(kind, 3)
    first = maker.make_batch(kind, 4)
    assert same(first, other.make_batch(kind, 4)) and first.kind == kind
    assert not same(first, maker.make_batch(kind, 5))
    assert not same(first, make_maker("test").make_batch(kind, 4))
    assert not same(first, make_maker(seed=1).make_batch(kind, 4))


def test_ranks_share_the_steps_and_resuming_goes_on() -> None:
    maker = replace_kinds(make_maker(), ("words",))
    whole = [maker[i][0] for i in range(6)]
    for rank in range(2):
        batches = stream(maker, 1, rank=rank, world=2, workers=0)
        found = [next(batches)[0] for _ in range(2)]
        assert same(found[0], whole[2 + rank]) and same(found[1], whole[4 + rank])


def replace_kinds(maker: BatchMaker, kinds: tuple[BatchKind, ...]) -> BatchMaker:
    maker.kinds = kinds
    return maker


def test_a_signal_to_the_whole_group_leaves_the_workers_working() -> None:
    """Ctrl-C in a terminal reaches them as well as the trainer, which still has a step to finish and to save."""
    maker = replace_kinds(make_maker(), ("words",))
    steps = stream(maker, 0, workers=1)
    next(steps)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    for _ in range(8):  # more than are made ahead
        next(steps)
    assert worker.is_alive()
    steps.close()  # type: ignore[attr-defined]


def test_no_seed_is_of_both_splits() -> None:
    for key in range(20):
        train, test = (rng_for(split, "batch", key).integers(1 << 40, size=2) for split in ("train", "test"))
        assert not np.array_equal(train, test)


# --- rows ----------------------------------------------------------------------------------------------------


def example(**changes: Any) -> Example:
    values: dict[str, Any] = {
        "task": "typed_action", "language": "en", "screen": None, "typed": "Open WeChat at 17:20", "spoken": None,
        "thought": "Tap 7", "answer": 'do(action="Tap", element=[120,987])', "target": None, "scored": (),
    }  # fmt: skip
    return Example(**{**values, **changes})


def make_row(media: Media = Media(), *, with_answer: bool = True, **changes: Any) -> Row:  # noqa: B008  # frozen
    return RowEncoder(TOKENIZER).row(example(**changes), media, with_answer=with_answer)


@pytest.mark.parametrize("media", [Media(), Media((2, 3)), Media(sound=4), Media((3, 2), 5)])
def test_rows_are_the_chat_template(media: Media) -> None:
    images = media.grid[0] * media.grid[1] if media.grid else 0
    prompt = TOKENIZER.prompt("Open WeChat at 17:20", num_image_tokens=images, num_audio_tokens=media.sound)
    reply = TOKENIZER.reply("Tap 7", 'do(action="Tap", element=[120,987])')
    row = make_row(media)
    assert row.tokens == prompt + reply and row.answer_start == len(prompt)
    assert make_row(media, with_answer=False).tokens == prompt
    names = {0: None, 1: TOKENIZER.id("<|image|>"), 2: TOKENIZER.id("<|audio|>")}
    for token, kind in zip(row.tokens, row.media, strict=True):
        assert kind == next((k for k, name in names.items() if name == token), 0)
    # The user turn reaches from behind `<|user|>` and its newline to `<|assistant|>`.
    inside = [token for token, turn in zip(row.tokens, row.turn, strict=True) if turn]
    start = 3 + len(TOKENIZER.encode("\n"))
    assert inside == row.tokens[start : row.tokens.index(TOKENIZER.id("<|assistant|>"))]
    words = [token for token, word in zip(row.tokens, row.words, strict=True) if word]
    assert TOKENIZER.decode(words) == "Open WeChat at 17:20"


def test_positions_count_a_picture_by_its_longer_side() -> None:
    """formats.md 2.5: (t, h, w) = (p, p + y, p + x), then p moves on by the larger of rows and columns."""
    for rows, columns in ((2, 5), (4, 3), (1, 1)):
        row, sound = make_row(Media((rows, columns), 6)), 0
        wanted, p, inside = [], 0, 0
        for kind in row.media:
            if kind == 1:
                y, x = divmod(inside, columns)
                wanted.append((p, p + y, p + x))
                inside += 1
                p += max(rows, columns) if inside == rows * columns else 0
            else:
                wanted.append((p, p, p))
                p += 1
                sound += kind == 2
        assert sound == 6 and inside == rows * columns
        assert [tuple(column) for column in row.positions.T.tolist()] == wanted


def test_marked_coordinates_are_the_numbers_of_the_element_alone() -> None:
    row = make_row()
    marked = [token for token, mark in zip(row.tokens, row.coordinate, strict=True) if mark]
    assert TOKENIZER.decode(marked) == "120987" and len(marked) == 2
    for answer in ('finish(message="do 5 = [3]")', 'do(action="Type", text="12 apples")', "I can count to 10"):
        assert not any(make_row(answer=answer).coordinate), answer


def test_targets_are_the_next_tokens_of_the_reply() -> None:
    rows = [make_row(Media((2, 2))), make_row(typed="Hi"), make_row(thought="a longer thought, with words", typed="")]
    inputs, targets, coordinates = collate_rows(rows, TOKENIZER.id("<|endoftext|>"))
    assert inputs.tokens.shape == targets.shape == coordinates.shape == (3, max(len(row.tokens) for row in rows))
    for index, row in enumerate(rows):
        size = len(row.tokens)
        assert inputs.valid[index].tolist() == [i < size for i in range(inputs.tokens.shape[1])]
        wanted = {i - 1: row.tokens[i] for i in range(row.answer_start, size)}
        found = {i: int(t) for i, t in enumerate(targets[index]) if t != NO_TARGET}
        assert found == wanted and found[size - 2] == TOKENIZER.id("<|endoftext|>")
        numbers = targets[index][coordinates[index]]
        assert TOKENIZER.decode(numbers.tolist()) == "120987"


def test_prompts_are_padded_on_the_left() -> None:
    rows = [make_row(Media((2, 2), 3), with_answer=False), make_row(typed="Hi", with_answer=False)]
    inputs, targets, _ = collate_rows(rows, TOKENIZER.id("<|endoftext|>"), left=True)
    assert bool((targets == NO_TARGET).all())
    for index, row in enumerate(rows):
        gap = inputs.tokens.shape[1] - len(row.tokens)
        assert inputs.valid[index].tolist() == [False] * gap + [True] * len(row.tokens)
        assert inputs.tokens[index, gap:].tolist() == row.tokens
        assert inputs.media[index, gap:].tolist() == row.media and inputs.turn[index, gap:].tolist() == row.turn
        assert np.array_equal(inputs.positions[:, index, gap:].numpy(), row.positions)
        assert inputs.words[index].tolist() == [False] * gap + row.words
        assert not inputs.media[index, :gap].any() and not inputs.turn[index, :gap].any()


# --- what patches show ---------------------------------------------------------------------------------------

FINE = 17  # parts of a patch's side; 17 * 17 * 0.12 is no whole number, so nothing lies on the threshold


def targets_by_hand(
    elements: list[Element], rows: int, columns: int, aspect: float
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Every fine part counted one by one: class, offset, and which patches are a tie between two inks."""
    best = np.zeros((rows, columns), dtype=int)
    found, ties, offset = np.zeros_like(best), np.zeros_like(best, dtype=bool), np.zeros((rows, columns, 2))
    for element in elements:
        left, top, right, bottom = (
            round(edge * parts * FINE) for edge, parts in zip(element.ink, (columns, rows) * 2, strict=True)
        )
        covered = np.zeros((rows * FINE, columns * FINE), dtype=int)
        for y in range(max(top, 0), bottom):
            for x in range(max(left, 0), right):
                covered[y, x] = 1
        number = VISIBLE_CLASS.get((element.label.kind, element.label.key))
        for r in range(rows):
            for c in range(columns):
                area = int(covered[r * FINE : (r + 1) * FINE, c * FINE : (c + 1) * FINE].sum())
                if number is None or area < PATCH_SHARE * FINE * FINE:
                    continue
                ties[r, c] = (ties[r, c] and area <= best[r, c]) or area == best[r, c]
                if area > best[r, c]:
                    best[r, c], found[r, c] = area, number
                    x = (left + right) / 2 / (columns * FINE) - (c + 0.5) / columns
                    y = (top + bottom) / 2 / (rows * FINE) - (r + 0.5) / rows
                    offset[r, c] = x, y * aspect
    return found, offset, ties


def boxed(label: Label, ink: Box) -> Element:
    return Element(label, "row", ink, ink, True)


def test_patch_targets_are_what_a_count_of_pixels_says() -> None:
    rng = np.random.default_rng(0)
    unnamed = Label("nothing", "page", "无", "nothing")
    compared = 0
    for rows, columns in ((4, 3), (3, 6)):
        for _ in range(6):
            elements = []
            for number in range(6):
                x, y = rng.integers(-5, (columns - 1) * FINE), rng.integers(-5, (rows - 1) * FINE)
                w, h = rng.integers(3, 3 * FINE), rng.integers(3, 2 * FINE)
                ink = x / columns / FINE, y / rows / FINE, (x + w) / columns / FINE, (y + h) / rows / FINE
                ink = (*ink[:2], min(ink[2], 1.0), min(ink[3], 1.0))
                label = unnamed if number == 5 else VISIBLE[int(rng.integers(len(VISIBLE)))]
                elements.append(boxed(label, tuple(float(edge) for edge in ink)))  # type: ignore[arg-type]
            found, offset, place = patch_targets(elements, rows, columns, 2.0)
            taps = {VISIBLE_CLASS.get((one.label.kind, one.label.key)): centre(one) for one in reversed(elements)}
            classes, offsets, ties = targets_by_hand(elements, rows, columns, 2.0)
            sure = ~ties.reshape(-1)
            assert np.array_equal(found[sure], classes.reshape(-1)[sure])
            np.testing.assert_allclose(offset[sure], offsets.reshape(-1, 2)[sure], atol=1e-6)
            assert all(
                tuple(at) == (taps[number] if number else (0, 0))
                for number, at in zip(found.tolist(), place.tolist(), strict=True)
            )
            compared += int((found[sure] > 0).sum())
    assert compared > 40


def test_a_screen_of_nothing_named_is_all_background() -> None:
    found, offset, place = patch_targets([], 3, 2, 2.0)
    assert found.tolist() == [0] * 6 and not offset.any() and not place.any()


# --- whole batches -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hum")
def test_batches_fit_the_model_and_their_own_media() -> None:
    config, maker = preset("smoke"), make_maker()
    torch.manual_seed(0)
    model = AutoGLMPhone(config).eval()
    for kind in ("typed", "spoken", "heard", "words"):
        batch = maker.make_batch(kind, 0)  # type: ignore[arg-type]
        inputs = batch.inputs
        assert (inputs.images is not None) == (kind in ("typed", "spoken"))
        assert (inputs.mel is not None) == (kind in ("spoken", "heard"))
        for row in range(len(inputs.tokens)):
            if inputs.images is not None and inputs.image_of is not None and inputs.image_of[row] >= 0:
                height, width = inputs.images.shape[2:]
                assert int((inputs.media[row] == 1).sum()) == (height // 32) * (width // 32)
            if inputs.frames is not None and inputs.sound_of is not None and inputs.sound_of[row] >= 0:
                frames = inputs.frames[inputs.sound_of[row]]
                assert int((inputs.media[row] == 2).sum()) == int(token_count(frames))
        with torch.no_grad():
            logits = model(inputs)
        assert logits.shape == (*inputs.tokens.shape, config.text.vocab_size) and bool(logits.isfinite().all())


@pytest.mark.usefixtures("hum")
def test_sounds_are_spelled_and_their_noise_is_known() -> None:
    known = alphabet()
    letters = {number: letter for letter, number in known.items()}
    assert 0 not in letters and len(letters) == len(known)
    maker = make_maker()
    examples = [speech_only(rng_for("train", "spelled", n), "train") for n in range(3)]
    batch = maker.batch("heard", examples, rng_for("train", "noise"))
    assert batch.characters is not None and batch.character_counts is not None
    assert batch.inputs.mel is not None and batch.inputs.frames is not None
    for row, one in enumerate(examples):
        count = int(batch.character_counts[row])
        spelled = "".join(letters[int(code)] for code in batch.characters[row, :count])
        assert one.spoken is not None and spelled == "".join(c for c in one.spoken.lower() if c in known)
        assert len(spelled) >= 0.9 * len(one.spoken), "hardly anything said has no letter"
        assert not batch.characters[row, count:].any()
        assert not batch.inputs.mel[row, int(batch.inputs.frames[row]) :].any()
    for split in ("train", "test"):
        low, high = SNR_RANGE[split]  # type: ignore[index]
        rng = rng_for("train", "snr", split)
        drawn = [make_maker(split).sound("hi", "en", rng)[1] for _ in range(12)]  # type: ignore[arg-type]
        assert all(snr == CLEAN_SNR or low <= snr <= high for snr in drawn) and len(set(drawn)) > 3
    asked = make_maker(snr=3.0)
    assert {asked.sound("hi", "en", rng_for("train", n))[1] for n in range(4)} == {3.0}


def test_pointed_tokens_show_what_is_sought() -> None:
    maker, begin = make_maker(), TOKENIZER.id("<|begin_of_image|>")
    screen = draw_screen(3, "train", width=448)
    mix: dict[Task, float] = {"typed_action": 0.7, "is_here": 0.3}
    drawn = examples_for_screen(screen, rng_for("train", "pointed"), "train", 60, mix=mix)
    batch = maker.batch("typed", drawn, rng_for("train", "x"))
    assert batch.pointed is not None and batch.looking is not None and batch.inputs.images is not None
    rows, columns = (side // 32 for side in batch.inputs.images.shape[2:])
    for row, one in enumerate(drawn):
        pointed = batch.pointed[row] == 1
        cells = pointed[batch.inputs.media[row] == 1].view(rows, columns)
        others = batch.inputs.tokens[row][pointed & (batch.inputs.media[row] != 1)].tolist()
        assert others == ([begin] if one.sought == () else []), "the picture's beginning where nothing shows it"
        assert bool(cells.any()) == bool(one.sought)
        assert int(batch.looking[row].sum()) == (one.sought is not None) + int(batch.coordinates[row].sum())
        assert one.target is None or one.sought == (one.target,)
        for y, x in cells.nonzero().tolist():
            assert any(
                left * columns < x + 1 and right * columns > x and top * rows < y + 1 and bottom * rows > y
                for left, top, right, bottom in (element.ink for element in one.sought or ())
            )
    assert {one.sought and len(one.sought) for one in drawn} >= {None, (), 1}


@pytest.mark.usefixtures("hum")
def test_the_decision_is_the_first_token_of_the_thoughts_last_line() -> None:
    maker = make_maker()
    for number, task in enumerate(("typed_action", "spoken_action", "is_here")):
        screen = draw_screen(4 + number, "train", width=448)
        drawn = examples_for_screen(screen, rng_for("train", "decision"), "train", 20, mix={task: 1.0})
        batch = maker.batch("spoken" if task == "spoken_action" else "typed", drawn, rng_for("train", "x"))
        assert batch.looking is not None
        for row, one in enumerate(drawn):
            at = batch.looking[row].nonzero().flatten().tolist()
            if one.sought is not None:
                rest = TOKENIZER.decode([int(t) for t in batch.targets[row, at[0] :] if t >= 0])
                assert rest.startswith(one.thought.rpartition("\n")[2] + "</think>")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_description_looks_at_each_thing_before_it_names_it(language: Language) -> None:
    maker, listing = make_maker(), 0
    for seed in range(6):
        screen = draw_screen(seed, "train", width=448, language=language)
        drawn = examples_for_screen(screen, rng_for("train", "describe"), "train", 2, mix={"describe": 1.0})
        batch = maker.batch("typed", drawn, rng_for("train", "x"))
        assert batch.pointed is not None and batch.looking is not None and batch.inputs.images is not None
        rows, columns = (side // 32 for side in batch.inputs.images.shape[2:])
        for row, one in enumerate(drawn):
            looks = batch.looking[row].nonzero().flatten().tolist()
            assert batch.looking[row, looks].tolist() == [1 << index for index in range(len(one.listed))]
            for index, (at, elements) in enumerate(zip(looks, one.listed, strict=True)):
                rest = TOKENIZER.decode([int(t) for t in batch.targets[row, at:] if t >= 0]).strip()
                assert rest.startswith(elements[0].label.text(language))
                picture = batch.pointed[row][batch.inputs.media[row] == 1].view(rows, columns)
                cells = ((picture & (1 << index)) > 0).nonzero().tolist()
                assert cells and all(
                    any(
                        left * columns < x + 1 and right * columns > x and top * rows < y + 1 and bottom * rows > y
                        for left, top, right, bottom in (element.ink for element in elements)
                    )
                    for y, x in cells
                )
                listing += 1
    assert listing > 10


@pytest.mark.usefixtures("hum")
def test_what_was_said_is_copied_where_it_is_written() -> None:
    """In both languages, with and without a screen: the marked targets are the tokens said, whole and in order."""
    maker = make_maker()
    screen = draw_screen(4, "train", width=448)
    for drawn in (
        [speech_only(rng_for("train", "copy", n), "train") for n in range(40)],
        examples_for_screen(screen, rng_for("train", "copy"), "train", 6, mix={"spoken_action": 0.5, "is_here": 0.5}),
    ):
        batch = maker.batch("heard", drawn, rng_for("train", "x"))
        assert batch.copying is not None and batch.said is not None and batch.said_counts is not None
        sounds = iter(zip(batch.said, batch.said_counts.tolist(), strict=True))
        for row, one in enumerate(drawn):
            numbers = batch.copying[row][batch.copying[row] > 0].tolist()
            written = batch.targets[row][batch.copying[row] > 0].tolist()
            if one.spoken is None:
                assert not numbers
                continue
            said, count = next(sounds)
            assert numbers == list(range(1, count + 1)) and written == said[:count].tolist()
            assert TOKENIZER.decode(written).strip() == one.spoken


@pytest.mark.usefixtures("hum")
def test_only_training_is_augmented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoglm.train.dataset.augment", lambda mel, rng: mel * 0)
    mels = {split: make_maker(split).sound("hi", "en", rng_for("train", "mel"))[0] for split in ("train", "test")}
    assert not mels["train"].any() and mels["test"].any()


@pytest.mark.usefixtures("hum")
def test_spare_questions_are_dropped_where_they_touch_nothing() -> None:
    def touching(spare: int) -> float:
        maker = make_maker()
        maker.sizes = replace(maker.sizes, spare_questions=spare)
        batches = [maker.make_batch("typed", index) for index in range(6)]
        assert {len(batch.targets) for batch in batches} == {maker.sizes.screens * maker.sizes.questions}
        return sum(float(batch.coordinates.any(1).float().mean()) for batch in batches)

    assert touching(6) > 1.3 * touching(0)


@pytest.mark.usefixtures("hum")
def test_screens_are_shared_by_their_questions() -> None:
    batch = make_maker().make_batch("typed", 1)
    assert batch.inputs.images is not None and batch.inputs.image_of is not None and batch.patch_class is not None
    assert len(batch.inputs.images) == 1 and batch.inputs.image_of.tolist() == [0] * len(batch.inputs.tokens)
    patches = batch.inputs.images.shape[2] * batch.inputs.images.shape[3] // 256
    assert batch.patch_class.shape == (1, patches) and bool((batch.patch_class > 0).any())


def test_the_written_reply_is_the_examples_answer() -> None:
    """From the batch's targets back to words, and a tap back to its place."""
    maker = replace_kinds(make_maker(), ("typed",))
    examples = [text_only(rng_for("train", "reply", n), "train") for n in range(3)] + [example()]
    batch = maker.batch("words", examples, rng_for("train", "x"))
    for row, one in enumerate(examples):
        reply = TOKENIZER.decode(batch.targets[row][batch.targets[row] != NO_TARGET].tolist())
        assert reply == f"<think>{one.thought}</think>\n<answer>{one.answer}</answer><|endoftext|>"
    place = TOKENIZER.decode(batch.targets[3][batch.coordinates[3]].tolist())
    assert parse_action(examples[3].answer) == Tap(120, 987) and place == "120987"
    assert not batch.coordinates[:3].any(), "conversation touches nothing"


def test_real_voices_say_it() -> None:
    try:
        one, two = (make_maker().make_batch("sounds", 7) for _ in range(2))
    except ConfigError as error:
        pytest.skip(f"no speech engine here: {error}")
    assert same(one, two) and one.inputs.frames is not None and bool((one.inputs.frames > 20).all())
