"""Examples -> batches: rows of tokens, pictures, sounds, and what each lesson wants of them.

Every micro-batch is made from its number alone (`make_batch(kind, index)`), so a stream can start anywhere and workers
share nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autoglm.media.log_mel import log_mel
from autoglm.media.screen_pixels import encoder_pixels, encoder_size
from autoglm.train.augment import augment
from autoglm.train.model.audio import token_count
from autoglm.train.model.phone import Inputs
from autoglm.train.model.presets import PhoneConfig
from autoglm.train.rows import Media, Row, RowEncoder, collate_rows
from autoglm.train.tokenizer import NanoTokenizer
from autoglm.train.world.bank import say
from autoglm.train.world.canvas import Element
from autoglm.train.world.corpus import texts
from autoglm.train.world.distort import distort
from autoglm.train.world.labels import LABELS, LANGUAGES, VISIBLE_CLASS, Language
from autoglm.train.world.screens import Screen, draw_screen
from autoglm.train.world.soup import draw_soup
from autoglm.train.world.split import Split, rng_for
from autoglm.train.world.tasks import Example, Task, centre, examples_for_screen, speech_only, text_only

DRAWING_WIDTH = 448
# An ink that covers less of a patch than this does not name it.
PATCH_SHARE = 0.12
# Signal-to-noise ratios in dB. Training goes down to noise as loud as the voice; the test is a room, not a street.
SNR_RANGE: dict[Split, tuple[float, float]] = {"train": (0.0, 35.0), "test": (15.0, 40.0)}
CLEAN_SNR = 60.0
CLEAN_SHARE = 0.25
BatchKind = Literal["soup", "screens", "names", "sounds", "typed", "spoken", "heard", "words"]


@dataclass
class Batch:
    """One micro-batch; None where a kind has no such part.

    inputs and targets [B, L] (token wanted after each position, -100 for none); coordinates [B, L] marks targets that
    are screen coordinates; looking [B, L] marks targets that need a look at the picture, one bit for each thing: is
    what is named there, where is it, what comes next in a description; pointed [B, L] has that bit at the picture
    tokens that show the thing, or at the picture's beginning when none does; copying [B, L] at targets that write down
    what was said: which of its tokens, 1 upwards, 0 elsewhere;
    patch_class [S, P] (0 background) and patch_offset [S, P, 2]: which label's ink a patch shows and where that ink's
    middle lies from the patch's middle, in parts of the picture's width; patch_place [S, P, 2]: where that label would
    be touched, x and y 0 to 999; characters [A, C] (padded with 0) and character_counts [A] of what was said,
    said [A, N] and said_counts [A] the same as tokens; snr [A] in dB, 60 clean;
    names [A]: which name is said, label number times languages plus language.
    """

    kind: BatchKind
    inputs: Inputs
    targets: Tensor
    coordinates: Tensor
    pointed: Tensor | None = None
    looking: Tensor | None = None
    copying: Tensor | None = None
    patch_class: Tensor | None = None
    patch_offset: Tensor | None = None
    patch_place: Tensor | None = None
    characters: Tensor | None = None
    character_counts: Tensor | None = None
    said: Tensor | None = None
    said_counts: Tensor | None = None
    snr: Tensor | None = None
    names: Tensor | None = None


@cache
def alphabet() -> dict[str, int]:
    """Every character that can be said -> its CTC class, 1 upwards (0 is the blank)."""
    said = {character for text, _ in texts() for character in text.lower() if character.isalnum() or character in " -'"}
    return {character: index + 1 for index, character in enumerate(sorted(said))}


def ink_share(element: Element, rows: int, columns: int) -> NDArray[np.float64]:
    """How much of each cell of a grid over the picture the element's ink box covers: [rows, columns], 0 to 1."""
    left, top, right, bottom = element.ink
    y0, x0 = np.arange(rows) / rows, np.arange(columns) / columns
    high = np.clip(np.minimum(bottom, y0 + 1 / rows) - np.maximum(top, y0), 0, None) * rows
    wide = np.clip(np.minimum(right, x0 + 1 / columns) - np.maximum(left, x0), 0, None) * columns
    share: NDArray[np.float64] = high[:, None] * wide[None]
    return share


