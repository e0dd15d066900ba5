"""Each loss is lowest where it should be, equals its formula, and reaches what it is meant to train."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autoglm.train.dataset import NO_TARGET, Batch, alphabet
from autoglm.train.losses import (
    BACKGROUND_WEIGHT,
    COORDINATE_SIGMA,
    HALF_TRUST_SNR,
    CharacterLesson,
    Coordinates,
    NameLesson,
    PatchLesson,
    character_loss,
    feature_loss,
    follow_loss,
    name_loss,
    patch_loss,
    trust_loss,
    word_logits,
    word_loss,
)
from autoglm.train.model import AutoGLMPhone, preset
from autoglm.train.model.fusion import Fused
from autoglm.train.model.phone import Embedded, Inputs
from autoglm.train.world.labels import LABELS, LANGUAGES, VISIBLE
from tests.train.phones import make_phone, some_inputs

CONFIG = preset("smoke")
NUMBERS = tuple(range(500, 1500))  # token of number n: n + 500


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_batch(inputs: Inputs | None = None, **parts: Tensor) -> Batch:
    inputs = inputs or some_inputs()
    none = torch.zeros_like(inputs.tokens)
    values: dict[str, Tensor] = {"targets": none - 100, "coordinates": none.bool(), **parts}
    return Batch("typed", inputs, **values)  # type: ignore[arg-type]


# --- words and coordinates -----------------------------------------------------------------------------------


def coordinates() -> Coordinates:
    return Coordinates(NUMBERS, 2048)


def test_coordinates_are_wanted_in_a_bell() -> None:
    """Against the formula, and lowest for the bell itself; nearer guesses cost less than far ones."""
    target = torch.tensor([700])
    logits = normal(1, 2048)
    bell = [math.exp(-((n - 200) ** 2) / (2 * COORDINATE_SIGMA**2)) for n in range(1000)]
    log_probs = torch.log_softmax(logits.double(), -1)[0]
    by_hand = -sum(b / sum(bell) * float(log_probs[500 + n]) for n, b in enumerate(bell))
    assert float(coordinates()(logits, target)) == pytest.approx(by_hand, rel=1e-5)

    def cost(guess: int) -> float:
        sharp = torch.full((1, 2048), -20.0)
        sharp[0, 500:1500] = -((torch.arange(1000.0) - guess) ** 2) / (2 * COORDINATE_SIGMA**2)
        return float(coordinates()(sharp, target))

    costs = [cost(200 + off) for off in (0, 2, 5, 20, 100)]
    assert costs == sorted(costs) and costs[0] < costs[1]
    entropy = -sum(b / sum(bell) * math.log(b / sum(bell)) for b in bell if b > 0)
    assert costs[0] == pytest.approx(entropy, abs=1e-3), "no distribution costs less than the bell's own entropy"


def test_bells_at_the_edges_are_whole() -> None:
    torch.testing.assert_close(coordinates().bells.sum(1), torch.ones(1000))
    assert int(coordinates().bells[0].argmax()) == 0 and int(coordinates().bells[999].argmax()) == 999


def test_word_loss_weighs_coordinates_double() -> None:
    logits, targets = normal(5, 2048).requires_grad_(), torch.tensor([3, 700, 9, 510, 4])
    marks = torch.tensor([False, True, False, True, False])
    loss, facts = word_loss(logits, targets, marks, coordinates())
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    places = coordinates()(logits[marks], targets[marks])
    wanted = (each[~marks].sum() + 2 * places.sum()) / (3 + 2 * 2)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert logits.grad is not None and bool((logits.grad.abs().sum(1) > 0).all())
    assert facts["words"] == pytest.approx(float(each[~marks].mean().detach()), rel=1e-5)
    plain, _ = word_loss(logits.detach(), targets, torch.zeros(5, dtype=torch.bool), coordinates())
    torch.testing.assert_close(plain, each.detach().mean())


def test_facts_tell_how_far_off_a_guess_is() -> None:
    logits = torch.zeros(3, 2048)
    logits[0, 3] = logits[1, 500 + 207] = logits[2, 500 + 290] = 9.0
    _, facts = word_loss(logits, torch.tensor([3, 700, 800]), torch.tensor([False, True, True]), coordinates())
    assert facts["off"] in (7.0, 10.0) and facts["token_acc"] == 1.0


def test_word_logits_are_those_with_a_target() -> None:
    model, hidden = make_phone(), normal(2, 24, 256)
    targets = torch.full((2, 24), NO_TARGET)
    targets[0, 5], targets[1, 20] = 8, 9
    marks = torch.zeros(2, 24, dtype=torch.bool)
    marks[1, 20] = True
    logits, wanted, is_coordinate = word_logits(model, hidden, make_batch(targets=targets, coordinates=marks))
    assert wanted.tolist() == [8, 9] and is_coordinate.tolist() == [False, True]
    torch.testing.assert_close(logits[1], model.text.lm_head(hidden[1, 20]))


# --- eyes ----------------------------------------------------------------------------------------------------


class GivenPatches(PatchLesson):
    """A lesson whose heads say what they are told."""

    def __init__(self, scores: Tensor, offsets: Tensor) -> None:
        super().__init__(CONFIG)
        self.label, self.offset = torch.nn.Identity(), torch.nn.Identity()  # type: ignore[assignment]
        self.label.forward = lambda _: scores  # type: ignore[method-assign]
        self.offset.forward = lambda _: offsets  # type: ignore[method-assign]


def patch_batch() -> Batch:
    classes = torch.tensor([[0, 3, 0, 7], [0, 0, 5, 0]])
    return make_batch(patch_class=classes, patch_offset=normal(2, 4, 2) * 0.1)


def test_patch_loss_is_least_when_all_is_named_and_placed() -> None:
    batch = patch_batch()
    assert batch.patch_class is not None and batch.patch_offset is not None
    sure = torch.nn.functional.one_hot(batch.patch_class, len(VISIBLE) + 1) * 40.0
    right, facts = patch_loss(GivenPatches(sure, batch.patch_offset), torch.zeros(2, 4, 64), batch)
    assert float(right) < 1e-6 and facts["patch_acc"] == 1.0
    moved, _ = patch_loss(GivenPatches(sure, batch.patch_offset + 0.1), torch.zeros(2, 4, 64), batch)
    assert float(moved) > 0.1
    elsewhere = batch.patch_offset + 0.1 * (batch.patch_class == 0)[..., None]
    background, _ = patch_loss(GivenPatches(sure, elsewhere), torch.zeros(2, 4, 64), batch)
    assert float(background) == float(right), "where nothing is named there is nothing to place"


def test_patch_loss_weighs_background_little() -> None:
    batch = patch_batch()
    assert batch.patch_class is not None and batch.patch_offset is not None
    scores = normal(2, 4, len(VISIBLE) + 1)
    loss, facts = patch_loss(GivenPatches(scores, batch.patch_offset), torch.zeros(2, 4, 64), batch)
    total = weight = 0.0
    for row, column in itertools.product(range(2), range(4)):
        wanted = int(batch.patch_class[row, column])
        share = 1.0 if wanted else BACKGROUND_WEIGHT
        total -= share * float(torch.log_softmax(scores[row, column], 0)[wanted])
        weight += share
    assert float(loss) == pytest.approx(total / weight, rel=1e-5) and facts["offset"] == 0.0


def test_patch_loss_trains_eyes_and_lesson() -> None:
    lesson, patches = PatchLesson(CONFIG), normal(2, 4, 64).requires_grad_()
    loss, _ = patch_loss(lesson, patches, patch_batch())
    loss.backward()
    assert patches.grad is not None and bool((patches.grad.abs().sum(-1) > 0).all())
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in lesson.parameters())


def test_a_picture_of_nothing_named_is_a_lesson_too() -> None:
    """No name, no place: the loss is a number and its gradient too."""
    lesson, patches = PatchLesson(CONFIG), normal(1, 4, 64).requires_grad_()
    batch = make_batch(patch_class=torch.zeros(1, 4, dtype=torch.long), patch_offset=torch.zeros(1, 4, 2))
    loss, _ = patch_loss(lesson, patches, batch)
    loss.backward()
    assert bool(loss.isfinite()) and patches.grad is not None and bool(patches.grad.isfinite().all())


# --- ears ----------------------------------------------------------------------------------------------------


def said(*codes: list[int]) -> Batch:
    width = max(map(len, codes))
    padded = torch.tensor([code + [0] * (width - len(code)) for code in codes])
    return make_batch(characters=padded, character_counts=torch.tensor([len(code) for code in codes]))


class GivenCharacters(CharacterLesson):
    """A lesson that hears what it is told: its input are the scores."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.characters = torch.nn.Identity()  # type: ignore[assignment]


