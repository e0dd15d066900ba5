"""Sampling against a slow, obvious reference, transformers' processors, and the exact probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceABC

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from autoglm.engine.sampling import Sampler, SamplingParams, _draw_of_top, _falling_order, sample
from autoglm.engine.sequence import Sequence
from autoglm.errors import EngineError, RequestError

VOCAB = 5000  # too many to be sorted outright, and not a multiple of the tile


def make_sequence(prompt: list[int], answer: list[int], **params: object) -> Sequence:
    sequence = Sequence("r", prompt, SamplingParams(**params))  # type: ignore[arg-type]
    sequence.set_max_tokens(1000)
    for token_id in answer:
        sequence.append(token_id)
    return sequence


def reference_probabilities(
    logits: NDArray[np.float32], prompt: list[int], answer: list[int], params: SamplingParams
) -> NDArray[np.float64]:
    """What the module's header says, in float64, by full sorts and loops."""
    x = logits.astype(np.float64)
    for i in set(prompt) | set(answer):
        x[i] = x[i] / params.repetition_penalty if x[i] > 0 else x[i] * params.repetition_penalty
    for i in set(answer):
        x[i] -= params.presence_penalty + params.frequency_penalty * answer.count(i)
    for i, bias in params.logit_bias.items():
        x[i] += bias
    for i in params.banned_token_ids:
        x[i] = -np.inf
    p = np.exp((x - x.max()) / params.temperature)
    order = sorted(range(len(p)), key=lambda i: (-x[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    total = p[order].sum()
    kept, mass = [], 0.0
    for i in order:
        if kept and mass >= params.top_p * total:
            break
        kept.append(i)
        mass += p[i]
    kept = [i for i in kept if p[i] >= params.min_p * p[order[0]]]
    out = np.zeros(len(p))
    out[kept] = p[kept]
    return out / out.sum()


def draw_many(
    logits: NDArray[np.float32], prompt: list[int], answer: list[int], num: int, **params: object
) -> NDArray[np.int64]:
    sampler = Sampler(logits.size)
    sequence = make_sequence(prompt, answer, **params)
    return np.array([sampler.sample(logits.copy(), sequence).token_id for _ in range(num)])


CASES = [
    {"temperature": 1.0},
    {"temperature": 0.5, "top_k": 7},
    {"temperature": 1.5, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 1.5, "frequency_penalty": 0.4},
    {"temperature": 1.0, "top_k": 30, "repetition_penalty": 1.4, "logit_bias": {3: 5.0, 9: -100.0}},
    {"temperature": 1.0, "top_p": 0.7, "banned_token_ids": frozenset({0, 1, 2, 700, 4999})},
]


@pytest.mark.parametrize("params", CASES, ids=[str(sorted(c)) for c in CASES])
def test_draws_follow_the_reference_distribution(params: dict[str, object]) -> None:
    """4,000 draws: never an id the reference forbids, and every frequent id within 5 standard errors."""
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal(VOCAB) * 3).astype(np.float32)
    prompt, answer = [1, 2, 3, 9, 9], [int(i) for i in np.argsort(-logits)[:5]] * 2 + [4]
    expected = reference_probabilities(logits, prompt, answer, SamplingParams(**params))  # type: ignore[arg-type]
    num = 4000
    drawn = draw_many(logits, prompt, answer, num, seed=11, **params)
    counts = np.bincount(drawn, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    error = np.abs(counts / num - expected)
    assert (error <= 5 * np.sqrt(expected * (1 - expected) / num) + 2 / num).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 4999, 5000, 9999]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.85, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    spread=st.sampled_from([0.0, 0.05, 2.0, 30.0]),
)
def test_support_is_the_references(seed: int, top_k: int, top_p: float, min_p: float, spread: float) -> None:
    """Whatever the filters, only ids the reference keeps are drawn; ties and flat rows too."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal(VOCAB) * spread, 2).astype(np.float32)
    params = {"temperature": 0.8, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    # A hair more top_p: at the very edge float32 and float64 may differ by one id.
    wider = {**params, "top_p": min(1.0, top_p + 1e-4)}
    expected = reference_probabilities(logits, [1], [], SamplingParams(**wider))  # type: ignore[arg-type]
    assert (expected[draw_many(logits, [1], [], 20, seed=seed, **params)] > 0).all()


def test_filters_match_transformers() -> None:
    """The ids that survive are those transformers' warpers let through (no ties, so no tie rule is in play)."""
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal(300) * 2).astype(np.float32)
    prompt, answer = [1, 2, 3], [7, 8, 7]
    warpers = [
        generation.RepetitionPenaltyLogitsProcessor(1.3),
        generation.TemperatureLogitsWarper(0.7),
        generation.TopKLogitsWarper(25),
        generation.TopPLogitsWarper(0.8),
        generation.MinPLogitsWarper(0.1),
    ]
    scores = torch.from_numpy(logits.copy())[None]
    for warper in warpers:
        scores = warper(torch.tensor([prompt + answer]), scores)
    theirs = set(torch.isfinite(scores[0]).nonzero().flatten().tolist())
    params = {"temperature": 0.7, "top_k": 25, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.3}
    ours = set(draw_many(logits, prompt, answer, 3000, seed=1, **params).tolist())
    assert ours <= theirs
    probable = torch.softmax(scores[0], 0)
    assert {i for i in theirs if probable[i] > 0.01} <= ours