def patch_targets(
    elements: Sequence[Element], rows: int, columns: int, aspect: float
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Which label's ink each patch shows and where: class [P], offset [P, 2] and place [P, 2], see `Batch`.

    aspect: the picture's height over its width.
    """
    share = np.zeros((rows, columns), dtype=np.float64)
    found = np.zeros((rows, columns), dtype=np.int64)
    offset = np.zeros((rows, columns, 2), dtype=np.float32)
    place = np.zeros((rows, columns, 2), dtype=np.int64)
    y0, x0 = np.arange(rows) / rows, np.arange(columns) / columns
    for element in elements:
        number = VISIBLE_CLASS.get((element.label.kind, element.label.key))
        if number is None:
            continue
        left, top, right, bottom = element.ink
        covered = ink_share(element, rows, columns)
        won = (covered > share) & (covered >= PATCH_SHARE)
        share[won], found[won], place[won] = covered[won], number, centre(element)
        dx = (left + right) / 2 - (x0 + 0.5 / columns)
        dy = ((top + bottom) / 2 - (y0 + 0.5 / rows)) * aspect
        offset[won] = np.stack(np.broadcast_arrays(dx[None, :], dy[:, None]), axis=-1)[won]
    return found.reshape(-1), offset.reshape(-1, 2), place.reshape(-1, 2)


def draw_utterance(
    text: str, language: Language, split: Split, rng: np.random.Generator, *, snr: float | None = None
) -> tuple[NDArray[np.float32], float]:
    """One utterance by a drawn voice, distorted: f32 [num_samples] at 16 kHz, and its signal-to-noise ratio in dB.

    snr  the ratio to use; None draws it
    """
    drawn = CLEAN_SNR if rng.random() < CLEAN_SHARE else float(rng.uniform(*SNR_RANGE[split]))
    snr = drawn if snr is None else snr
    is_clean = snr >= CLEAN_SNR
    wave = say(text, language, split, rng)
    return distort(wave, rng, snr_db=None if is_clean else snr, clean=is_clean), snr


@dataclass(frozen=True)
class Sizes:
    """How much one micro-batch of each kind holds."""

    soups: int = 4
    variety: float = 1.0  # of the soups
    screens: int = 3
    questions: int = 5  # per screen
    spoken_screens: int = 2
    spoken_questions: int = 3
    spare_questions: int = 0  # drawn beyond those of a screen; of all, those that touch nothing are dropped first
    sounds: int = 8
    words: int = 6


class BatchMaker(Dataset[list[Batch]]):
    """Item i is the list of micro-batches of training step i."""

    def __init__(
        self,
        config: PhoneConfig,
        tokenizer: NanoTokenizer,
        kinds: Sequence[BatchKind],
        *,
        split: Split = "train",
        sizes: Sizes = Sizes(),
        seed: int = 0,
        snr: float | None = None,
    ) -> None:
        """snr: the signal-to-noise ratio of every sound, in dB; None draws it."""
        self.config, self.tokenizer, self.kinds = config, tokenizer, tuple(kinds)
        self.split, self.sizes, self.seed = split, sizes, seed
        self.snr = snr
        self.rows = RowEncoder(tokenizer)

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> list[Batch]:
        return [self.make_batch(kind, index) for kind in self.kinds]

    def make_batch(self, kind: BatchKind, index: int) -> Batch:
        """Micro-batch `index` of `kind`, the same whenever it is asked for."""
        rng = rng_for(self.split, "batch", kind, self.seed, index)
        if kind == "soup":
            return self._soups(rng)
        if kind == "screens":
            return self._screens(rng)
        if kind == "sounds":
            return self._sounds(kind, rng, self._sentences(rng))
        if kind == "names":
            return self._names(rng)
        if kind == "words":
            return self.batch(kind, [text_only(rng, self.split) for _ in range(self.sizes.words)], rng)
        if kind == "heard":
            return self.batch(kind, [speech_only(rng, self.split) for _ in range(self.sizes.sounds)], rng)
        screens = self.sizes.screens if kind == "typed" else self.sizes.spoken_screens
        questions = self.sizes.questions if kind == "typed" else self.sizes.spoken_questions
        examples: list[Example] = []
        for screen in self._same_size_screens(rng, screens):
            mix = TYPED_MIX if kind == "typed" else SPOKEN_MIX
            drawn = examples_for_screen(screen, rng, self.split, questions + self.sizes.spare_questions, mix=mix)
            examples += sorted(drawn, key=lambda example: example.target is None)[:questions]
        return self.batch(kind, examples, rng)

    def _same_size_screens(self, rng: np.random.Generator, count: int) -> list[Screen]:
        """Screens whose resized pictures have one size."""
        found: dict[tuple[int, int], list[Screen]] = {}
        while True:
            screen = draw_screen(int(rng.integers(1 << 40)), self.split, width=DRAWING_WIDTH)
            size = encoder_size(*screen.image.size, max_pixels=self.config.vision.max_pixels)
            same = found.setdefault(size, [])
            same.append(screen)
            if len(same) == count:
                return same

    def _pixels(self, screen: Screen) -> NDArray[np.float32]:
        return encoder_pixels(screen.image, max_pixels=self.config.vision.max_pixels)

    def sound(self, text: str, language: Language, rng: np.random.Generator) -> tuple[NDArray[np.float32], float]:
        """One utterance as log-mel [frames, 80] and its signal-to-noise ratio in dB, see `draw_utterance`."""
        wave, snr = draw_utterance(text, language, self.split, rng, snr=self.snr)
        mel = log_mel(wave)
        return (augment(mel, rng) if self.split == "train" else mel), snr

    def batch(
        self, kind: BatchKind, examples: list[Example], rng: np.random.Generator, *, with_answer: bool = True
    ) -> Batch:
        """Examples whose screens have one size -> one micro-batch; prompts without answers are padded on the left."""
        screens: dict[int, int] = {}
        pictures: list[Screen] = []
        for example in examples:
            if example.screen is not None and id(example.screen) not in screens:
                screens[id(example.screen)] = len(pictures)
                pictures.append(example.screen)
        pixels = [self._pixels(screen) for screen in pictures]
        size = self.config.vision.patch_size * self.config.vision.merge_size
        grid = (pixels[0].shape[1] // size, pixels[0].shape[2] // size) if pixels else None
        heard = [self.sound(e.spoken, e.language, rng) if e.spoken is not None else None for e in examples]
        rows = []
        for example, sound in zip(examples, heard, strict=True):
            tokens = token_count(len(sound[0])) if sound else 0
            rows.append(
                self.rows.row(example, Media(grid if example.screen else None, tokens), with_answer=with_answer)
            )
        inputs, targets, coordinates = collate_rows(rows, self.rows.pad_token, left=not with_answer)
        result = Batch(kind, inputs, targets, coordinates)
        if pixels:
            inputs.images = torch.from_numpy(np.stack(pixels))
            inputs.image_of = torch.tensor([screens[id(e.screen)] if e.screen is not None else -1 for e in examples])
            self._add_patches(result, [screen.elements for screen in pictures])
            if with_answer and grid is not None:
                self._add_pointing(result, examples, rows, grid)
        sounds = [sound for sound in heard if sound is not None]
        if sounds:
            numbers = iter(range(len(sounds)))
            inputs.sound_of = torch.tensor([next(numbers) if sound is not None else -1 for sound in heard])
            self._add_sounds(result, sounds, [(e.spoken, e.language) for e in examples if e.spoken is not None])
            if with_answer:
                self._add_copying(result, [row.copy for row in rows])
        return result

    def _add_pointing(
        self, batch: Batch, examples: Sequence[Example], rows: Sequence[Row], grid: tuple[int, int]
    ) -> None:
        """Where to look for what is named: at the tokens that show it, or at the picture's beginning when none does."""
        batch.pointed, batch.looking = torch.zeros_like(batch.targets), torch.zeros_like(batch.targets)
        for number, (example, row) in enumerate(zip(examples, rows, strict=True)):
            things = list(zip(example.listed, row.names, strict=True))
            if example.sought is not None:
                things = [(example.sought, row.decision)]
                batch.looking[number] |= batch.coordinates[number].long()
            picture = batch.inputs.media[number] == 1
            for index, (elements, at) in enumerate(things):
                bit = 1 << index
                batch.looking[number, at] |= bit
                if not elements:
                    batch.pointed[number, int(picture.nonzero()[0]) - 1] |= bit
                for element in elements:
                    share = ink_share(element, *grid)
                    shows = torch.from_numpy(share >= min(PATCH_SHARE, share.max()))
                    batch.pointed[number, picture] |= bit * shows.reshape(-1)

    def _add_copying(self, batch: Batch, starts: Sequence[int]) -> None:
        """Where the tokens said are written down: right after each row's start, one after the other."""
        assert batch.inputs.sound_of is not None and batch.said_counts is not None
        batch.copying = torch.zeros_like(batch.targets)
        for row, (start, sound) in enumerate(zip(starts, batch.inputs.sound_of.tolist(), strict=True)):
            if sound >= 0:
                count = int(batch.said_counts[sound])
                batch.copying[row, start : start + count] = torch.arange(1, count + 1)

    def _add_patches(self, batch: Batch, elements: Sequence[Sequence[Element]]) -> None:
        assert batch.inputs.images is not None
        height, width = batch.inputs.images.shape[2:]
        size = self.config.vision.patch_size
        found = [patch_targets(each, height // size, width // size, height / width) for each in elements]
        batch.patch_class = torch.from_numpy(np.stack([one[0] for one in found]))
        batch.patch_offset = torch.from_numpy(np.stack([one[1] for one in found]))
        batch.patch_place = torch.from_numpy(np.stack([one[2] for one in found]))

    def _add_sounds(
        self,
        batch: Batch,
        sounds: Sequence[tuple[NDArray[np.float32], float]],
        texts: Sequence[tuple[str, Language]],
    ) -> None:
        frames = [len(mel) for mel, _ in sounds]
        mel = np.zeros((len(sounds), max(frames), sounds[0][0].shape[1]), dtype=np.float32)
        for index, (values, _) in enumerate(sounds):
            mel[index, : len(values)] = values
        batch.inputs.mel, batch.inputs.frames = torch.from_numpy(mel), torch.tensor(frames)
        batch.snr = torch.tensor([snr for _, snr in sounds])
        known = alphabet()
        codes = [[known[c] for c in text.lower() if c in known] for text, _ in texts]
        batch.characters, batch.character_counts = _padded(codes)
        batch.said, batch.said_counts = _padded([self.rows.said(text, language) for text, language in texts])

    def _soups(self, rng: np.random.Generator) -> Batch:
        soups = [draw_soup(int(rng.integers(1 << 40)), self.split, self.sizes.variety) for _ in range(self.sizes.soups)]
        pixels = [encoder_pixels(canvas.image, max_pixels=self.config.vision.max_pixels) for canvas, _ in soups]
        batch = _without_text("soup", torch.from_numpy(np.stack(pixels)))
        self._add_patches(batch, [elements for _, elements in soups])
        return batch

    def _screens(self, rng: np.random.Generator) -> Batch:
        screens = self._same_size_screens(rng, self.sizes.soups)
        batch = _without_text("screens", torch.from_numpy(np.stack([self._pixels(screen) for screen in screens])))
        self._add_patches(batch, [screen.elements for screen in screens])
        return batch

    def _names(self, rng: np.random.Generator) -> Batch:
        """Single names of things, twice as many as sentences."""
        names = rng.integers(len(LABELS) * len(LANGUAGES), size=2 * self.sizes.sounds)
        texts: list[tuple[str, Language]] = []
        for name in names.tolist():
            label, language = divmod(name, len(LANGUAGES))
            texts.append((LABELS[label].text(LANGUAGES[language]), LANGUAGES[language]))
        batch = self._sounds("names", rng, texts)
        batch.names = torch.from_numpy(names)
        return batch

    def _sentences(self, rng: np.random.Generator) -> list[tuple[str, Language]]:
        examples = [speech_only(rng, self.split) for _ in range(self.sizes.sounds)]
        return [(example.spoken, example.language) for example in examples if example.spoken is not None]

    def _sounds(self, kind: BatchKind, rng: np.random.Generator, texts: Sequence[tuple[str, Language]]) -> Batch:
        batch = _without_text(kind, None)
        sounds = [self.sound(text, language, rng) for text, language in texts]
        self._add_sounds(batch, sounds, texts)
        return batch


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of numbers filled up with zeros [rows, longest], and their lengths [rows]."""
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
    return padded, torch.tensor([len(row) for row in rows])


TYPED_MIX: dict[Task, float] = {"typed_action": 0.5, "describe": 0.3, "which_app": 0.06, "is_here": 0.14}
SPOKEN_MIX: dict[Task, float] = {"spoken_action": 1.0}


def _without_text(kind: BatchKind, images: Tensor | None) -> Batch:
    """A batch for an encoder's own loss, with no tokens."""
    none = torch.zeros(0, 0, dtype=torch.long)
    inputs = Inputs(none, torch.zeros(3, 0, 0, dtype=torch.long), none.bool(), none, none, none.bool(), images=images)
    return Batch(kind, inputs, none, none.bool())


def stream(maker: BatchMaker, start: int, *, rank: int = 0, world: int = 1, workers: int = 1) -> Iterator[list[Batch]]:
    """The steps `start`, `start` + 1, ... of this rank, made ahead of time by worker processes."""
    indices = _Count(start * world + rank, world)
    loader = DataLoader(
        maker,
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_start_worker,
    )
    yield from loader


class _Count:
    """start, start + step, ... without end."""

    def __init__(self, start: int, step: int) -> None:
        self.start, self.step = start, step

    def __iter__(self) -> Iterator[int]:
        index = self.start
        while True:
            yield index
            index += self.step

    def __len__(self) -> int:
        return 1 << 30


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and a group's SIGTERM reach the workers too; the trainer decides, and ends them when its step is saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