def heard(path: list[int], length: int, classes: int = 6) -> Tensor:
    """Scores [length, classes] that are sure of `path`; what is behind it shouts something else."""
    scores = torch.zeros(length, classes)
    for step, code in enumerate(path):
        scores[step, code] = 30.0
    scores[len(path) :, 1] = 30.0
    return scores


def test_character_loss_is_every_path_that_collapses_to_the_word() -> None:
    """Summed over all 3^4 paths of a tiny case by hand, divided by the word's length (torch's mean)."""
    scores = normal(1, 4, 3)
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, _ = character_loss(GivenCharacters(), scores, mask, said([1, 2]))
    probs = scores[0].double().softmax(-1)
    total = 0.0
    for path in itertools.product(range(3), repeat=4):
        collapsed = [c for i, c in enumerate(path) if c and (i == 0 or path[i - 1] != c)]
        if collapsed == [1, 2]:
            total += math.prod(float(probs[i, c]) for i, c in enumerate(path))
    assert float(loss) == pytest.approx(-math.log(total) / 2, rel=1e-5)


def test_character_loss_reads_only_real_tokens() -> None:
    batch = said([2, 3, 3], [4])
    sound = torch.stack([heard([0, 2, 2, 3, 0, 3, 0], 9), heard([0, 4, 4, 0], 9)])
    mask = torch.arange(9) < torch.tensor([7, 4])[:, None]
    right, facts = character_loss(GivenCharacters(), sound, mask, batch)
    assert float(right) < 0.01 and facts["heard"] == 1.0
    misheard = torch.stack([heard([0, 2, 2, 3, 3, 3, 0], 9), sound[1]])
    wrong, facts = character_loss(GivenCharacters(), misheard, mask, batch)
    assert float(wrong) > 1.0 and facts["heard"] == 0.5
    everything = torch.ones_like(mask)
    assert character_loss(GivenCharacters(), sound, everything, batch)[1]["heard"] == 0.0


