"""The decoder: equal to transformers' Glm4v text model, and who sees whom in the three attention modes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autoglm.train.model import AutoGLMPhone, TextConfig, preset
from autoglm.train.model.phone import Inputs
from autoglm.train.model.presets import ATTENTION_MODES, AttentionMode
from autoglm.train.model.text import DecoderCache, TextModel, attention_mask
from autoglm.train.pruning import without_ffn
from tests.train.phones import make_phone
from tests.train.random_weights import randomize

# Unequal sections and 16 of 32 channels turned: a swapped axis or a wrong pairing shows.
CONFIG = TextConfig(
    vocab_size=96,
    hidden_size=64,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    ffn_size=96,
    rope_dim=16,
    rope_sections=(1, 3, 4),
    context_length=512,
)
LENGTH = 14
# Text, a picture of four tokens, text, a sound of three, text; the user turn is tokens 1 to 10.
MEDIA = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 0, 0, 0, 0]])
TURN = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
VALID = torch.ones(1, LENGTH, dtype=torch.bool)


def make_text(config: TextConfig = CONFIG, seed: int = 0) -> TextModel:
    model = randomize(TextModel(config), seed=seed)
    assert isinstance(model, TextModel)
    return model


def random_positions(length: int, seed: int = 5) -> Tensor:
    return torch.randint(0, 60, (3, 1, length), generator=torch.Generator().manual_seed(seed))


def transformers_logits(ours: TextModel, tokens: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    """What transformers' Glm4v text model says with these weights; where ours is pruned, its FFN adds zero."""
    glm4v = pytest.importorskip("transformers.models.glm4v.modeling_glm4v")
    configuration = pytest.importorskip("transformers.models.glm4v.configuration_glm4v")
    config = ours.config
    theirs = glm4v.Glm4vTextModel(
        configuration.Glm4vTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config.rope_theta,
                "partial_rotary_factor": config.rope_dim / config.head_dim,
                "mrope_section": list(config.rope_sections),
            },
            attn_implementation="eager",
        )
    ).eval()
    state = {name: value for name, value in ours.state_dict().items() if not name.startswith("lm_head")}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(int(name.split(".")[1]) in config.pruned_ffn for name in missing)
    with torch.no_grad():
        for layer in config.pruned_ffn:
            theirs.layers[layer].post_mlp_layernorm.weight.zero_()
        if mask is not None:
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        found = theirs(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)
        return ours.lm_head(found.last_hidden_state)