def test_greedy_takes_the_lowest_of_equal_maxima() -> None:
    logits = np.zeros(100, np.float32)
    logits[[90, 40, 41]] = 3.0
    assert sample(logits, make_sequence([1], [], temperature=0.0)).token_id == 40
    logits[40] = 2.0
    assert sample(logits, make_sequence([1], [], temperature=0.0)).token_id == 41
    assert draw_many(logits, [1], [], 5, temperature=1.0, top_k=1).tolist() == [41] * 5


def test_penalties_cover_the_whole_answer_not_a_window() -> None:
    """One token 900 places back still counts, and every occurrence does."""
    logits = np.zeros(1000, np.float32)
    logits[5] = 1.0
    far = [5] + [6 + i for i in range(900)]
    assert sample(logits.copy(), make_sequence([1], far, temperature=0.0, presence_penalty=0.9)).token_id == 5
    assert sample(logits.copy(), make_sequence([1], far, temperature=0.0, presence_penalty=1.1)).token_id == 0
    five = make_sequence([5, 5, 5, 5, 5, 5], [5] * 4, temperature=0.0, frequency_penalty=0.2)
    assert sample(logits.copy(), five).token_id == 5  # 1 - 4 * 0.2 > 0: the prompt's do not count
    five.append(5)
    five.append(5)
    assert sample(logits.copy(), five).token_id == 0


def test_penalties_after_many_different_tokens_match_the_formula() -> None:
    """The growing tables give exactly what a Counter over the answer gives."""
    rng = np.random.default_rng(0)
    answer = rng.integers(0, 400, 3000).tolist()
    sequence = make_sequence([1, 2], answer, temperature=0.0, presence_penalty=0.3, frequency_penalty=-0.1)
    logits = rng.standard_normal(500).astype(np.float32)
    expected = logits.copy()
    for i in set(answer):
        expected[i] -= np.float32(0.3) + np.float32(-0.1) * np.float32(answer.count(i))
    sequence.sampler.apply(logits)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert (logits[400:] == expected[400:]).all()


def test_seed_fixes_the_draws_and_no_seed_varies() -> None:
    logits = np.zeros(1000, np.float32)
    same = [draw_many(logits, [1], [], 20, seed=42).tolist() for _ in range(2)]
    assert same[0] == same[1]
    assert draw_many(logits, [1], [], 20, seed=43).tolist() != same[0]
    assert draw_many(logits, [1], [], 20, seed=-42).tolist() != same[0]
    assert draw_many(logits, [1], [], 20).tolist() != draw_many(logits, [1], [], 20).tolist()


