"""The engine thread: hand-over, merging, cancelling, draining, and what a broken engine does."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from autoglm.config import EngineConfig
from autoglm.engine.engine import Engine
from autoglm.engine.sampling import SamplingParams
from autoglm.engine.sequence import Sequence, SequenceOutput
from autoglm.errors import CapacityError, ContextLengthError, EngineError
from autoglm.server.driver import EngineDriver, merge_outputs
from tests.engine.fake_runner import FakeRunner, FakeTokenizer, default_pieces


class SlowRunner(FakeRunner):
    """Takes step_s a step; `gate` can stop it altogether."""

    step_s = 0.0

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.gate = threading.Event()
        self.gate.set()

    def run(self, batch):  # type: ignore[no-untyped-def]
        self.gate.wait(10)
        time.sleep(self.step_s)
        return super().run(batch)


def make_driver(runner: SlowRunner | None = None, **config: int) -> EngineDriver:
    runner = runner or SlowRunner()
    driver = EngineDriver(Engine(runner, FakeTokenizer(default_pieces(64)), EngineConfig(**config)))
    driver.start()
    return driver


def sequence(request_id: str = "a", max_tokens: int = 8, prompt: int = 5, **fields: object) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **fields)  # type: ignore[arg-type]
    return Sequence(request_id, list(range(3, 3 + prompt)), params)


async def all_text(driver: EngineDriver, *sequences: Sequence) -> dict[str, str]:
    text: dict[str, str] = {s.request_id: "" for s in sequences}
    async for output in driver.submit(*sequences):
        text[output.request_id] += output.text
    return text


async def test_outputs_arrive_whole_and_in_order() -> None:
    driver = make_driver()
    try:
        alone = await all_text(driver, sequence("a", 30))
        together = await all_text(driver, sequence("b", 30), sequence("c", 30))
        assert alone["a"] == together["b"] == together["c"] != ""
        assert driver.num_in_flight == 0
    finally:
        driver.stop()


async def test_a_reader_that_sleeps_gets_everything_in_one_piece() -> None:
    driver = make_driver()
    try:
        expected = (await all_text(driver, sequence("a", 40)))["a"]
        stream = driver.submit(sequence("b", 40))
        while driver.num_in_flight:
            await asyncio.sleep(0.01)
        outputs = [output async for output in stream]
        assert len(outputs) == 1
        assert outputs[0].text == expected
        assert len(outputs[0].token_ids) == outputs[0].num_output_tokens == 40
        assert outputs[0].finish_reason == "length"
    finally:
        driver.stop()


async def test_one_call_into_the_loop_a_step_however_many_sequences() -> None:
    runner = SlowRunner(max_num_batched_tokens=512)
    driver = make_driver(runner)
    calls: list[int] = []
    original = driver._call

    def counting(loop, function, *arguments):  # type: ignore[no-untyped-def]
        if function.__name__ == "_deliver":
            calls.append(len(arguments[0]))
        return original(loop, function, *arguments)

    driver._call = counting  # type: ignore[method-assign]
    try:
        runner.gate.clear()
        await asyncio.gather(
            all_text(driver, *(sequence(str(i), 10) for i in range(8))), asyncio.to_thread(runner.gate.set)
        )
        assert len(calls) <= len(runner.batch_sizes)
        assert max(calls) == 8
    finally:
        driver.stop()


async def test_cancel_frees_the_blocks_within_a_step() -> None:
    runner = SlowRunner()
    runner.step_s = 0.02
    driver = make_driver(runner)
    engine = driver.engine
    try:
        stream = driver.submit(sequence("a", 400))
        await stream.__anext__()
        assert engine.stats().kv_blocks_used > 0
        num_steps = engine.stats().num_steps_total
        stream.cancel()
        deadline = time.monotonic() + 5
        while engine.stats().kv_blocks_used and time.monotonic() < deadline:
            await asyncio.sleep(0.002)
        assert engine.stats().kv_blocks_used == 0
        assert engine.stats().num_steps_total - num_steps <= 2  # the one under way, and the one that freed it
        assert [output async for output in stream] == []
    finally:
        driver.stop()


async def test_an_idle_engine_sleeps() -> None:
    driver = make_driver()
    try:
        await all_text(driver, sequence())
        has_work = driver.engine.has_work
        calls = 0

        def counted() -> bool:
            nonlocal calls
            calls += 1
            return has_work()

        driver.engine.has_work = counted  # type: ignore[method-assign]
        await asyncio.sleep(0.2)
        assert calls <= 1
    finally:
        driver.stop()


async def test_what_the_engine_refuses_reaches_the_submitter() -> None:
    driver = make_driver(SlowRunner(max_context=64))
    try:
        stream = driver.submit(sequence("long", prompt=60), sequence("longer", prompt=64))
        with pytest.raises(ContextLengthError):
            await stream.wait_accepted(5)
        assert driver.num_in_flight == 0
        assert driver.engine.stats().kv_blocks_used == 0
        assert await all_text(driver, sequence("fine"))
    finally:
        driver.stop()


async def test_too_many_are_refused_at_once_while_the_engine_is_busy() -> None:
    runner = SlowRunner()
    runner.gate.clear()
    driver = make_driver(runner, max_num_seqs=1, max_waiting=4)
    try:
        streams = [driver.submit(sequence("0"))]
        await streams[0].wait_accepted(5)
        streams += [driver.submit(sequence(str(i))) for i in range(1, 5)]
        with pytest.raises(CapacityError) as caught:
            driver.submit(sequence("one too many"))
        assert caught.value.status == 429 and caught.value.retry_after_s >= 1
        with pytest.raises(CapacityError):
            driver.submit(sequence("x"), sequence("y"))
        runner.gate.set()
        for stream in streams:
            assert [output async for output in stream][-1].finish_reason is not None
        assert await all_text(driver, sequence("later"))
    finally:
        runner.gate.set()
        driver.stop()


async def test_loading_draining_and_stopped_are_503() -> None:
    driver = EngineDriver(Engine(SlowRunner(), FakeTokenizer(default_pieces(64)), EngineConfig()))
    for prepare, status in ((lambda: None, "loading"), (driver.start, "ready"), (driver.begin_drain, "draining")):
        prepare()
        assert driver.status == status
        if status != "ready":
            with pytest.raises(CapacityError) as caught:
                driver.submit(sequence())
            assert caught.value.status == 503
    driver.stop()
    assert driver.status == "stopped"


async def test_stop_with_drain_lets_requests_finish_and_without_it_fails_them() -> None:
    for drain in (True, False):
        runner = SlowRunner()
        runner.step_s = 0.005
        driver = make_driver(runner)
        stream = driver.submit(sequence("a", 40))
        await stream.wait_accepted(5)
        await asyncio.to_thread(driver.stop, drain)
        if drain:
            assert [output async for output in stream][-1].finish_reason == "length"
        else:
            with pytest.raises(CapacityError):
                async for _ in stream:
                    pass


async def test_an_engine_that_breaks_fails_its_requests_and_says_so() -> None:
    driver = make_driver()

    def broken() -> list[SequenceOutput]:
        raise AssertionError("books in doubt")

    driver.engine.step = broken  # type: ignore[method-assign]
    with pytest.raises(EngineError):
        async for _ in driver.submit(sequence()):
            pass
    assert driver.status == "failed"
    with pytest.raises(CapacityError) as caught:
        driver.submit(sequence("b"))
    assert caught.value.status == 503
    driver.stop()


async def test_a_runner_that_fails_once_fails_one_batch_only() -> None:
    runner = SlowRunner()
    driver = make_driver(runner)
    try:
        runner.fail_next = RuntimeError("no")
        outputs = [output async for output in driver.submit(sequence("a"))]
        assert outputs[-1].finish_reason == "error"
        assert await all_text(driver, sequence("b"))
    finally:
        driver.stop()


def test_a_reader_whose_event_loop_is_gone_does_not_stop_the_engine() -> None:
    runner = SlowRunner()
    runner.step_s = 0.01
    driver = make_driver(runner)

    async def leave() -> None:
        driver.submit(sequence("a", 300))
        await asyncio.sleep(0.05)

    asyncio.run(leave())
    deadline = time.monotonic() + 5
    while driver.num_in_flight and time.monotonic() < deadline:
        time.sleep(0.01)
    assert driver.num_in_flight == 0
    assert asyncio.run(all_text(driver, sequence("b")))["b"]
    driver.stop()


def test_merging_keeps_every_token_and_the_later_state() -> None:
    first = SequenceOutput("a", [1], "x", [], num_output_tokens=1)
    second = SequenceOutput("a", [2, 3], "yz", [], finish_reason="stop", stop_reason="q", num_output_tokens=3)
    merged = merge_outputs(first, second)
    assert (merged.token_ids, merged.text, merged.finish_reason) == ([1, 2, 3], "xyz", "stop")
    assert merged.num_output_tokens == 3
