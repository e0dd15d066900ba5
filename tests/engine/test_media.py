"""Media in the engine: answers do not depend on caches, chunks, slices or company; nothing is encoded twice."""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
import pytest

from autoglm.config import EngineConfig
from autoglm.engine import engine as engine_module
from autoglm.engine.batch import Batch
from autoglm.engine.encoder_queue import EncoderQueue
from autoglm.engine.engine import Engine
from autoglm.engine.sampling import SamplingParams
from autoglm.engine.sequence import Sequence, SequenceOutput
from autoglm.errors import RequestError
from autoglm.media.prompt_media import Encoded, MediaJob, MediaSpan, PromptMedia, TurnFusion
from autoglm.media.recently_used import RecentlyUsed
from tests.engine.fake_runner import FakeRunner, FakeTokenizer, default_pieces
from tests.engine.harness import draft_always

WIDTH, PLACEHOLDER = 4, 9


class Clock:
    """A clock that only the encoder's slices move, in place of the engine's module `time`."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


class Encoder:
    """Makes the embeddings of picture `seed` in a number of slices; counts what it began, finished and gave up."""

    def __init__(self, slices: int = 3) -> None:
        self.slices, self.begun, self.done, self.closed = slices, 0, 0, 0
        self.fails = False
        self.clock = Clock()

    def encode(self, seed: int, count: int) -> Callable[[float], Generator[None, None, Encoded]]:
        def begin(slice_s: float) -> Generator[None, None, Encoded]:
            self.begun += 1
            try:
                for _ in range(self.slices):
                    self.clock.now_s += slice_s
                    yield
                if self.fails:
                    raise ValueError("a picture that cannot be")
            except GeneratorExit:
                self.closed += 1
                raise
            self.done += 1
            embeddings = np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)
            share = 1 / (1 + seed)
            weights = {"text": 1 - share, "vision": share, "audio": 0.0}
            return Encoded(embeddings, TurnFusion(weights, {"vision": embeddings.mean(axis=1)}))

        return begin


def prompt(
    encoder: Encoder, seeds: list[int], *, before: int = 5, count: int = 40, after: int = 7, two_way: bool = True
) -> tuple[list[int], PromptMedia]:
    """`before` words, a picture of 1 x count tokens, again for every seed; then `after` words."""
    ids: list[int] = []
    jobs, columns, where = [], [], 0
    for seed in seeds:
        ids += [10 + i % 20 for i in range(before)]
        columns += [(where + i,) * 3 for i in range(before)]
        where += before
        span = MediaSpan(len(ids), len(ids) + count, two_way)
        jobs.append(MediaJob(seed.to_bytes(32, "little"), (span,), encoder.encode(seed, count)))
        ids += [PLACEHOLDER] * count
        columns += [(where, where, where + i) for i in range(count)]
        where += count
    ids += [30 + i % 20 for i in range(after)]
    columns += [(where + i,) * 3 for i in range(after)]
    return ids, PromptMedia(jobs, np.array(columns, np.int32).T.copy())


def make_engine(**options: int) -> Engine:
    num_blocks, budget = options.pop("num_blocks", 64), options.pop("budget", 512)
    runner = FakeRunner(num_blocks=num_blocks, max_num_batched_tokens=budget)
    runner.expects_text = False
    config = EngineConfig(**{"max_num_batched_tokens": budget, "draft_max": 0, **options})  # type: ignore[arg-type]
    return Engine(runner, FakeTokenizer(default_pieces()), config)


def make_sequence(name: str, ids: list[int], media: PromptMedia | None, max_tokens: int = 12) -> Sequence:
    return Sequence(name, ids, SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True), media=media)


def run(engine: Engine, *sequences: Sequence) -> dict[str, list[SequenceOutput]]:
    for sequence in sequences:
        engine.add(sequence)
    outputs: dict[str, list[SequenceOutput]] = {sequence.request_id: [] for sequence in sequences}
    for _ in range(2000):
        if not engine.has_work():
            return outputs
        for output in engine.step():
            outputs[output.request_id].append(output)
    raise AssertionError("the engine does not come to an end")


def tokens_of(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def answer(
    engine: Engine, seeds: list[int], *, two_way: bool = True, name: str = "one", max_tokens: int = 12
) -> list[int]:
    ids, media = prompt(Encoder(), seeds, two_way=two_way)
    return tokens_of(run(engine, make_sequence(name, ids, media, max_tokens))[name])


@pytest.mark.parametrize("two_way", [True, False])
def test_an_answer_does_not_depend_on_chunks(two_way: bool) -> None:
    wanted = answer(make_engine(), [1, 2], two_way=two_way)
    for budget in (57, 64, 90, 200):
        assert answer(make_engine(budget=budget), [1, 2], two_way=two_way) == wanted


def test_tokens_of_one_picture_see_each_other_where_they_should() -> None:
    assert answer(make_engine(), [1], two_way=True) != answer(make_engine(), [1], two_way=False)


def test_the_answer_goes_on_from_the_prompts_last_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of 1 x 40 tokens takes 40 places, one of 4 x 10 takes 10: what follows stands nearer."""
    engine = make_engine()
    seen: list[list[int]] = []
    real = engine.runner.run

    def watched(batch: Batch) -> object:
        seen.append(batch.positions[:, -1].tolist())
        return real(batch)

    monkeypatch.setattr(engine.runner, "run", watched)
    ids, media = prompt(Encoder(), [1], before=3, after=2)
    grid = np.divmod(np.arange(40, dtype=np.int32), 10)
    media.positions[:, 3:43] = 3 + np.stack([np.zeros(40, np.int32), *grid])
    media.positions[:, 43:] = [[13, 14]] * 3
    moved = PromptMedia(media.jobs, media.positions)
    run(engine, make_sequence("one", ids, moved, max_tokens=3))
    assert seen == [[14] * 3, [15] * 3, [16] * 3]