@pytest.mark.parametrize(
    ("spread", "params", "expected"),
    [
        (1.0, {"temperature": 1.0}, [0, 8532, 17646, 2947, 7527, 19732]),
        (0.2, {"temperature": 1.5, "top_p": 0.9}, [6239, 19689, 1129, 5232, 13707, 18998]),
        (0.0, {"top_p": 0.5}, [0, 4267, 8792, 1498, 3797, 9865]),
        (1.0, {"top_k": 5000}, [6239, 12014, 3151, 18800, 4996, 9914]),
        (2.0, {"temperature": 0.7, "top_p": 0.8, "min_p": 0.01}, [6239, 17846, 17210, 5658, 15640, 2120]),
    ],
)
def test_a_seed_draws_what_it_always_drew(spread: float, params: dict[str, object], expected: list[int]) -> None:
    """Recorded when sorting was NumPy's stable argsort: a faster way may not change an answer."""
    logits = (np.random.default_rng(17).standard_normal(20001) * spread).astype(np.float32)
    assert draw_many(logits, [1], [], 6, seed=4, **params).tolist() == expected


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("decimals", [1, 3, 8])
def test_every_draw_of_top_p_is_where_a_full_sort_has_it(decimals: int, top_p: float) -> None:
    """Ties, whole histogram bins and single weights of them; forbidden ids, and the prefix's last one."""
    logits = np.round(np.random.default_rng(8).standard_normal(20001), decimals).astype(np.float32)
    logits[::5] = -np.inf
    weights = np.exp(logits - logits.max())
    order = np.argsort(-weights, kind="stable")
    mass = weights[order].cumsum(dtype=np.float64)
    kept = int(mass.searchsorted(top_p * mass[-1])) + 1
    for uniform in [0.0, 1 - 2.0**-53, *np.random.default_rng(9).random(40).tolist()]:
        expected = order[min(int(mass[:kept].searchsorted(uniform * mass[kept - 1], side="right")), kept - 1)]
        assert _draw_of_top(weights, top_p * mass[-1], uniform) == expected


@pytest.mark.parametrize("drawn", [0, 1, 1000, 2000, 3999])  # whose quotients are exact too
def test_a_mass_that_is_met_exactly_ends_the_prefix_and_starts_the_next_token(drawn: int) -> None:
    """1000 weights of 1 in the histogram's first bin and 4000 of 1 - 2^-8 in its second, every sum exact."""
    weights = np.repeat(np.array([1.0, 1 - 2.0**-8], np.float32), [1000, 4000])
    mass = np.concatenate([[0.0], weights.cumsum(dtype=np.float64)])
    enough = float(mass[4000])
    uniform = float(mass[drawn]) / enough
    assert uniform * enough == mass[drawn]
    assert _draw_of_top(weights, enough, uniform) == drawn
    assert _draw_of_top(weights, enough, 1 - 2.0**-53) == 3999


def test_falling_order_is_a_stable_sort() -> None:
    """Ties, both zeros, both signs and forbidden ids, in a row too long to be sorted outright."""
    values = np.round(np.random.default_rng(6).standard_normal(9000), 2).astype(np.float32)
    values[::7], values[::11], values[::13] = 0.0, -0.0, -np.inf
    np.testing.assert_array_equal(_falling_order(values), np.argsort(-values, kind="stable"))


def test_logprobs_are_the_models_own() -> None:
    """Log-softmax of the logits as they came, whatever temperature, bias and bans did to the draw."""
    logits = (np.random.default_rng(2).standard_normal(VOCAB) * 4).astype(np.float32)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    best = int(logits.argmax())
    params: dict[str, object] = {"temperature": 0.3, "logit_bias": {3: 50.0}, "banned_token_ids": frozenset({best})}
    drawn = sample(logits.copy(), make_sequence([1], [3], logprobs=5, presence_penalty=2.0, **params))
    assert drawn.token_id == 3
    assert drawn.logprob == pytest.approx(exact[3], abs=1e-4)
    assert [i for i, _ in drawn.top] == np.argsort(-exact, kind="stable")[:5].tolist()
    assert [p for _, p in drawn.top] == pytest.approx(np.sort(exact)[::-1][:5].tolist(), abs=1e-4)
    assert sample(logits.copy(), make_sequence([1], [], logprobs=0)).top == []


