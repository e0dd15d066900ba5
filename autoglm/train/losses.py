"""What training minimizes: the words, the encoders' own lessons, trust in sounds, and the teacher's example."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoglm.train.dataset import Batch, alphabet
from autoglm.train.model.fusion import rms
from autoglm.train.model.phone import AutoGLMPhone, Embedded, Inputs
from autoglm.train.model.presets import PhoneConfig
from autoglm.train.model.text import DecoderLayer, rope_tables, rotate
from autoglm.train.rows import NO_TARGET, RowEncoder
from autoglm.train.tokenizer import NanoTokenizer
from autoglm.train.world.labels import LABELS, LANGUAGES, VISIBLE

# A coordinate a little off still lands: its target is a bell over the numbers, this many units (of 1000) wide.
COORDINATE_SIGMA = 6.0
NUMBER_KERNEL = 40.0
COORDINATE_WEIGHT = 0.5
# Most patches show nothing that has a name.
BACKGROUND_WEIGHT = 0.15
# At this signal-to-noise ratio (dB) a sound is half trusted, and 6 dB change the odds e-fold.
HALF_TRUST_SNR = 8.0
SNR_PER_NAT = 6.0
# The layer whose first head learns to point: the last but one, so that the last can read what it found.
POINTING_LAYER_FROM_END = 2


class PatchLesson(nn.Module):
    """Training's own head on the eyes: which label each patch shows, and where that label's middle lies."""

    def __init__(self, config: PhoneConfig) -> None:
        super().__init__()
        self.label = nn.Linear(config.vision.hidden_size, len(VISIBLE) + 1)
        self.offset = nn.Linear(config.vision.hidden_size, 2)


class PlaceLesson(nn.Module):
    """Training's own maps from a picture token to what the decoder would have to hold to write its x, and its y."""

    def __init__(self, config: PhoneConfig) -> None:
        super().__init__()
        width = config.text.hidden_size
        self.x, self.y = nn.Linear(width, width), nn.Linear(width, width)


class CharacterLesson(nn.Module):
    """Training's own head on the ears: which character is heard, 0 for none."""

    def __init__(self, config: PhoneConfig) -> None:
        super().__init__()
        assert config.audio is not None
        self.characters = nn.Linear(config.audio.hidden_size, len(alphabet()) + 1)


class NameLesson(nn.Module):
    """Training's first head on the ears: which name of a thing, in which language, is said."""

    def __init__(self, config: PhoneConfig) -> None:
        super().__init__()
        assert config.audio is not None
        self.names = nn.Linear(config.audio.hidden_size, len(LABELS) * len(LANGUAGES))