@pytest.mark.parametrize("two_way", [True, False])
def test_drafts_stand_where_their_tokens_would(two_way: bool) -> None:
    """Behind a picture positions are moved; of four tokens to choose from many are seen again."""
    answers, steps = [], []
    for draft_max in (0, 7):
        engine = make_engine(draft_max=draft_max)
        if draft_max:
            draft_always(engine)
        ids, media = prompt(Encoder(), [1, 2], two_way=two_way)
        media.positions[:, -7:] -= 20
        bias = dict.fromkeys((5, 6, 7, 8), 100.0)
        params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logit_bias=bias)
        sequence = Sequence("one", ids, params, media=PromptMedia(media.jobs, media.positions))
        answers.append(tokens_of(run(engine, sequence)["one"]))
        steps.append(engine.stats().num_steps_total)
    assert answers[0] == answers[1] and steps[0] > steps[1]


def test_what_a_picture_shows_and_where_it_stands_matters() -> None:
    answers = {tuple(answer(make_engine(), seeds)) for seeds in ([1, 2], [2, 1], [1, 1])}
    assert len(answers) == 3


def test_the_next_turn_encodes_and_computes_only_what_is_new() -> None:
    """History of two pictures, then a third: one is encoded, and the answer equals a cold engine's."""
    engine, encoder = make_engine(), Encoder()
    first_ids, first_media = prompt(encoder, [1, 2], after=0)
    run(engine, make_sequence("first", first_ids, first_media))
    assert encoder.done == 2
    ids, media = prompt(encoder, [1, 2, 3])
    outputs = run(engine, make_sequence("second", ids, media))["second"]
    assert encoder.done == 3
    block = engine.block_manager.block_size
    assert outputs[0].num_cached_tokens >= len(first_ids) // block * block - block
    assert tokens_of(outputs) == answer(make_engine(), [1, 2, 3])


