"""The engine's thread and the event loop: errors, aborts, and neither waits for the other."""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from course_lib import LLM, SamplingParams
from course_lib.serving.admission_base import PriorityClass
from course_lib.serving.async_llm import AsyncLLM, EngineError
from tests.checkpoints import random_model, save
from tests.serving.servers import assert_shows_no_internals

LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    directory = save(random_model("llama"), tmp_path_factory.mktemp("model"))
    return LLM(directory, max_num_seqs=4, num_gpu_blocks_override=200)


class Losses:
    """Counts what `AsyncLLM` tells its listener."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.num_tokens = 0

    def observe_step(self, num_tokens: int, outputs: list[Any]) -> None:
        self.num_tokens += num_tokens

    def observe_loss(self, reason: str) -> None:
        self.reasons.append(reason)


def run(llm: LLM, scenario: Any, listener: Losses | None = None) -> Any:
    """Run a scenario against a started engine and stop it."""

    async def main() -> Any:
        engine = AsyncLLM(llm.llm_engine, listener)
        engine.start()
        try:
            return await asyncio.wait_for(scenario(engine), 60)
        finally:
            engine.stop()
            # The next test begins with an empty engine.
            llm.llm_engine.abort_request(llm.llm_engine.unfinished_request_ids())

    return asyncio.run(main())


async def tokens(engine: AsyncLLM, name: str, prompt: Any, params: SamplingParams) -> list[int]:
    found = []
    async for output in engine.generate(name, prompt, params):
        found += output.outputs[0].token_ids
    return found


def test_streams_give_the_tokens_of_generate(llm: LLM) -> None:
    prompts = [[i + 1] * (i + 2) for i in range(9)]
    params = [SamplingParams(max_tokens=20, seed=i) for i in range(9)]

    async def scenario(engine: AsyncLLM) -> list[list[int]]:
        return await asyncio.gather(
            *(tokens(engine, str(i), prompts[i], params[i]) for i in range(9))
        )

    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    assert run(llm, scenario) == expected


def slow_down(llm: LLM, monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[float]:
    """Make each step last; gives the times at which steps end."""
    step, ends = llm.llm_engine.step, []

    def slow() -> Any:
        time.sleep(seconds)
        outputs = step()
        ends.append(time.monotonic())
        return outputs

    monkeypatch.setattr(llm.llm_engine, "step", slow)
    return ends


def test_a_slow_step_does_not_block_the_loop(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(llm, monkeypatch, 0.5)

    async def scenario(engine: AsyncLLM) -> float:
        work = asyncio.create_task(tokens(engine, "a", [1, 2], SHORT))
        longest = 0.0
        while not work.done():
            start = time.monotonic()
            await asyncio.sleep(0.005)
            longest = max(longest, time.monotonic() - start)
            engine.load()
        assert len(await work) == 5
        return longest

    # A busy machine may steal some time; a blocked loop would lose the whole step.
    assert run(llm, scenario) < 0.4


def test_blocks_are_free_within_one_step_of_leaving(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = llm.llm_engine.block_pool
    ends = slow_down(llm, monkeypatch, 0.1)

    async def scenario(engine: AsyncLLM) -> int:
        stream = engine.generate("a", [1] * 100, LONG)
        await anext(stream)
        assert pool.usage > 0
        steps_before = len(ends)
        await stream.aclose()
        while pool.usage > 0:
            await asyncio.sleep(0.01)
        return len(ends) - steps_before

    losses = Losses()
    assert run(llm, scenario, losses) <= 1  # the one that was running
    assert losses.reasons == ["abort"]


def test_leaving_before_the_first_token_and_while_waiting(llm: LLM) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        work = [asyncio.create_task(tokens(engine, str(i), [i + 1] * 30, LONG)) for i in range(12)]
        await asyncio.sleep(0)
        work[0].cancel()  # perhaps before the engine knows of it
        await asyncio.sleep(0.05)
        for task in work[1:]:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        while llm.llm_engine.has_unfinished_requests():
            await asyncio.sleep(0.01)
        assert engine.num_unfinished == 0
        assert (await tokens(engine, "next", [3], SHORT))[0] >= 0

    losses = Losses()
    run(llm, scenario, losses)
    assert losses.reasons == ["abort"] * 12
    assert llm.llm_engine.block_pool.usage == 0


def test_an_error_in_a_step_answers_everybody_and_the_engine_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    execute, calls = llm.llm_engine.executor.execute, []

    def failing(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 4:
            raise RuntimeError("a secret of the device")
        return execute(batch)

    monkeypatch.setattr(llm.llm_engine.executor, "execute", failing)

    async def scenario(engine: AsyncLLM) -> list[Any]:
        work = [tokens(engine, str(i), [i + 1] * 40, LONG) for i in range(6)]
        results = await asyncio.gather(*work, return_exceptions=True)
        assert llm.llm_engine.block_pool.usage == 0
        assert len(await tokens(engine, "next", [1] * 40, SHORT)) == 5
        assert engine.is_alive
        return results

    losses = Losses()
    with caplog.at_level(logging.ERROR):
        results = run(llm, scenario, losses)
    assert all(isinstance(result, EngineError) for result in results)
    assert "failed while it computed" in str(results[0])
    assert losses.reasons == ["error"] * 6
    assert "RuntimeError in" in caplog.text and "secret" not in caplog.text
    assert_shows_no_internals("\n".join(record.getMessage() for record in caplog.records))


def test_a_broken_engine_answers_everybody_and_says_that_it_has_stopped(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(batch: Any) -> Any:
        raise ZeroDivisionError

    async def scenario(engine: AsyncLLM) -> None:
        work = asyncio.create_task(tokens(engine, "a", [1], LONG))
        await asyncio.sleep(0.05)
        with monkeypatch.context() as patch:  # neither can the step be done nor the request ended
            patch.setattr(llm.llm_engine, "step", lambda: broken(None))
            patch.setattr(llm.llm_engine, "abort_request", broken)
            with pytest.raises(EngineError, match="has stopped"):
                await work
        assert not engine.is_alive
        with pytest.raises(EngineError, match="has stopped"):
            await tokens(engine, "b", [1], SHORT)

    run(llm, scenario)


def test_what_the_engine_cannot_serve_is_a_value_error(llm: LLM) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        for prompt, says in (([], "empty"), ([500], "vocabulary"), ([1] * 600, "fit")):
            with pytest.raises(ValueError, match=says):
                await tokens(engine, "bad", prompt, SHORT)
        assert engine.num_unfinished == 0
        assert engine.load().num_waiting == 0
        first = engine.generate("twice", [1], LONG)
        await anext(first)
        with pytest.raises(ValueError, match="'twice' is in use"):
            await tokens(engine, "twice", [1], SHORT)
        assert (await anext(first)).outputs[0].token_ids
        await first.aclose()

    run(llm, scenario)


def test_stopping_answers_those_in_flight_and_later_ones(llm: LLM) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        work: list[Coroutine[Any, Any, Any]] = [tokens(engine, str(i), [1], LONG) for i in range(6)]
        tasks = [asyncio.create_task(task) for task in work]
        await asyncio.sleep(0.05)
        engine.stop()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineError)
        with pytest.raises(EngineError, match="has stopped"):
            await tokens(engine, "late", [1], SHORT)

    run(llm, scenario)


def test_failing_one_request_leaves_the_others(llm: LLM) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        work = [asyncio.create_task(tokens(engine, str(i), [i + 1], LONG)) for i in range(3)]
        await asyncio.sleep(0.05)
        engine.fail("1", RuntimeError("enough"))
        engine.fail("unknown", RuntimeError())
        results = await asyncio.gather(*work, return_exceptions=True)
        assert [len(r) if isinstance(r, list) else str(r) for r in results] == [400, "enough", 400]

    run(llm, scenario)


def test_to_a_batch_request_only_batch_requests_are_in_the_queue(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(llm, monkeypatch, 0.1)
    params = SamplingParams(n=2, max_tokens=4, ignore_eos=True)

    async def wait_for(engine: AsyncLLM, name: str, kind: PriorityClass) -> None:
        async for _ in engine.generate(name, [1] * 10, params, priority_class=kind):
            pass

    async def scenario(engine: AsyncLLM) -> None:
        kinds: list[PriorityClass] = ["interactive"] * 5 + ["batch"]
        work = [asyncio.create_task(wait_for(engine, f"{k}{i}", k)) for i, k in enumerate(kinds)]
        for seconds in (0.01, 0.15):  # on their way, then in the engine's queue
            await asyncio.sleep(seconds)
            every, batch = engine.load(), engine.load("batch")
            assert every.num_running == batch.num_running
            assert batch.num_waiting == 2
            assert every.num_running + every.num_waiting == 12
            assert batch.num_waiting_tokens < every.num_waiting_tokens
        await asyncio.gather(*work)

    run(llm, scenario)


def test_load_counts_what_is_on_its_way_to_the_engine(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(llm, monkeypatch, 0.3)

    async def scenario(engine: AsyncLLM) -> None:
        work = [asyncio.create_task(tokens(engine, "0", [1] * 10, SHORT))]
        await asyncio.sleep(0.1)
        params = SamplingParams(n=2, max_tokens=2)
        work += [asyncio.create_task(tokens(engine, f"n{i}", [1] * 10, params)) for i in range(5)]
        await asyncio.sleep(0.01)  # the engine is in a step and has not read them
        load = engine.load()
        assert load.num_running + load.num_waiting == 11
        assert load.num_waiting_tokens >= 100
        assert load.num_queued == 7
        await asyncio.gather(*work)
        assert engine.load().num_running == engine.load().num_waiting == 0
        assert engine.load().oldest_waiting_age_s == 0

    run(llm, scenario)


def test_a_preempted_request_does_not_make_the_queue_old(tmp_path_factory: Any) -> None:
    directory = save(random_model("llama"), tmp_path_factory.mktemp("model"))
    llm = LLM(directory, max_num_seqs=4, num_gpu_blocks_override=41, max_model_len=480)

    async def scenario(engine: AsyncLLM) -> list[float]:
        params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
        work = [asyncio.create_task(tokens(engine, str(i), [i + 1], params)) for i in range(4)]
        ages = []
        while not all(task.done() for task in work):
            ages.append(engine.load().oldest_waiting_age_s)
            await asyncio.sleep(0.005)
        return ages

    start = time.monotonic()
    ages = run(llm, scenario)
    assert llm.llm_engine.scheduler.stats.num_preemptions > 0
    assert max(ages) < (time.monotonic() - start) / 4


def test_remaining_time_counts_the_turns_of_those_that_wait(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(llm, monkeypatch, 0.01)

    async def scenario(engine: AsyncLLM) -> dict[str, float]:
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        work = [asyncio.create_task(tokens(engine, str(i), [1], params)) for i in range(12)]
        await asyncio.sleep(0.3)
        remaining_s = engine.remaining_s()
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        return remaining_s

    remaining_s = run(llm, scenario)
    running, second, third = (remaining_s[name] for name in ("0", "4", "8"))
    assert 0.2 < running < second < third
    assert third - second == pytest.approx(second - running, rel=1e-6)  # a whole turn each
    assert second > 1.0  # at least 100 steps of 10 ms