class Mask:
    """A constraint that always allows the same ids."""

    def __init__(self, ids: list[int], words: int) -> None:
        self.words = np.zeros(words, np.uint32)
        for i in ids:
            self.words[i // 32] |= np.uint32(1 << (i % 32))

    def allowed(self) -> NDArray[np.uint32]:
        return self.words

    def forced(self) -> list[int]:
        return []

    def closing(self, token_ids: SequenceABC[int], room: int) -> list[int]:
        return []

    def accept(self, token_id: int) -> None: ...

    def is_stopped(self) -> bool:
        return False


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_allowed", [1, 3, 100, 1400, 4500])
@pytest.mark.parametrize("words", [150, 157, 170])
def test_constraint_mask(temperature: float, num_allowed: int, words: int) -> None:
    """Narrow masks (gathered) and wide ones (in place), shorter and longer than the vocabulary, read-only logits."""
    rng = np.random.default_rng(num_allowed)
    logits = rng.standard_normal(VOCAB).astype(np.float32)
    logits.flags.writeable = False
    allowed = sorted(rng.choice(min(VOCAB, words * 32), min(num_allowed, words * 32 - 1), replace=False).tolist())
    sequence = make_sequence([1], [], temperature=temperature, seed=1)
    sequence.constraint = Mask(allowed, words)
    drawn = {sample(logits, sequence).token_id for _ in range(10)}
    assert drawn <= set(allowed)
    if temperature == 0.0:
        assert drawn == {max(allowed, key=lambda i: (logits[i], -i))}


@pytest.mark.parametrize("vocab", [VOCAB - 3, VOCAB])
def test_a_wide_mask_leaves_nothing_of_the_rest(vocab: int) -> None:
    """Logprobs stay the model's, a NaN at a forbidden id does not count, one at an allowed id is an error."""
    logits = np.random.default_rng(8).standard_normal(vocab).astype(np.float32)
    best = int(logits.argmax())
    sequence = make_sequence([1], [], temperature=0.0, logprobs=1)
    sequence.constraint = Mask([i for i in range(vocab) if i != best], 157)
    drawn = sample(logits, sequence)
    assert drawn.token_id == int(np.argsort(-logits)[1]) and drawn.top[0][0] == best
    plain = make_sequence([1], [], temperature=0.0)
    plain.constraint = sequence.constraint
    logits[best] = np.nan
    assert sample(logits.copy(), plain).token_id == drawn.token_id
    logits[vocab - 1] = np.nan
    with pytest.raises(EngineError, match="not finite"):
        sample(logits, plain)


def test_bans_hold_under_a_mask() -> None:
    logits = np.zeros(VOCAB, np.float32)
    sequence = make_sequence([1], [], temperature=0.0, banned_token_ids=frozenset({5}))
    sequence.constraint = Mask([5, 9], 157)
    assert sample(logits.copy(), sequence).token_id == 9
    sequence.constraint = Mask([5], 157)
    with pytest.raises(EngineError, match="forbid all"):
        sample(logits.copy(), sequence)
    sequence.constraint = Mask([], 157)
    with pytest.raises(EngineError, match="allows none"):
        sample(logits.copy(), sequence)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {}, {"logprobs": 2}, {"frequency_penalty": 0.2}, {"top_k": 5}]
)
def test_logits_that_are_not_finite_are_an_error(bad: float, params: dict[str, object]) -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[700] = bad
    with pytest.raises(EngineError, match="not finite"):
        sample(logits, make_sequence([1], [2], **params))
    with pytest.raises(EngineError, match="not finite"):
        sample(np.full(VOCAB, -np.inf, np.float32), make_sequence([1], []))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True), ("temperature", -0.1), ("temperature", 2.1),
        ("temperature", math.nan), ("temperature", "hot"), ("temperature", None), ("top_k", -2), ("top_k", 1.0),
        ("top_p", -0.1), ("top_p", 1.1), ("min_p", 2), ("presence_penalty", 2.5), ("frequency_penalty", -2.5),
        ("repetition_penalty", 0), ("repetition_penalty", math.inf), ("logit_bias", {1: 101.0}),
        ("logit_bias", {-1: 1.0}), ("logit_bias", {"1": 1.0}), ("logit_bias", dict.fromkeys(range(5000), 1.0)),
        ("seed", 1 << 64), ("seed", 1.5), ("logprobs", 21), ("logprobs", -1), ("logprobs", True), ("stop", "text"),
        ("stop", ("",)), ("stop", ("a",) * 17), ("stop", ("a" * 1025,)), ("stop", (1,)),
        ("stop_token_ids", frozenset({-1})), ("banned_token_ids", frozenset({"a"})),
    ],
)  # fmt: skip
def test_bad_values_name_their_field(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field and field in str(caught.value) and len(str(caught.value)) < 200


def test_edges_of_the_ranges_are_taken() -> None:
    SamplingParams(temperature=0, top_p=0, top_k=-1, min_p=1, presence_penalty=-2, frequency_penalty=2, seed=-(1 << 63))
    SamplingParams(temperature=2, top_p=1.0, logit_bias={0: -100, 5: 100}, logprobs=20, seed=(1 << 64) - 1)
    assert SamplingParams(temperature=1e-6).is_greedy and not SamplingParams(temperature=1e-4).is_greedy