@pytest.mark.parametrize("two_way", [True, False])
@pytest.mark.parametrize("drafts", [False, True])
def test_a_turn_with_a_picture_goes_on_in_the_block_the_last_one_ended_in(two_way: bool, drafts: bool) -> None:
    """A chat that keeps its pictures; in places, a picture is half as long as in tokens. The last one has no words."""
    engine = make_engine(draft_max=7 * drafts)
    if drafts:
        draft_always(engine)
    ids: list[int] = []
    columns: list[tuple[int, ...]] = []
    jobs, ended = [], 1
    for turn, num_words in enumerate((19, 3, 11, 2, 0)):
        ids += [10 + i % 20 for i in range(num_words)] + [PLACEHOLDER] * 20 + [30, 31, 32 + turn]
        where = columns[-1][0] + 1 if columns else 0
        columns += [(where + i,) * 3 for i in range(len(ids) - 23 - len(columns))]  # the last answer, and the words
        where = len(columns) - 10 * turn
        span = MediaSpan(len(columns), len(columns) + 20, two_way)
        jobs.append(MediaJob(turn.to_bytes(32, "little"), (span,), Encoder().encode(turn, 20)))
        columns += [(where, where + i // 2, where + i % 2) for i in range(20)]
        columns += [(where + 10 + i,) * 3 for i in range(3)]
        answers = []
        for each in (engine, make_engine(enable_prefix_caching=False)):
            media = PromptMedia(jobs, np.array(columns, np.int32).T.copy())
            params = SamplingParams(
                temperature=0.0, max_tokens=11, ignore_eos=True, logit_bias=dict.fromkeys((5, 6, 7), 100.0)
            )
            answers.append(run(each, Sequence(str(turn), ids, params, media=media))[str(turn)])
        assert tokens_of(answers[0]) == tokens_of(answers[1])
        assert answers[0][-1].num_cached_tokens == ended - 1
        ids += tokens_of(answers[0])
        ended = len(ids)
    assert (engine.stats().num_accepted_tokens_total > 0) == drafts


def test_equal_ids_of_another_picture_share_nothing() -> None:
    engine = make_engine()
    answer(engine, [1], name="a")
    hits = engine.stats().prefix_cache_hit_tokens
    assert answer(engine, [2], name="b") == answer(make_engine(), [2])
    assert engine.stats().prefix_cache_hit_tokens == hits


def test_a_picture_is_remembered_when_its_blocks_are_not() -> None:
    engine, encoder = make_engine(enable_prefix_caching=False), Encoder()
    for name in "ab":
        ids, media = prompt(encoder, [5])
        run(engine, make_sequence(name, ids, media))
    assert encoder.done == 1 and engine.encoders.num_remembered == 2


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("is_remembered", [True, False])
def test_fusion_is_told_whatever_is_cached(caching: bool, is_remembered: bool) -> None:
    """Keys and values in the cache need no embeddings; what fusion did is told all the same, fused anew if lost."""
    engine, encoder = make_engine(enable_prefix_caching=caching), Encoder()
    told, answers = [], []
    for name in "ab":
        ids, media = prompt(encoder, [1, 3])
        media.tells_fusion = True
        if name == "b" and not is_remembered:
            engine.encoders.memory = RecentlyUsed(1 << 20)
        outputs = run(engine, make_sequence(name, ids, media))[name]
        assert all(output.fusions == [] for output in outputs[:-1])
        answers.append(tokens_of(outputs))
        told.append([fusion.weights["vision"] for fusion in outputs[-1].fusions])
    assert told == [[1 / 2, 1 / 4]] * 2
    assert answers == [answer(make_engine(), [1, 3])] * 2
    assert encoder.done == (2 if is_remembered else 4)
    assert (engine.stats().prefix_cache_hit_tokens > 0) == caching


def test_fusion_is_told_after_preemption_and_only_where_asked_for() -> None:
    encoder, engine = Encoder(), make_engine(num_blocks=16, max_num_seqs=5)
    sequences = []
    for seed in range(1, 6):
        ids, media = prompt(encoder, [seed])
        media.tells_fusion = seed != 3
        sequences.append(make_sequence(str(seed), ids, media, max_tokens=40))
    outputs = run(engine, *sequences)
    assert engine.stats().num_preemptions_total > 0
    for seed in range(1, 6):
        (*_, last) = outputs[str(seed)]
        assert [fusion.weights["vision"] for fusion in last.fusions] == ([] if seed == 3 else [1 / (1 + seed)])


def test_company_and_preemption_change_nothing() -> None:
    """A pool too small for all: some are preempted and their media asked for again."""
    encoder = Encoder()
    wanted = {seed: answer(make_engine(), [seed], max_tokens=40) for seed in range(1, 6)}
    engine = make_engine(num_blocks=16, max_num_seqs=5)
    sequences = []
    for seed in wanted:
        ids, media = prompt(encoder, [seed])
        sequences.append(make_sequence(str(seed), ids, media, max_tokens=40))
    outputs = run(engine, *sequences)
    assert {seed: tokens_of(outputs[str(seed)]) for seed in wanted} == wanted
    assert engine.stats().num_preemptions_total > 0


def test_others_get_a_token_between_any_two_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, encoder = make_engine(), Encoder(slices=30)
    monkeypatch.setattr(engine_module, "time", encoder.clock)
    engine.add(make_sequence("talks", [11, 12, 13], None, max_tokens=200))
    engine.step()
    ids, media = prompt(encoder, [1])
    engine.add(make_sequence("looks", ids, media))
    steps = 0
    while encoder.done == 0:
        outputs = engine.step()
        assert [output.request_id for output in outputs][:1] == ["talks"]
        steps += 1
    assert steps >= 30


def test_many_who_wait_have_more_slices_between_two_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, encoder = make_engine(), Encoder(slices=100)
    monkeypatch.setattr(engine_module, "time", encoder.clock)
    engine.add(make_sequence("talks", [11, 12, 13], None, max_tokens=200))
    engine.step()
    for number, shares in enumerate((1, 2, 3, 4, 4)):
        engine.add(make_sequence(f"looks {number}", *prompt(encoder, [number]), max_tokens=1))
        engine.step()  # asks for the picture
        before_s = encoder.clock.now_s
        assert [output.request_id for output in engine.step()] == ["talks"]
        assert encoder.clock.now_s - before_s == pytest.approx(shares * engine_module.ENCODE_SLICE_S)


def test_a_picture_that_fails_ends_its_own_request_alone() -> None:
    engine, encoder = make_engine(), Encoder()
    encoder.fails = True
    ids, media = prompt(encoder, [1])
    outputs = run(engine, make_sequence("bad", ids, media), make_sequence("good", [11, 12], None))
    assert [output.finish_reason for output in outputs["bad"]] == ["error"]
    assert outputs["bad"][0].error == "internal error (ValueError) while making the answer"
    assert outputs["good"][-1].finish_reason == "length"
    assert engine.block_manager.num_used_blocks == 0


def test_a_picture_that_cannot_even_begin_ends_its_own_request_alone() -> None:
    def begin(slice_s: float) -> Generator[None, None, Encoded]:
        raise MemoryError

    engine = make_engine()
    ids, media = prompt(Encoder(), [1])
    broken = PromptMedia([MediaJob(bytes(32), media.spans, begin)], media.positions)
    outputs = run(engine, make_sequence("bad", ids, broken), make_sequence("good", [11, 12], None))
    assert [output.finish_reason for output in outputs["bad"]] == ["error"]
    assert outputs["good"][-1].finish_reason == "length"


def test_a_picture_of_too_few_tokens_ends_its_own_request() -> None:
    engine = make_engine()
    ids, media = prompt(Encoder(), [1])
    short = PromptMedia([MediaJob(bytes(32), media.spans, Encoder().encode(1, 39))], media.positions)
    (output,) = run(engine, make_sequence("short", ids, short))["short"]
    assert output.error == "an encoder made 39 tokens of a medium that has 40"


def test_leaving_stops_the_encoder_unless_somebody_else_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for others in (0, 1):
        engine, encoder = make_engine(), Encoder(slices=50)
        monkeypatch.setattr(engine_module, "time", encoder.clock)
        engine.add(make_sequence("talks", [11], None, max_tokens=400))
        engine.step()
        for name in ["leaves", "stays"][: 1 + others]:
            ids, media = prompt(encoder, [1])
            engine.add(make_sequence(name, ids, media))
        engine.step()  # asks for the picture
        engine.step()  # begins it
        engine.cancel("leaves")
        assert encoder.closed == 1 - others
        assert engine.encoders.has_work() == bool(others)


def test_a_span_too_long_for_a_step_is_refused() -> None:
    ids, media = prompt(Encoder(), [1], count=60)
    with pytest.raises(RequestError, match="60 tokens must be read in one step, .* room for 44"):
        make_engine(budget=60).add(make_sequence("long", ids, media))


def test_memory_stays_within_its_budget() -> None:
    encoder = Encoder(slices=0)
    queue = EncoderQueue(max_bytes=3 * 40 * (WIDTH + 1) * 4)
    for seed in range(5):
        _, media = prompt(encoder, [seed])
        assert queue.get(media.jobs[0]) is None
        queue.advance(1.0)
    assert queue.memory.num_bytes == queue.memory.max_bytes
    found = [queue.get(prompt(encoder, [seed])[1].jobs[0]) is not None for seed in range(5)]
    assert found == [False, False, True, True, True]


def test_spans_that_overlap_are_refused() -> None:
    encoder = Encoder()
    jobs = [MediaJob(bytes([i]) * 32, (MediaSpan(i, i + 4),), encoder.encode(i, 4)) for i in (2, 5)]
    with pytest.raises(ValueError, match="overlap"):
        PromptMedia(jobs, np.zeros((3, 20), np.int32))


def test_a_two_way_span_is_read_whole_beside_a_stream() -> None:
    """A picture of 40 tokens where prompts have room for 16: its words wait their turn, itself it goes in one step."""
    engine = make_engine()
    engine.add(make_sequence("talker", [1, 2, 3], None, max_tokens=30))
    engine.step()
    ids, media = prompt(Encoder(slices=0), [1], before=20, after=30)
    engine.add(make_sequence("seer", ids, media))
    sizes, real = [], engine.runner.run

    def watched(batch: Batch) -> np.ndarray:
        sizes.append(batch.token_ids.size)
        return real(batch)

    engine.runner.run = watched  # type: ignore[method-assign]
    outputs: list[SequenceOutput] = []
    while engine.has_work():
        engine.scheduler.prefill_room = 16
        outputs += engine.step()
    ours = tokens_of([output for output in outputs if output.request_id == "seer"])
    assert [size for size in sizes if size > 2] == [17, 5, 41, 17, 15]
    cold = make_engine()
    again, same = prompt(Encoder(), [1], before=20, after=30)
    assert ours == tokens_of(run(cold, make_sequence("seer", again, same))["seer"])