def test_a_word_too_long_for_its_sound_does_no_harm() -> None:
    sound = normal(1, 2, 6).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, _ = character_loss(GivenCharacters(), sound, mask, said([1, 1, 1, 1]))
    loss.backward()
    assert float(loss.detach()) == 0.0 and sound.grad is not None and bool(sound.grad.isfinite().all())


def test_the_lesson_knows_every_letter_and_name() -> None:
    assert CharacterLesson(CONFIG).characters.out_features == max(alphabet().values()) + 1
    assert NameLesson(CONFIG).names.out_features == len(LABELS) * len(LANGUAGES)


def test_name_loss_reads_the_mean_of_real_tokens() -> None:
    lesson, names = NameLesson(CONFIG), torch.tensor([5, 90])
    sound = normal(2, 6, 64).requires_grad_()
    mask = torch.arange(6) < torch.tensor([6, 2])[:, None]
    batch = make_batch(names=names)
    loss, _ = name_loss(lesson, sound, mask, batch)
    scores = torch.stack([lesson.names(sound[0].mean(0)), lesson.names(sound[1, :2].mean(0))])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores, names))
    loss.backward()
    assert sound.grad is not None and torch.equal(sound.grad.abs().sum(-1) > 0, mask)
    with torch.no_grad():
        lesson.names.weight.zero_()
        lesson.names.bias.fill_(-30.0)[5] = 0.0
    assert name_loss(lesson, sound, mask, batch)[1]["named"] == 0.5


# --- trust ---------------------------------------------------------------------------------------------------


def trusting(audio: list[float], snr: list[float], *, alone: bool = False) -> Tensor:
    """The loss of rows whose audio weight is given; every row has its own sound."""
    audio_weight = torch.tensor(audio)
    rest = torch.zeros_like(audio_weight) if alone else (1 - audio_weight) / 2
    weights = torch.stack([rest, audio_weight, rest], dim=1).requires_grad_()
    inputs = replace(some_inputs(), sound_of=torch.arange(len(audio)))
    embedded = Embedded(torch.zeros(1), None, None, None, Fused(None, None, weights, {}))
    return trust_loss(embedded, make_batch(inputs, snr=torch.tensor(snr)))


