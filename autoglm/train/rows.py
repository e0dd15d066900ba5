"""Conversations as rows of tokens in the chat template's form: media placeholders, three-axis positions, targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoglm.train.model.phone import Inputs
from autoglm.train.tokenizer import SPECIALS, NanoTokenizer
from autoglm.train.world import replies
from autoglm.train.world.labels import LANGUAGES, Language
from autoglm.train.world.tasks import Example

NO_TARGET = -100


@dataclass
class Row:
    """One conversation as tokens; `answer_start` is the first token the model has to write."""

    tokens: list[int]
    media: list[int]
    turn: list[int]
    words: list[bool]
    positions: NDArray[np.int64]  # [3, L]
    answer_start: int
    coordinate: list[bool]
    decision: int = 0  # what is written after this token tells whether what is named is there
    names: tuple[int, ...] = ()  # after each of these tokens a description writes the next of its names
    copy: int = 0  # after this token the words said are written down, 0 without any


@dataclass(frozen=True)
class Media:
    """Token counts of a row's media: the picture's merged grid (rows, columns) and the sound's tokens."""

    grid: tuple[int, int] | None = None
    sound: int = 0


class RowEncoder:
    """Examples -> token rows, in the chat template's form."""

    def __init__(self, tokenizer: NanoTokenizer) -> None:
        self.tokenizer = tokenizer
        self._ids = {text: tokenizer.id(text) for text in SPECIALS}
        self._numbers = frozenset(tokenizer.number_ids)
        self.pad_token = tokenizer.id("<|endoftext|>")
        self._before_said = {each: len(tokenizer.encode(replies.heard(each, "").rstrip())) for each in LANGUAGES}

    def said(self, spoken: str, language: Language) -> list[int]:
        """The tokens that a thought writes these words with: the first of them follows a space where others do."""
        return self.tokenizer.encode(replies.heard(language, spoken))[self._before_said[language] :]

    def _before_names(self, example: Example) -> list[int]:
        """How many tokens of the answer stand before each name that a description lists."""
        counts, end = [], 0
        for name in (elements[0].label.text(example.language) for elements in example.listed):
            start = example.answer.index(name, end)
            counts.append(len(self.tokenizer.encode(example.answer[:start].rstrip())))
            end = start + len(name)
        return counts

    def row(self, example: Example, media: Media, *, with_answer: bool) -> Row:
        """The prompt up to `<|assistant|>` and its newline, with the reply when `with_answer`."""
        tokens: list[int] = []
        kinds: list[int] = []
        words: list[bool] = []
        columns: list[NDArray[np.int64]] = []
        position = 0

        def add(ids: Sequence[int], kind: int = 0, is_words: bool = False) -> None:
            nonlocal position
            tokens.extend(ids)
            kinds.extend([kind] * len(ids))
            words.extend([is_words] * len(ids))
            columns.append(np.arange(position, position + len(ids))[None].repeat(3, axis=0))
            position += len(ids)

        special, text = self._ids, self.tokenizer.encode
        add([special["[gMASK]"], special["<sop>"], special["<|user|>"], *text("\n")])
        turn_start = len(tokens)
        if media.grid:
            rows, across = media.grid
            add([special["<|begin_of_image|>"]])
            y, x = np.divmod(np.arange(rows * across), across)
            tokens.extend([special["<|image|>"]] * (rows * across))
            kinds.extend([1] * (rows * across))
            words.extend([False] * (rows * across))
            columns.append(np.stack([np.full_like(x, position), position + y, position + x]))
            position += max(rows, across)
            add([special["<|end_of_image|>"]])
        if media.sound:
            add([special["<|begin_of_audio|>"]])
            add([special["<|audio|>"]] * media.sound, 2)
            add([special["<|end_of_audio|>"]])
        if example.typed:
            add(text(example.typed), is_words=True)
        turn_end = len(tokens)
        add([special["<|assistant|>"], *text("\n")])
        answer_start = len(tokens)
        decision, copy = 0, 0
        names: tuple[int, ...] = ()
        coordinate = [False] * len(tokens)
        if with_answer:
            # The last line of the thought begins with what is decided: "Tap ..." or "No ...".
            heard, newline, _ = example.thought.rpartition("\n")
            decision = answer_start + len(text(heard + newline))
            copy = answer_start + self._before_said[example.language] if example.spoken is not None else 0
            add([special["<think>"], *text(example.thought), special["</think>"], *text("\n"), special["<answer>"]])
            coordinate.extend([False] * (len(tokens) - len(coordinate)))
            names = tuple(len(tokens) - 1 + before for before in self._before_names(example))
            answer = text(example.answer)
            add([*answer, special["</answer>"], special["<|endoftext|>"]])
            # A swipe's numbers are always the same four: words to be learned exactly.
            touches = example.answer.startswith("do(") and "element=[" in example.answer
            coordinate.extend(touches and token in self._numbers for token in answer)
            coordinate.extend([False, False])
        turn = [int(turn_start <= i < turn_end) for i in range(len(tokens))]
        positions = np.concatenate(columns, axis=1)
        return Row(tokens, kinds, turn, words, positions, answer_start, coordinate, decision, names, copy)


def collate_rows(rows: Sequence[Row], pad_token: int, *, left: bool = False) -> tuple[Inputs, Tensor, Tensor]:
    """Rows of unequal length -> Inputs without media, targets and coordinate marks, padded on the right (or left)."""
    count, length = len(rows), max(len(row.tokens) for row in rows)
    tokens = np.full((count, length), pad_token, dtype=np.int64)
    media, turn = np.zeros_like(tokens), np.zeros_like(tokens)
    positions = np.zeros((3, count, length), dtype=np.int64)
    valid, words, coordinates = (np.zeros((count, length), dtype=bool) for _ in range(3))
    targets = np.full_like(tokens, NO_TARGET)
    for index, row in enumerate(rows):
        size = len(row.tokens)
        at = slice(length - size, length) if left else slice(0, size)
        tokens[index, at], media[index, at], turn[index, at] = row.tokens, row.media, row.turn
        positions[:, index, at] = row.positions
        valid[index, at], words[index, at] = True, row.words
        first = at.start + row.answer_start
        targets[index, first - 1 : at.stop - 1] = tokens[index, first : at.stop]
        coordinates[index, first - 1 : at.stop - 1] = row.coordinate[row.answer_start :]
    inputs = Inputs(*(torch.from_numpy(array) for array in (tokens, positions, valid, media, turn, words)))
    return inputs, torch.from_numpy(targets), torch.from_numpy(coordinates)