class Coordinates(nn.Module):
    """Soft targets for coordinates: number n -> a normalized bell around n over the tokens of 0 to 999."""

    bells: Tensor
    number_ids: Tensor
    number_of: Tensor

    def __init__(self, number_ids: tuple[int, ...], vocab_size: int) -> None:
        super().__init__()
        numbers = torch.arange(1000.0)
        bells = torch.exp(-((numbers[:, None] - numbers) ** 2) / (2 * COORDINATE_SIGMA**2))
        self.register_buffer("bells", bells / bells.sum(1, keepdim=True), persistent=False)
        self.register_buffer("number_ids", torch.tensor(number_ids), persistent=False)
        number_of = torch.zeros(vocab_size, dtype=torch.long)
        number_of[self.number_ids] = torch.arange(1000)
        self.register_buffer("number_of", number_of, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy [n] of logits [n, vocabulary] against the bells around targets [n] (token ids of numbers)."""
        log_probs = F.log_softmax(logits, dim=-1)[:, self.number_ids]
        return -(self.bells[self.number_of[targets]] * log_probs).sum(-1)


@torch.no_grad()
def smooth_numbers(head: nn.Linear, number_ids: Sequence[int]) -> None:
    """Start the rows of the numbers 0 to 999 as random Fourier features, so that near numbers are scored alike.

    Features of a Gaussian kernel NUMBER_KERNEL wide (Rahimi and Recht 2007). From unlike rows, each number would have
    to be met often before its place is known.
    """
    frequency = torch.randn(head.in_features // 2) / NUMBER_KERNEL
    angle = torch.arange(1000.0)[:, None] * frequency
    rows = torch.cat([angle.cos(), angle.sin()], dim=1) * 2**0.5 * head.weight.std()
    head.weight[torch.tensor(number_ids)] = rows.to(head.weight)


def patch_loss(lesson: PatchLesson, patches: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Which label each patch shows (cross-entropy) and where its middle lies (smooth L1)."""
    assert batch.patch_class is not None and batch.patch_offset is not None
    scores = lesson.label(patches).flatten(0, 1)
    wanted = batch.patch_class.flatten()
    weight = torch.where(wanted > 0, 1.0, BACKGROUND_WEIGHT)
    classes = (F.cross_entropy(scores, wanted, reduction="none") * weight).sum() / weight.sum()
    named = batch.patch_class > 0
    offsets, right = scores.new_zeros(()), scores.new_ones(())
    # A mean over nothing is not a number, and one such batch would end a run.
    if named.any():
        offsets = F.smooth_l1_loss(lesson.offset(patches)[named], batch.patch_offset[named], beta=0.02)
        with torch.no_grad():
            right = (scores.argmax(-1) == wanted)[wanted > 0].float().mean()
    return classes + 5.0 * offsets, {
        "patch": float(classes.detach()),
        "offset": float(offsets.detach()),
        "patch_acc": float(right),
    }


def character_loss(
    lesson: CharacterLesson, sound: Tensor, mask: Tensor, batch: Batch
) -> tuple[Tensor, dict[str, float]]:
    """CTC (Graves et al. 2006) over the characters that were said."""
    assert batch.characters is not None and batch.character_counts is not None
    log_probs = F.log_softmax(lesson.characters(sound).float(), dim=-1)
    loss = F.ctc_loss(
        log_probs.transpose(0, 1), batch.characters, mask.sum(1), batch.character_counts, zero_infinity=True
    )
    with torch.no_grad():
        best = log_probs.argmax(-1) * mask
        wrong = [
            _collapse(row) != said[:count].tolist()
            for row, said, count in zip(best.tolist(), batch.characters, batch.character_counts.tolist(), strict=True)
        ]
    return loss, {"ctc": float(loss.detach()), "heard": 1.0 - sum(wrong) / len(wrong)}


def name_loss(lesson: NameLesson, sound: Tensor, mask: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Which name is said, from the mean of a sound's features.

    CTC alone answers with blanks for thousands of steps; features that tell names apart spell after a few hundred.
    """
    assert batch.names is not None
    mean = (sound * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    scores = lesson.names(mean)
    loss = F.cross_entropy(scores, batch.names)
    return loss, {"name": float(loss.detach()), "named": float((scores.argmax(-1) == batch.names).float().mean())}


def _collapse(path: list[int]) -> list[int]:
    """A CTC path without repetitions and blanks."""
    return [c for index, c in enumerate(path) if c and (index == 0 or path[index - 1] != c)]


def word_logits(model: AutoGLMPhone, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and coordinate marks at the positions that have a target: [n, vocabulary], [n], [n]."""
    wanted = batch.targets != NO_TARGET
    return model.text.lm_head(hidden[wanted]).float(), batch.targets[wanted], batch.coordinates[wanted]


def word_loss(
    logits: Tensor, targets: Tensor, is_coordinate: Tensor, coordinates: Coordinates
) -> tuple[Tensor, dict[str, float]]:
    """Next-token cross-entropy of the words, and half of that of the coordinates against their bells.

    Two means, not one: of forty tokens two are coordinates, and in a common mean nearly nothing asks for them.
    """
    words = F.cross_entropy(logits[~is_coordinate], targets[~is_coordinate])
    with torch.no_grad():
        right = (logits.argmax(-1) == targets)[~is_coordinate].float().mean()
    facts = {"words": float(words.detach()), "token_acc": float(right)}
    if not is_coordinate.any():
        return words, facts
    places = coordinates(logits[is_coordinate], targets[is_coordinate])
    facts["coordinates"] = float(places.mean().detach())
    with torch.no_grad():
        guess = logits[is_coordinate][:, coordinates.number_ids].argmax(-1)
        facts["off"] = float((guess - coordinates.number_of[targets[is_coordinate]]).abs().float().median())
    return words + COORDINATE_WEIGHT * places.mean(), facts


class Names(nn.Module):
    """What every visible label is called, in the tokens that sentences name it with, English ones after a space.

    ids and mask [languages, labels, tokens of the longest name].
    """

    ids: Tensor
    mask: Tensor

    def __init__(self, tokenizer: NanoTokenizer) -> None:
        super().__init__()
        rows = RowEncoder(tokenizer)
        names = [[rows.said(label.text(language), language) for label in VISIBLE] for language in LANGUAGES]
        longest = max(len(name) for each in names for name in each)
        padded = [[name + [0] * (longest - len(name)) for name in each] for each in names]
        lengths = torch.tensor([[len(name) for name in each] for each in names])
        self.register_buffer("ids", torch.tensor(padded), persistent=False)
        self.register_buffer("mask", torch.arange(longest) < lengths[..., None], persistent=False)

    def forward(self, embedding: nn.Embedding) -> Tensor:
        """The mean of each name's token embeddings: [languages, labels, D]."""
        mask = self.mask[..., None]
        mean: Tensor = (embedding(self.ids) * mask).sum(dim=2) / mask.sum(dim=2)
        return mean


def showing(config: PhoneConfig, tokens: Tensor, image_of: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Every picture token once for each of its patches that shows something named.

    tokens [R, t, D]: the tokens of R pictures, image_of [R] which of the batch's pictures each is. Gives the tokens
    normed [n, D], the number of the label [n] from 0, and its place [n, 2].
    """
    assert batch.patch_class is not None and batch.patch_place is not None and batch.inputs.images is not None
    patch, merge = config.vision.patch_size, config.vision.merge_size
    rows, columns = (side // patch // merge for side in batch.inputs.images.shape[2:])

    def of_tokens(values: Tensor) -> Tensor:
        """[S, P, n] by patches -> [R, t, patches of a token, n]."""
        merged = values.view(-1, rows, merge, columns, merge, values.shape[-1]).transpose(2, 3)
        return merged.flatten(3, 4).flatten(1, 2)[image_of]

    shown, places = of_tokens(batch.patch_class[..., None])[..., 0], of_tokens(batch.patch_place)
    row, token, part = (shown > 0).nonzero(as_tuple=True)
    return rms(tokens[row, token]), shown[row, token, part] - 1, places[row, token, part]


def shown_loss(
    model: AutoGLMPhone,
    lesson: PlaceLesson,
    tokens: Tensor,
    image_of: Tensor,
    batch: Batch,
    names: Names,
    coordinates: Coordinates,
) -> tuple[Tensor, dict[str, float]]:
    """Naming and placing of all that the pictures show; tokens [R, t, D] and image_of [R] as of `showing`."""
    tokens, labels, places = showing(model.config, tokens, image_of, batch)
    if not len(tokens):
        return tokens.sum(), {}
    naming = naming_loss(tokens, labels, names(model.text.embed_tokens))
    placing = placing_loss(model, lesson, tokens, places, coordinates)
    return naming + placing, {"naming": float(naming.detach()), "placing": float(placing.detach())}


def naming_loss(tokens: Tensor, labels: Tensor, names: Tensor) -> Tensor:
    """Picture tokens lie near the words for what they show: cross-entropy over the cosines to all names.

    A question names one thing of a screen; this names all of them at once. tokens and labels as of `showing`,
    names [languages, labels, D].
    """
    scores = torch.einsum("nd,gcd->ngc", tokens, rms(names)) * tokens.shape[-1] ** -0.5
    return F.cross_entropy(scores.flatten(0, 1), labels[:, None].expand(-1, len(names)).flatten())


def placing_loss(
    model: AutoGLMPhone, lesson: PlaceLesson, tokens: Tensor, places: Tensor, coordinates: Coordinates
) -> Tensor:
    """Picture tokens hold where to touch what they show, in the form that the decoder's head reads numbers from."""
    return sum(
        (
            coordinates(model.text.lm_head(axis(tokens)), coordinates.number_ids[places[:, index]]).mean()
            for index, axis in enumerate((lesson.x, lesson.y))
        ),
        tokens.new_zeros(()),
    )


def token_scores(tokens: Tensor, table: Tensor) -> Tensor:
    """How near sound tokens [R, t, D] lie to each token of the vocabulary: log-softmax of the cosines, [R, t, V]."""
    return F.log_softmax((rms(tokens) @ rms(table).T * tokens.shape[-1] ** -0.5).float(), dim=-1)


def writing_loss(scores: Tensor, counts: Tensor, said: Tensor, said_counts: Tensor, blank: int) -> Tensor:
    """Sound tokens lie near the tokens of the words said: CTC (Graves et al. 2006) over `token_scores`.

    A command heard then reads like one typed, and what typing taught holds. scores [R, t, V] with counts [R] of real
    tokens, said [R, N] with said_counts [R]; blank is the token of silence.
    """
    return F.ctc_loss(scores.transpose(0, 1), said, counts, said_counts, blank=blank, zero_infinity=True)


def pointing_loss(model: AutoGLMPhone, inputs: Inputs, layer_inputs: Sequence[Tensor], batch: Batch) -> Tensor | None:
    """Where one head looks while it is decided whether a thing is there, while its place or its name is written.

    Minus the log of its attention to the tokens that show the thing, or to the picture's beginning when none does.
    Finding the place is one head's work, and found by chance it takes thousands of steps; shown where to look it takes
    hundreds (supervised attention, Liu et al. 2016). None where the batch looks for nothing.
    """
    if batch.pointed is None or batch.looking is None:
        return None
    rows, at = batch.looking.nonzero(as_tuple=True)
    if not len(rows):
        return None
    shown = (batch.pointed[rows] & batch.looking[rows, at][:, None]) > 0
    return _looking(model, inputs, layer_inputs, slice(model.config.text.head_dim), rows, at, shown)


def copying_loss(
    model: AutoGLMPhone, inputs: Inputs, layer_inputs: Sequence[Tensor], batch: Batch, aligned: Tensor
) -> Tensor | None:
    """Where the last head of the same layer looks while what was said is written down: at the sound of that token.

    aligned [B, L]: which token said each sound token stands for, see `align`. Without it the decoder writes sentences
    it knows instead of what it hears. None where nothing is written down.
    """
    if batch.copying is None:
        return None
    rows, at = (batch.copying > 0).nonzero(as_tuple=True)
    sounds = aligned[rows] == batch.copying[rows, at][:, None]
    heard = sounds.any(dim=1)
    if not heard.any():
        return None
    last = slice(-model.config.text.head_dim, None)
    return _looking(model, inputs, layer_inputs, last, rows[heard], at[heard], sounds[heard])


def _looking(
    model: AutoGLMPhone,
    inputs: Inputs,
    layer_inputs: Sequence[Tensor],
    head: slice,
    rows: Tensor,
    at: Tensor,
    shown: Tensor,
) -> Tensor:
    """Minus the log of what one head of the pointing layer gives, from tokens `at` [n] of `rows` [n], to shown [n, L].

    head: its part of the queries, and that of its key-value head of the keys.
    """
    index = len(model.text.layers) - POINTING_LAYER_FROM_END
    layer = model.text.layers[index]
    assert isinstance(layer, DecoderLayer)
    x = layer.input_layernorm(layer_inputs[index])
    cos, sin = rope_tables(model.config.text, inputs.positions)

    def one_head(projection: nn.Linear) -> Tensor:
        return rotate(F.linear(x, projection.weight[head], projection.bias[head])[:, None], cos, sin)[:, 0]

    q, k = one_head(layer.self_attn.q_proj)[rows, at], one_head(layer.self_attn.k_proj)[rows]
    scores = (k @ q[..., None])[..., 0] * q.shape[-1] ** -0.5
    after = torch.arange(scores.shape[1], device=scores.device) > at[:, None]
    log_probs = F.log_softmax(scores.masked_fill(after | ~inputs.valid[rows], -torch.inf), dim=-1)
    return -log_probs.masked_fill(~shown, -torch.inf).logsumexp(dim=-1).mean()


@torch.no_grad()
def align(scores: Tensor, counts: Tensor, said: Tensor, said_counts: Tensor, blank: int) -> Tensor:
    """The likeliest CTC path (Viterbi): which token said, 1 upwards, each sound token stands for, 0 for silence.

    Arguments as of `writing_loss`; [R, t], all 0 in rows with too few sound tokens for what was said.
    """
    rows, length = scores.shape[:2]
    # States: silence before each token, the token, and silence at the end.
    states = 2 * said.shape[1] + 1
    symbols = torch.full((rows, states), blank, device=said.device)
    symbols[:, 1::2] = said
    emitted = scores.gather(2, symbols[:, None].expand(-1, length, -1))
    skips = torch.zeros_like(symbols, dtype=torch.bool)
    skips[:, 3::2] = said[:, 1:] != said[:, :-1]
    best = torch.full_like(emitted[:, 0], -torch.inf)
    best[:, :2] = emitted[:, 0, :2]
    back = []
    for step in range(1, length):
        one = F.pad(best, (1, 0), value=-torch.inf)[:, :-1]
        two = F.pad(best, (2, 0), value=-torch.inf)[:, :-2].masked_fill(~skips, -torch.inf)
        reached, came = torch.stack([best, one, two]).max(dim=0)
        # Past its end a row stays where it is.
        going = (step < counts)[:, None]
        best = torch.where(going, reached + emitted[:, step], best)
        back.append(came.masked_fill(~going, 0))
    last = 2 * said_counts[:, None]
    ends = best.gather(1, torch.cat([last - 1, last], dim=1))
    state = torch.where(ends[:, 1] > ends[:, 0], last[:, 0], last[:, 0] - 1)
    path = [state]
    for came in reversed(back):
        state = state - came.gather(1, state[:, None])[:, 0]
        path.append(state)
    found = torch.stack(path[::-1], dim=1)
    real = torch.arange(length, device=counts.device) < counts[:, None]
    is_token = (found % 2 == 1) & real & torch.isfinite(ends.amax(dim=1))[:, None]
    return torch.where(is_token, (found + 1) // 2, 0)


def trust_loss(embedded: Embedded, batch: Batch) -> Tensor:
    """The audio weight against the sound's quality: it is told to rise with the signal-to-noise ratio, 0.1 to 0.7."""
    assert embedded.fused is not None and batch.snr is not None and batch.inputs.sound_of is not None
    rows = batch.inputs.sound_of >= 0
    weights = embedded.fused.weights[rows]
    others = (weights > 0).sum(1) - 1
    rows_with_others = others > 0
    if not rows_with_others.any():
        return weights.sum() * 0.0
    snr = batch.snr[batch.inputs.sound_of[rows]][rows_with_others]
    target = torch.sigmoid((snr - HALF_TRUST_SNR) / SNR_PER_NAT) * 0.6 + 0.1
    return F.binary_cross_entropy(weights[rows_with_others, 1].clamp(1e-4, 1 - 1e-4), target)


def follow_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Hinton et al. 2015: KL from the teacher's softened distribution to the student's, times temperature squared."""
    return F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        log_target=True,
        reduction="batchmean",
    ) * (temperature**2)


def feature_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared distance between features of equal width, relative to the teacher's mean square."""
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    return F.mse_loss(student, teacher) / teacher.pow(2).mean().clamp(min=1e-6)