def logits_of(model: TextModel, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return model.lm_head(model(model.embed_tokens(tokens), positions, mask))


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def some_tokens(length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pruned", [(), (1,), (0, 2)])
def test_decoder_equals_transformers_with_three_axis_positions(pruned: tuple[int, ...]) -> None:
    whole = make_text()
    model = TextModel(replace(CONFIG, pruned_ffn=pruned)).eval()
    state = without_ffn({f"text.{name}": value for name, value in whole.state_dict().items()}, pruned)
    model.load_state_dict({name.removeprefix("text."): value for name, value in state.items()})
    tokens, positions = some_tokens(), random_positions(LENGTH)
    ours = logits_of(model, tokens, positions, attention_mask("causal", VALID, MEDIA, TURN))
    assert relative(ours, transformers_logits(model, tokens, positions)) < 1e-5
    if pruned:
        assert relative(ours, transformers_logits(whole, tokens, positions)) > 1e-3, "the FFN mattered"


def test_each_bias_and_section_reaches_the_logits() -> None:
    """What the comparison above would miss if these weights made no difference."""
    model, tokens, positions = make_text(), some_tokens(), random_positions(LENGTH)
    mask = attention_mask("causal", VALID, MEDIA, TURN)
    before = logits_of(model, tokens, positions, mask)
    for axis in range(3):
        moved = positions.clone()
        moved[axis, 0, LENGTH // 2 :] += 3
        assert relative(logits_of(model, tokens, moved, mask), before) > 1e-4, axis
    for name in ("q_proj", "k_proj", "v_proj"):
        changed = make_text()
        with torch.no_grad():
            changed.get_submodule(f"layers.0.self_attn.{name}").bias.zero_()  # type: ignore[operator,union-attr]
        assert relative(logits_of(changed, tokens, positions, mask), before) > 1e-4, name


@pytest.mark.parametrize("mode", ["media", "turn"])
def test_two_way_modes_equal_transformers_under_the_same_mask(mode: AttentionMode) -> None:
    model, tokens, positions = make_text(), some_tokens(), random_positions(LENGTH)
    mask = attention_mask(mode, VALID, MEDIA, TURN)
    found = logits_of(model, tokens, positions, mask)
    assert relative(found, transformers_logits(model, tokens, positions, mask)) < 1e-5
    causal = logits_of(model, tokens, positions, attention_mask("causal", VALID, MEDIA, TURN))
    assert relative(found, causal) > 1e-3, "the mode made no difference"


@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_masks_are_exactly_the_rule(mode: AttentionMode) -> None:
    """Written down pair by pair, with two rows, one padded on the left."""
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, :3] = False
    media, turn = MEDIA.repeat(2, 1), TURN.repeat(2, 1)
    media[1, :5] = 0
    turn[1, 11:13] = 2
    mask = attention_mask(mode, valid, media, turn)
    assert mask.shape == (2, 1, LENGTH, LENGTH)
    for row in range(2):
        for query in range(LENGTH):
            for key in range(LENGTH):
                sees = key <= query
                if mode == "media" and media[row, query] == media[row, key] != 0:
                    sees = True
                if mode == "turn" and turn[row, query] == turn[row, key] != 0:
                    sees = True
                sees = sees and bool(valid[row, key]) or query == key
                assert bool(mask[row, 0, query, key]) == sees, (mode, row, query, key)


def changed_places(mode: AttentionMode, place: int) -> set[int]:
    """Which tokens' hidden states change when the token at `place` becomes another one."""
    model, positions = make_text(), random_positions(LENGTH)
    mask = attention_mask(mode, VALID, MEDIA, TURN)
    tokens = some_tokens()
    other = tokens.clone()
    other[0, place] = (other[0, place] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        one, two = (model(model.embed_tokens(each), positions, mask) for each in (tokens, other))
    return {int(i) for i in torch.nonzero((one != two).any(-1)[0])}


def test_who_notices_a_changed_token() -> None:
    later = {place: set(range(place, LENGTH)) for place in range(LENGTH)}
    for place in (1, 5, 6, 9, 10, 12):
        assert changed_places("causal", place) == later[place]
    # In `media` nobody before a word sees it; a picture's last token is seen by the whole picture, not before it.
    for word in (1, 6, 10, 12):
        assert changed_places("media", word) == later[word]
    assert changed_places("media", 5) == later[2] and changed_places("media", 9) == later[7]
    # In `turn` the whole user turn sees its last word; the token before the turn does not.
    assert changed_places("turn", 10) == later[1] and changed_places("turn", 11) == later[11]


def test_finished_turns_stay_as_they_were_when_another_follows() -> None:
    """What makes a KV cache of `turn` mode valid: old hidden states do not move, a cached pass equals a whole one."""
    model, positions, tokens = make_text(), random_positions(2 * LENGTH), some_tokens(2 * LENGTH)
    valid = torch.ones(1, 2 * LENGTH, dtype=torch.bool)
    turn = torch.cat([TURN, TURN * 2], dim=1)
    media = torch.cat([MEDIA, torch.where(MEDIA > 0, MEDIA + 2, 0)], dim=1)
    for mode in ATTENTION_MODES:
        mask = attention_mask(mode, valid, media, turn)
        cache = DecoderCache()
        with torch.no_grad():
            embeddings = model.embed_tokens(tokens)
            whole = model(embeddings, positions, mask)
            first = model(embeddings[:, :LENGTH], positions[..., :LENGTH], mask[:, :, :LENGTH, :LENGTH], cache)
            second = model(embeddings[:, LENGTH:], positions[..., LENGTH:], mask[:, :, LENGTH:], cache)
        torch.testing.assert_close(first, whole[:, :LENGTH], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second, whole[:, LENGTH:], rtol=1e-5, atol=1e-5)


# --- generation ----------------------------------------------------------------------------------------------


def padded_inputs() -> Inputs:
    """Three prompts of 9, 6 and 4 tokens padded on the left; picture tokens (embedded as they are) in the first."""
    sizes, length = (9, 6, 4), 9
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 2000, (3, length), generator=generator)
    valid, positions = torch.zeros(3, length, dtype=torch.bool), torch.zeros(3, 3, length, dtype=torch.long)
    media, turn = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, size in enumerate(sizes):
        valid[row, length - size :] = True
        positions[:, row, length - size :] = torch.arange(size)
        turn[row, length - size + 1 : length - 2] = 1
    media[0, 2:5] = 1
    # As behind a picture: the numbers of the three axes differ, and the rest goes on after the largest.
    positions[:, 0, 2:5] = torch.tensor([[2, 2, 2], [2, 3, 4], [2, 2, 2]])
    return Inputs(tokens, positions, valid, media, turn, torch.zeros_like(valid))


def one_row(inputs: Inputs, row: int, more: list[int]) -> Inputs:
    """The prompt without its padding, with `more` written after it."""
    keep = inputs.valid[row]
    count = int(keep.sum()) + len(more)
    start = int(inputs.positions[:, row].max()) + 1
    positions = torch.cat([inputs.positions[:, row, keep], torch.arange(start, start + len(more)).expand(3, -1)], dim=1)
    rest = torch.zeros(len(more), dtype=torch.long)
    written = torch.tensor(more, dtype=torch.long)
    tokens, media, turn = (
        torch.cat([part[row, keep], new])[None]
        for part, new in ((inputs.tokens, written), (inputs.media, rest), (inputs.turn, rest))
    )
    valid = torch.ones(1, count, dtype=torch.bool)
    return Inputs(tokens, positions[:, None], valid, media, turn, ~valid)


def by_full_passes(model: AutoGLMPhone, inputs: Inputs, row: int, count: int) -> list[int]:
    """Greedy tokens where every step reads everything again."""
    written: list[int] = []
    with torch.no_grad():
        while len(written) < count:
            written.append(int(model(one_row(inputs, row, written))[0, -1].argmax()))
    return written


@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_cached_generation_equals_full_passes(mode: AttentionMode) -> None:
    model = make_phone(preset("smoke").with_text(attention_mode=mode))
    inputs, count = padded_inputs(), 6
    wanted = [by_full_passes(model, inputs, row, count) for row in range(3)]
    assert model.generate(inputs, count, frozenset()) == wanted
    assert len({tuple(row) for row in wanted}) == 3 and len(set(wanted[0])) > 1
    # A row that stops first leaves the others' caches and positions in their places.
    stop = wanted[1][1]
    cut = [row[: row.index(stop)] if stop in row else row for row in wanted]
    assert model.generate(inputs, count, frozenset({stop})) == cut and len(cut[1]) <= 1
