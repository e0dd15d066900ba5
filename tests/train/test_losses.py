"""Each loss is lowest where it should be, equals its formula, and reaches what it is meant to train."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from autoglm.train.dataset import Batch, alphabet
from autoglm.train.losses import (
    BACKGROUND_WEIGHT,
    COORDINATE_SIGMA,
    HALF_TRUST_SNR,
    POINTING_LAYER_FROM_END,
    CharacterLesson,
    Coordinates,
    NameLesson,
    Names,
    PatchLesson,
    PlaceLesson,
    align,
    character_loss,
    copying_loss,
    feature_loss,
    follow_loss,
    name_loss,
    naming_loss,
    patch_loss,
    placing_loss,
    pointing_loss,
    showing,
    shown_loss,
    smooth_numbers,
    token_scores,
    trust_loss,
    word_logits,
    word_loss,
    writing_loss,
)
from autoglm.train.model import AutoGLMPhone, preset
from autoglm.train.model.fusion import Fused, rms
from autoglm.train.model.phone import Embedded, Inputs
from autoglm.train.rows import NO_TARGET
from autoglm.train.tokenizer import load_tokenizer
from autoglm.train.world.labels import LABELS, LANGUAGES, VISIBLE
from autoglm.train.world_stage import Pupil, train_only
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


def test_coordinates_are_not_drowned_by_words() -> None:
    logits, targets = normal(5, 2048).requires_grad_(), torch.tensor([3, 700, 9, 510, 4])
    marks = torch.tensor([False, True, False, True, False])
    loss, facts = word_loss(logits, targets, marks, coordinates())
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    places = coordinates()(logits[marks], targets[marks])
    wanted = each[~marks].mean() + 0.5 * places.mean()
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
    return min(tried, key=lambda audio: trusting([audio], [snr]).item())


def test_the_audio_weight_is_told_to_fall_as_noise_rises() -> None:
    best = [best_weight(snr) for snr in (-20.0, 0.0, HALF_TRUST_SNR, 20.0, 60.0)]
    assert best == sorted(best) and len(set(best)) == 5
    assert best[0] == pytest.approx(0.1, abs=0.02) and best[-1] == pytest.approx(0.7, abs=0.02)
    assert best[2] == pytest.approx(0.4, abs=0.01)


def test_a_sound_alone_has_nobody_to_weigh_against() -> None:
    assert trusting([1.0], [0.0], alone=True).item() == 0.0
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


# --- pointing and naming -------------------------------------------------------------------------------------


def pointing_batch() -> Batch:
    """Row 0 decides, then writes two coordinates, after a picture whose last two tokens show what it touches.

    Row 0 then names another thing, which the last token alone shows.
    """
    inputs = some_inputs()
    pointed, looking = torch.zeros_like(inputs.tokens), torch.zeros_like(inputs.tokens)
    looking[0, [18, 20, 21, 22]] = torch.tensor([1, 1, 1, 2])
    pointed[0, 7:9] = torch.tensor([1, 3])
    assert bool((inputs.media[0, 7:9] == 1).all())
    return make_batch(inputs, pointed=pointed, looking=looking)


def attended(
    model: AutoGLMPhone, batch: Batch, monkeypatch: pytest.MonkeyPatch, head: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """Probabilities of a head of the pointing layer as the model itself attends: [B, L, L], and every layer's input."""
    seen: list[Tensor] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        if rest.get("enable_gqa"):
            scores = q[:, head] @ k[:, head].transpose(-1, -2) * q.shape[-1] ** -0.5
            seen.append(scores.masked_fill(~rest["attn_mask"][:, 0], -torch.inf).softmax(-1))
        return real(q, k, v, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    embedded = model.embed(batch.inputs)
    layer_inputs = [embedded.embeddings]
    model.hidden(batch.inputs, embedded, layer_inputs)
    return seen[-POINTING_LAYER_FROM_END], layer_inputs


def test_pointing_is_the_attention_the_model_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_phone(), pointing_batch()
    probabilities, layer_inputs = attended(model, batch, monkeypatch)
    shown = torch.cat([probabilities[0, [18, 20, 21], 7:9].sum(-1), probabilities[0, 22, 8:9]])
    by_hand = -shown.log().mean()
    found = pointing_loss(model, batch.inputs, layer_inputs, batch)
    assert found is not None
    torch.testing.assert_close(found, by_hand)
    found.backward()
    layer = model.text.layers[-POINTING_LAYER_FROM_END]
    size = model.config.text.head_dim
    grad = layer.self_attn.q_proj.weight.grad
    assert grad is not None and bool(grad[:size].any()) and not bool(grad[size:].any()), "one head learns it"


def test_a_swipe_points_at_nothing() -> None:
    model, batch = make_phone(), pointing_batch()
    assert batch.looking is not None
    layer_inputs = [torch.zeros(2, 24, model.config.text.hidden_size)] * 3
    batch.looking[0] = 0
    assert pointing_loss(model, batch.inputs, layer_inputs, batch) is None
    batch.pointed = None
    assert pointing_loss(model, batch.inputs, layer_inputs, batch) is None


def test_copying_is_the_attention_the_last_head_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens are written; the first was heard in two sound tokens, the second in one, a third was not heard."""
    model, inputs = make_phone(), some_inputs()
    copying, aligned = torch.zeros_like(inputs.tokens), torch.zeros_like(inputs.tokens)
    copying[0, 20:23], aligned[0, 11:16] = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 1, 0, 2])
    batch = make_batch(inputs, copying=copying)
    probabilities, layer_inputs = attended(model, batch, monkeypatch, head=-1)
    by_hand = -torch.stack([probabilities[0, 20, 12:14].sum(), probabilities[0, 21, 15]]).log().mean()
    found = copying_loss(model, inputs, layer_inputs, batch, aligned)
    assert found is not None
    torch.testing.assert_close(found, by_hand)
    assert copying_loss(model, inputs, layer_inputs, batch, torch.zeros_like(aligned)) is None
    assert copying_loss(model, inputs, layer_inputs, make_batch(inputs), aligned) is None


def test_names_are_the_means_of_their_tokens() -> None:
    model, tokenizer = make_phone(), load_tokenizer()
    called = Names(tokenizer)(model.text.embed_tokens)
    assert called.shape == (len(LANGUAGES), len(VISIBLE), model.config.text.hidden_size)
    for language, label in ((0, 0), (1, 17), (1, len(VISIBLE) - 1)):
        text = VISIBLE[label].text(LANGUAGES[language])
        ids = tokenizer.encode(f" {text}" if LANGUAGES[language] == "en" else text)
        torch.testing.assert_close(called[language, label], model.text.embed_tokens.weight[ids].mean(0))


def shown_batch(model: AutoGLMPhone) -> tuple[Batch, Embedded, int]:
    """One patch of row 0's picture shows label 5 at (120, 900); also the position of the token it belongs to."""
    inputs = some_inputs()
    assert inputs.images is not None
    rows, columns = (side // 16 for side in inputs.images.shape[2:])
    shown, place = torch.zeros(1, rows, columns, dtype=torch.long), torch.zeros(1, rows, columns, 2, dtype=torch.long)
    shown[0, 2, 1], place[0, 2, 1] = 6, torch.tensor([120, 900])  # in the second row of tokens, the first column
    batch = make_batch(inputs, patch_class=shown.flatten(1), patch_place=place.flatten(1, 2))
    embeddings = normal(*inputs.tokens.shape, model.config.text.hidden_size)
    at = int((inputs.media[0] == 1).nonzero()[columns // 2])
    return batch, Embedded(embeddings, None, None, None, None), at


def shown_tokens(model: AutoGLMPhone, embedded: Embedded, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    tokens = embedded.embeddings[:1][batch.inputs.media[:1] == 1][None]
    return showing(model.config, tokens, torch.tensor([0]), batch)


def test_what_a_token_shows_is_found_among_its_patches() -> None:
    model = make_phone()
    batch, embedded, at = shown_batch(model)
    tokens, labels, places = shown_tokens(model, embedded, batch)
    assert labels.tolist() == [5] and places.tolist() == [[120, 900]]
    torch.testing.assert_close(tokens, rms(embedded.embeddings[0, at])[None])
    assert batch.patch_class is not None
    batch.patch_class.zero_()
    assert len(shown_tokens(model, embedded, batch)[0]) == 0


def test_naming_is_least_where_tokens_are_the_words() -> None:
    model = make_phone()
    names = Names(load_tokenizer())(model.text.embed_tokens).detach()
    batch, embedded, at = shown_batch(model)
    tokens, labels, _ = shown_tokens(model, embedded, batch)
    before = naming_loss(tokens, labels, names)
    scores = torch.stack([F.cosine_similarity(embedded.embeddings[0, at], each, dim=-1) for each in names])
    wanted = torch.full((len(LANGUAGES),), 5)
    torch.testing.assert_close(before, F.cross_entropy(scores * 16, wanted), rtol=1e-4, atol=1e-4)
    assert float(naming_loss(rms(names[:, 5].mean(0))[None], labels, names)) < float(before) - 1


def test_placing_reads_numbers_with_the_decoders_head() -> None:
    model, lesson = make_phone(), PlaceLesson(CONFIG)
    batch, embedded, _ = shown_batch(model)
    tokens, _, places = shown_tokens(model, embedded, batch)
    found = placing_loss(model, lesson, tokens, places, coordinates())
    by_hand = 0.0
    for axis, wanted in ((lesson.x, 120), (lesson.y, 900)):
        log_probs = torch.log_softmax(model.text.lm_head(axis(tokens)), dim=-1)[0, 500:1500]
        bell = torch.exp(-((torch.arange(1000) - wanted) ** 2) / (2 * COORDINATE_SIGMA**2))
        by_hand -= (bell / bell.sum() * log_probs).sum().item()
    assert found.item() == pytest.approx(by_hand, rel=1e-4)
    found.backward()
    assert lesson.x.weight.grad is not None and model.text.lm_head.weight.grad is not None


def test_what_is_shown_is_both_named_and_placed() -> None:
    model, lesson, names = make_phone(), PlaceLesson(CONFIG), Names(load_tokenizer())
    batch, embedded, _ = shown_batch(model)
    tokens, labels, places = shown_tokens(model, embedded, batch)
    parts = {
        "naming": naming_loss(tokens, labels, names(model.text.embed_tokens)).item(),
        "placing": placing_loss(model, lesson, tokens, places, coordinates()).item(),
    }
    all_tokens = embedded.embeddings[:1][batch.inputs.media[:1] == 1][None]
    found, facts = shown_loss(model, lesson, all_tokens, torch.tensor([0]), batch, names, coordinates())
    assert facts == pytest.approx(parts) and found.item() == pytest.approx(sum(parts.values()))
    assert batch.patch_class is not None
    batch.patch_class.zero_()
    nothing, facts = shown_loss(model, lesson, all_tokens, torch.tensor([0]), batch, names, coordinates())
    assert nothing.item() == 0 and facts == {}


def test_near_numbers_start_alike() -> None:
    head = torch.nn.Linear(256, 2048, bias=False)
    others = head.weight.detach().clone()
    smooth_numbers(head, NUMBERS)
    rows = F.normalize(head.weight.detach()[500:1500], dim=-1)
    near, far = (float((rows[:-gap] * rows[gap:]).sum(-1).mean()) for gap in (10, 400))
    assert near > 0.9 and abs(far) < 0.2
    assert torch.equal(head.weight[:500], others[:500]) and torch.equal(head.weight[1500:], others[1500:])


def test_writing_is_ctc_over_the_cosines_to_all_tokens() -> None:
    """Against a sum over all paths, and least where the sound's tokens are the words themselves."""
    table, blank = normal(60, 256), 3
    said, said_counts, counts = torch.tensor([[40, 7, 7]]), torch.tensor([2]), torch.tensor([5])
    heard = normal(1, 6, 256, seed=2)
    log_probs = torch.log_softmax(F.cosine_similarity(heard[0, :5, None], table, dim=-1) * 16, -1)[:, [blank, 40, 7]]
    paths = itertools.product(range(3), repeat=5)
    right = [p for p in paths if [c for i, c in enumerate(p) if c and (i == 0 or p[i - 1] != c)] == [1, 2]]
    by_hand = -torch.stack([log_probs[range(5), list(p)].sum() for p in right]).logsumexp(0) / 2
    found = writing_loss(token_scores(heard, table), counts, said, said_counts, blank)
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)
    heard[0, :5] = table[[blank, 40, blank, 7, 7]]
    assert float(writing_loss(token_scores(heard, table), counts, said, said_counts, blank)) < 0.1 * float(by_hand)


@pytest.mark.parametrize("seed", range(6))
def test_alignment_is_the_likeliest_of_all_paths(seed: int) -> None:
    """Rows of unlike lengths, one with a token said twice, one with too few sound tokens for what was said."""
    blank, said = 2, torch.tensor([[1, 1, 0], [3, 1, 3], [0, 3, 0], [1, 1, 1]])
    counts, said_counts = torch.tensor([6, 5, 4, 3]), torch.tensor([2, 3, 1, 3])
    scores = (normal(4, 6, 4, seed=seed) * 2).log_softmax(-1)
    found = align(scores, counts, said, said_counts, blank)
    assert not found[3].any(), "three of the same need five"
    for row in range(3):
        length, wanted = int(counts[row]), said[row, : said_counts[row]].tolist()
        best, likeliest = -math.inf, ()
        for path in itertools.product(range(4), repeat=length):
            collapsed = [c for i, c in enumerate(path) if c != blank and (i == 0 or path[i - 1] != c)]
            chance = float(scores[row, range(length), list(path)].sum())
            if collapsed == wanted and chance > best:
                best, likeliest = chance, path
        numbers = itertools.accumulate(
            int(c != blank and (i == 0 or likeliest[i - 1] != c)) for i, c in enumerate(likeliest)
        )
        by_hand = [n if c != blank else 0 for n, c in zip(numbers, likeliest, strict=True)]
        assert found[row].tolist() == by_hand + [0] * (6 - length)


def test_only_the_named_parts_are_trained() -> None:
    pupil = Pupil(CONFIG)
    train_only(pupil, (pupil.model.vision, pupil.places))
    trained = {name for name, parameter in pupil.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in pupil.named_parameters() if name.startswith(("model.vision.", "places."))}