def best_weight(snr: float) -> float:
    tried = [step / 200 for step in range(1, 200)]
    return min(tried, key=lambda audio: float(trusting([audio], [snr])))


def test_the_audio_weight_is_told_to_fall_as_noise_rises() -> None:
    best = [best_weight(snr) for snr in (-20.0, 0.0, HALF_TRUST_SNR, 20.0, 60.0)]
    assert best == sorted(best) and len(set(best)) == 5
    assert best[0] == pytest.approx(0.1, abs=0.02) and best[-1] == pytest.approx(0.7, abs=0.02)
    assert best[2] == pytest.approx(0.4, abs=0.01)


def test_a_sound_alone_has_nobody_to_weigh_against() -> None:
    assert float(trusting([1.0], [0.0], alone=True)) == 0.0
    both = trusting([0.2], [20.0])
    inputs = replace(some_inputs(), sound_of=torch.tensor([0, -1]))
    weights = torch.tensor([[0.4, 0.2, 0.4], [0.5, 0.0, 0.5]])
    embedded = Embedded(torch.zeros(1), None, None, None, Fused(None, None, weights, {}))
    with_deaf_row = trust_loss(embedded, make_batch(inputs, snr=torch.tensor([20.0])))
    torch.testing.assert_close(with_deaf_row, both.detach())


def test_trust_reaches_the_pooling_weights() -> None:
    model = make_phone()
    batch = make_batch(snr=torch.tensor([20.0]))
    trust_loss(model.embed(batch.inputs), batch).backward()
    grad = model.fusion.pool_weight.grad
    assert grad is not None and bool((grad[1] != 0).any())


# --- following the teacher -----------------------------------------------------------------------------------


def test_following_is_softened_kl_times_temperature_squared() -> None:
    student, teacher = normal(4, 9), normal(4, 9, seed=2)
    p, q = (torch.softmax(x.double() / 2.0, -1) for x in (teacher, student))
    by_hand = float((p * (p / q).log()).sum(-1).mean()) * 4
    assert float(follow_loss(student, teacher)) == pytest.approx(by_hand, rel=1e-5)
    assert float(follow_loss(teacher + 3.0, teacher)) == pytest.approx(0.0, abs=1e-6)
    assert float(follow_loss(student, teacher)) > 0.1
    with_grad = student.clone().requires_grad_()
    follow_loss(with_grad, teacher).backward()
    assert with_grad.grad is not None
    assert float(follow_loss(student - 0.5 * with_grad.grad, teacher)) < float(follow_loss(student, teacher))


def test_features_are_compared_in_parts_of_the_teachers_size() -> None:
    student, teacher = normal(2, 5, 8), normal(2, 5, 8, seed=2)
    mask = torch.arange(5) < torch.tensor([5, 2])[:, None]
    found = float(feature_loss(student, teacher, mask))
    assert float(feature_loss(teacher, teacher)) == 0.0 and found > 0.5
    assert float(feature_loss(student * 10, teacher * 10, mask)) == pytest.approx(found, rel=1e-5)
    garbage = torch.where(mask[..., None], student, 1e4)
    assert float(feature_loss(garbage, teacher, mask)) == found
    assert float(feature_loss(torch.zeros_like(teacher), teacher)) == pytest.approx(1.0)


def test_distilling_gradients_reach_every_part_of_a_student() -> None:
    """Features and logits of one pass: eyes, ears, fusion and decoder are all told."""
    teacher, student = make_phone(seed=1), make_phone(seed=2).train()
    inputs = some_inputs()
    with torch.no_grad():
        seen = teacher.embed(inputs)
        taught = teacher.hidden(inputs, seen)
    embedded = student.embed(inputs)
    hidden = student.hidden(inputs, embedded)
    loss = feature_loss(hidden, taught, inputs.valid)
    loss = loss + follow_loss(student.text.lm_head(hidden[0]), teacher.text.lm_head(taught[0]).detach())
    assert isinstance(student, AutoGLMPhone)
    loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        # Softmax does not notice a bias of the keys: it shifts all scores of a query alike.
        is_key_bias = name.endswith((".k.bias",))
        assert is_key_bias or bool((parameter.grad != 0).any()), name
