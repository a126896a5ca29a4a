"""Which tokens of which requests a step computes: the rules of the scheduler, one by one.

`FakeEngine.run` also checks that each reply is what the request would get alone.
"""

import pytest

from course_lib.engine.batch import ScheduledBatch, StepResult
from course_lib.engine.request import RequestStatus
from course_lib.engine.sampling_params import SamplingParams
from tests.engine.fakes import FakeEngine, check_books, reply_alone


def shares(batch: ScheduledBatch) -> dict[str, tuple[int, int]]:
    """Of each scheduled request: first token and number of tokens."""
    return {entry.request.request_id: (entry.start, entry.num_tokens) for entry in batch.scheduled}


def distinct(num_tokens: int, first: int = 100) -> list[int]:
    """A prompt that shares no block with one that begins elsewhere."""
    return list(range(first, first + num_tokens))


# Rules 1 and 2: one budget, no phases


def test_a_step_mixes_decodes_and_chunks_of_prompts() -> None:
    engine = FakeEngine(num_blocks=20, max_num_batched_tokens=8)
    engine.add(distinct(3))
    assert shares(engine.step()) == {"r0": (0, 3)}
    engine.add(distinct(12, 200))
    assert shares(engine.step()) == {"r0": (3, 1), "r1": (0, 7)}
    assert shares(engine.step()) == {"r0": (4, 1), "r1": (7, 5)}
    assert shares(engine.step()) == {"r0": (5, 1), "r1": (12, 1)}
    engine.run()


def test_draft_tokens_are_tokens_left_to_compute() -> None:
    engine = FakeEngine(num_blocks=20)
    r = engine.add(distinct(3))
    engine.step()
    r.draft_token_ids = [1, 2, 3]
    batch = engine.schedule()
    assert shares(batch) == {"r0": (3, 4)}
    assert batch.scheduled[0].num_draft_tokens == 3
    assert batch.scheduled[0].token_ids == [r.token_ids[-1], 1, 2, 3]


def test_draft_tokens_are_cut_to_the_budget() -> None:
    engine = FakeEngine(num_blocks=20, max_num_batched_tokens=3)
    r = engine.add(distinct(3), max_tokens=12)
    engine.step()
    r.draft_token_ids = [1, 2, 3]
    batch = engine.schedule()
    assert shares(batch) == {"r0": (3, 3)}
    assert batch.scheduled[0].num_draft_tokens == 2
    engine.update(batch, engine.executor.execute(batch))
    engine.run()


def test_running_requests_are_served_before_waiting_ones() -> None:
    engine = FakeEngine(num_blocks=20, max_num_batched_tokens=4)
    engine.add(distinct(6))
    engine.step()
    engine.add(distinct(4, 200), priority=-1)  # even if what waits is more urgent
    assert shares(engine.step()) == {"r0": (4, 2), "r1": (0, 2)}
    engine.run()


def test_what_is_first_takes_the_budget_and_the_next_gets_what_is_left() -> None:
    engine = FakeEngine(num_blocks=20, max_num_batched_tokens=10)
    for first in (100, 200, 300):
        engine.add(distinct(8, first))
    batch = engine.step()
    assert shares(batch) == {"r0": (0, 8), "r1": (0, 2)}
    assert batch.reason == "max_num_batched_tokens 10 used up"
    assert shares(engine.step()) == {"r0": (8, 1), "r1": (2, 6), "r2": (0, 3)}
    engine.run()


def test_no_more_run_than_max_num_seqs() -> None:
    engine = FakeEngine(num_blocks=20, max_num_seqs=2)
    for first in (100, 200, 300):
        engine.add(distinct(2, first))
    batch = engine.step()
    assert list(shares(batch)) == ["r0", "r1"]
    assert batch.reason == "max_num_seqs 2 reached"
    engine.run()


def test_the_smaller_priority_is_admitted_first_then_the_earlier_arrival() -> None:
    engine = FakeEngine(num_blocks=20, max_num_seqs=1)
    for first, priority in ((100, 1), (200, 0), (300, 0)):
        engine.add(distinct(2, first), max_tokens=1, priority=priority)
    order = [next(iter(shares(engine.step()))) for _ in range(3)]
    assert order == ["r1", "r2", "r0"]


# Rules 3 to 5: preemption and admission


def full_cache(priorities: tuple[int, ...] = (0, 0, 0), **options: object) -> FakeEngine:
    """Requests that each fill one block of four; the next token of the first finds none free."""
    engine = FakeEngine(num_blocks=len(priorities) + 1, **options)
    for index, priority in enumerate(priorities):
        engine.add(distinct(4, 100 * (index + 1)), max_tokens=3, priority=priority)
    engine.step()
    assert engine.pool.num_free_blocks == 0
    return engine


def test_the_last_running_request_is_preempted_first() -> None:
    engine = full_cache()
    batch = engine.step()
    assert [r.request_id for r in batch.preempted] == ["r2", "r1"]
    assert shares(batch) == {"r0": (4, 1)}
    engine.run()


def test_the_least_urgent_is_preempted_first() -> None:
    engine = full_cache(priorities=(1, 0, 2))
    batch = engine.step()
    assert [r.request_id for r in batch.preempted] == ["r2", "r0"]
    assert shares(batch) == {"r1": (4, 1)}
    engine.run()


def test_as_many_are_preempted_as_it_takes() -> None:
    engine = FakeEngine(num_blocks=6, block_size=1)
    for first in (100, 200, 300, 400, 500):
        engine.add([first], max_tokens=4)
    engine.step()
    engine.requests[0].draft_token_ids = [1, 2]
    batch = engine.step()
    assert [r.request_id for r in batch.preempted] == ["r4", "r3", "r2", "r1"]
    assert shares(batch) == {"r0": (1, 3)}
    engine.run()


def test_the_request_that_needs_the_block_may_be_the_one_preempted() -> None:
    engine = FakeEngine(num_blocks=4, block_size=2)
    engine.add([1, 2, 3], max_tokens=3)
    engine.add([4, 5], max_tokens=3)
    engine.step()
    batch = engine.step()
    assert [r.request_id for r in batch.preempted] == ["r1"]
    assert shares(batch) == {"r0": (3, 1)}
    engine.run()


def test_preemption_frees_the_blocks_forgets_the_computation_and_queues_in_front() -> None:
    engine = full_cache()
    late = engine.add(distinct(2, 900))
    engine.requests[2].draft_token_ids = [1]
    batch = engine.schedule()
    for r in batch.preempted:
        assert r.status is RequestStatus.PREEMPTED
        assert (r.block_ids, r.num_computed_tokens, r.draft_token_ids) == ([], 0, [])
        assert r.metrics.num_preemptions == 1
    assert engine.scheduler.waiting == [*batch.preempted[::-1], late]
    assert engine.pool.num_free_blocks == 1
    assert engine.scheduler.stats.num_preemptions == 2


def test_nobody_is_admitted_in_a_step_that_preempted() -> None:
    engine = full_cache()
    engine.add([1], max_tokens=1)
    batch = engine.step()
    assert batch.preempted
    assert engine.pool.num_free_blocks == 1  # it would fit
    assert "r3" not in shares(batch)
    assert batch.reason == "2 preempted for lack of KV blocks"
    engine.run()


def test_admission_stops_at_the_first_that_does_not_fit() -> None:
    engine = FakeEngine(num_blocks=5)
    engine.add(distinct(7), max_tokens=2)
    engine.step()
    engine.add(distinct(12, 200))
    engine.add([1])
    batch = engine.step()
    assert list(shares(batch)) == ["r0"]
    assert batch.reason == "KV cache full, usage 0.50"
    engine.run()


def test_a_request_held_back_only_by_the_lora_limit_is_no_barrier() -> None:
    engine = FakeEngine(num_blocks=20, max_loras=1)
    for first, lora_name in ((100, "a"), (200, "b"), (300, None), (400, "a")):
        engine.add(distinct(3, first), lora_name=lora_name)
    batch = engine.step()
    assert list(shares(batch)) == ["r0", "r2", "r3"]
    assert batch.reason == "max_loras 1 reached"
    engine.run()


# Rule 6: the prefix cache


def test_a_warm_prefix_is_not_computed_again() -> None:
    engine = FakeEngine(num_blocks=20)
    engine.add(distinct(10))
    engine.run()
    r = engine.add(distinct(10))
    assert shares(engine.step()) == {"r1": (8, 2)}
    assert r.num_cached_tokens == 8
    engine.run()
    stats = engine.scheduler.stats
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (20, 8)


def test_the_prefix_cache_is_asked_only_while_nothing_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = FakeEngine(num_blocks=20, max_num_batched_tokens=4)
    asked, match_prefix = [], engine.pool.match_prefix
    monkeypatch.setattr(
        engine.pool,
        "match_prefix",
        lambda r: asked.append(r.num_computed_tokens) or match_prefix(r),
    )
    engine.add(distinct(12))
    engine.add(distinct(12))
    engine.run()
    assert asked == [0, 0]


def test_a_resumed_request_finds_its_own_outputs_in_the_cache() -> None:
    engine = FakeEngine(num_blocks=8)
    engine.add(distinct(4), max_tokens=14)
    r = engine.add(distinct(4, 200), max_tokens=14)
    batch = engine.step()
    while not batch.preempted:
        batch = engine.step()
    assert batch.preempted == [r]
    assert r.num_output_tokens >= 8
    while r.status is not RequestStatus.RUNNING:
        batch = engine.step()
    assert shares(batch)["r1"][0] >= 8  # more than its prompt, so outputs too
    assert r.num_cached_tokens == 0  # of the first admission
    assert engine.scheduler.stats.prefix_cache_queries == 8
    engine.run()


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_preemption_and_prefix_caching_together(block_size: int, num_drafts: int) -> None:
    engine = FakeEngine(
        num_blocks=24 // block_size + 1, block_size=block_size, num_drafts=num_drafts
    )
    for index in range(5):
        engine.add([1] * 8 + distinct(index, 10 * index), max_tokens=10)
    engine.run()
    assert engine.scheduler.stats.num_preemptions > 0
    assert engine.scheduler.stats.prefix_cache_hits > 0


def test_requests_of_one_step_share_blocks() -> None:
    engine = FakeEngine(num_blocks=20)
    for _ in range(3):
        engine.add(distinct(10))
    assert shares(engine.step()) == {"r0": (0, 10), "r1": (8, 2), "r2": (8, 2)}
    first, second, third = (r.block_ids for r in engine.requests)
    assert first[:2] == second[:2] == third[:2]
    engine.run()


@pytest.mark.parametrize("key", ["lora_name", "cache_salt"])
def test_requests_with_other_extra_keys_get_their_own_replies(key: str) -> None:
    engine = FakeEngine(num_blocks=20)
    a, b = (engine.add(distinct(10), **{key: name}) for name in "ab")
    batch = engine.step()
    assert shares(batch) == {"r0": (0, 10), "r1": (0, 10)}
    assert not set(a.block_ids) & set(b.block_ids)
    engine.run()
    assert a.output_token_ids != b.output_token_ids


def test_prompt_logprobs_need_every_token_so_nothing_is_taken_from_the_cache() -> None:
    engine = FakeEngine(num_blocks=20)
    engine.add(distinct(10))
    engine.run()
    r = engine.add(distinct(10))
    r.sampling_params = SamplingParams(max_tokens=4, prompt_logprobs=0)
    assert shares(engine.step()) == {"r1": (0, 10)}
    engine.run()


@pytest.mark.parametrize("budget", range(1, 13))
@pytest.mark.parametrize("prompt_tokens", [7, 8, 9])
def test_chunks_may_end_before_at_and_after_a_block_boundary(
    budget: int, prompt_tokens: int
) -> None:
    engine = FakeEngine(num_blocks=20, max_num_batched_tokens=budget)
    for _ in range(3):
        engine.add(distinct(prompt_tokens), max_tokens=6)
    engine.run()


# Rule 7: what can never fit


@pytest.mark.parametrize(("max_model_len", "longest"), [(100, 31), (20, 19)])
def test_a_prompt_that_can_never_fit_is_rejected_when_it_arrives(
    max_model_len: int, longest: int
) -> None:
    engine = FakeEngine(num_blocks=9, max_model_len=max_model_len)
    engine.add(distinct(longest), max_tokens=5)
    message = (
        f"prompt of {longest + 1} tokens, but at most {longest} fit .*"
        f"max_model_len {max_model_len}, KV cache 32 tokens.*shorten the prompt"
    )
    with pytest.raises(ValueError, match=message):
        engine.add(distinct(longest + 1))
    assert len(engine.scheduler.waiting) == 1
    engine.run()


def test_a_request_is_admitted_only_if_all_its_known_tokens_fit() -> None:
    engine = FakeEngine(num_blocks=5, max_num_batched_tokens=8)
    engine.add(distinct(7), max_tokens=3)
    engine.step()
    engine.add(distinct(9, 200), max_tokens=2)
    batch = engine.step()
    assert list(shares(batch)) == ["r0"]  # the first chunk would fit, the whole does not
    assert engine.pool.num_free_blocks == 2
    engine.run()


def test_a_reply_that_fills_the_whole_cache_ends_there() -> None:
    """Not at max_model_len, and not by waiting for ever for a block that cannot come."""
    engine = FakeEngine(num_blocks=4, max_model_len=1000)
    r = engine.add(distinct(5), max_tokens=None)
    engine.run(max_steps=20)
    assert r.num_tokens == 12
    assert r.status is RequestStatus.LENGTH
    assert r.metrics.num_preemptions == 0


@pytest.mark.parametrize("num_drafts", [0, 1, 5])
def test_drafts_never_reach_beyond_the_longest_sequence(num_drafts: int) -> None:
    engine = FakeEngine(num_blocks=20, max_model_len=14, num_drafts=num_drafts)
    r = engine.add(distinct(5), max_tokens=None)
    engine.run()  # the fake engine checks each step's end
    assert r.num_tokens == 14
    assert r.status is RequestStatus.LENGTH


@pytest.mark.parametrize(
    "name", ["max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_loras"]
)
def test_a_limit_under_which_nothing_could_run_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        FakeEngine(**{name: 0})


# Rule 8: the counters


def test_computed_tokens_advance_when_the_step_is_scheduled() -> None:
    engine = FakeEngine(num_blocks=20, max_num_batched_tokens=6)
    r = engine.add(distinct(8))
    batch = engine.schedule()
    assert r.num_computed_tokens == 6
    engine.update(batch, engine.executor.execute(batch))
    assert r.num_computed_tokens == 6
    engine.schedule()
    assert r.num_computed_tokens == 8


@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_rejected_draft_tokens_roll_the_counter_back(num_right: int) -> None:
    engine = FakeEngine(num_blocks=20)
    r = engine.add(distinct(3), max_tokens=8)
    engine.step()
    right = reply_alone(r, 1000)[1 : 1 + num_right]
    r.draft_token_ids = right + [-1] * (3 - num_right)
    batch = engine.schedule()
    assert r.num_computed_tokens == 7
    engine.update(batch, engine.executor.execute(batch))
    assert r.num_output_tokens == 2 + num_right
    assert r.num_computed_tokens == r.num_tokens - 1
    engine.run()


# The end of a request


def test_tokens_after_the_one_that_ends_the_request_are_dropped() -> None:
    engine = FakeEngine(num_blocks=20)
    r = engine.add(distinct(3), max_tokens=3)
    engine.step()
    r.draft_token_ids = reply_alone(r, 1000)[1:] + [-1]
    batch = engine.schedule()
    result = engine.executor.execute(batch)
    assert len(result.sampled_token_ids[0]) >= 3
    (output,) = engine.update(batch, result)
    assert output.finished
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 2
    assert r.num_output_tokens == len(r.metrics.token_times) == 3
    assert engine.scheduler.stats.num_generation_tokens == 3


def test_a_reply_ends_at_the_end_of_sequence_token() -> None:
    engine = FakeEngine(num_blocks=20)
    r = engine.add(distinct(3), max_tokens=20)
    reply = reply_alone(r, 1000)
    r.eos_token_ids = frozenset([reply[5]])
    engine.run()
    assert r.status is RequestStatus.STOPPED
    assert r.output_token_ids == reply[: reply.index(reply[5]) + 1]


@pytest.mark.parametrize(
    ("options", "num_tokens", "finish_reason", "stop_reason"),
    [
        ({}, 2, "stop", None),
        ({"ignore_eos": True}, 6, "length", None),
        ({"min_tokens": 2}, 2, "stop", None),
        ({"min_tokens": 3}, 6, "length", None),
        ({"ignore_eos": True, "stop_token_ids": [8]}, 2, "stop", 8),
        ({"min_tokens": 3, "stop_token_ids": [8]}, 6, "length", None),
        ({"max_tokens": 2}, 2, "stop", None),
        ({"max_tokens": 1}, 1, "length", None),
    ],
)
def test_what_ends_a_reply(
    options: dict, num_tokens: int, finish_reason: str, stop_reason: int | None
) -> None:
    engine = FakeEngine()
    r = engine.add([1], eos_token_ids=[8])
    r.sampling_params = SamplingParams(**{"max_tokens": 6, **options})
    for token in (7, 8, 9, 9, 9, 9):
        if not r.status.finished:
            batch = engine.scheduler.schedule()
            (output,) = engine.scheduler.update(batch, StepResult([[token]]))
    assert output.finished
    assert r.num_output_tokens == num_tokens
    assert output.outputs[0].finish_reason == finish_reason
    assert output.outputs[0].stop_reason == stop_reason


def aborted(engine: FakeEngine, index: int) -> None:
    r = engine.requests[index]
    num_output_tokens = r.num_output_tokens
    engine.scheduler.finish(r)
    assert r.status is RequestStatus.ABORTED
    assert r.block_ids == []
    assert r.metrics.finished_time == engine.time
    assert r.num_output_tokens == num_output_tokens
    check_books(engine)


def test_a_request_can_be_aborted_while_it_waits() -> None:
    engine = full_cache()
    engine.add(distinct(3, 900))
    aborted(engine, 3)
    engine.run()


def test_a_request_can_be_aborted_while_it_waits_to_be_resumed() -> None:
    engine = full_cache()
    engine.step()
    assert engine.requests[2].status is RequestStatus.PREEMPTED
    aborted(engine, 2)
    engine.run()


def test_a_request_can_be_aborted_while_it_runs() -> None:
    engine = FakeEngine(num_blocks=20, max_num_batched_tokens=6)
    engine.add(distinct(4))
    engine.add(distinct(9, 200))
    engine.step()
    aborted(engine, 1)  # in the middle of its prompt
    engine.step()
    aborted(engine, 0)
    engine.run()


def test_an_abort_leaves_shared_blocks_to_their_other_owners() -> None:
    engine = FakeEngine(num_blocks=20)
    engine.add(distinct(10))
    other = engine.add(distinct(10))
    engine.step()
    aborted(engine, 0)
    assert all(engine.pool.ref_counts[block] == 1 for block in other.block_ids)
    engine.run()


@pytest.mark.parametrize("max_tokens", [1, 4])
def test_a_request_aborted_while_its_step_runs_gets_nothing_of_it(max_tokens: int) -> None:
    """Also if it would have finished in that step."""
    engine = FakeEngine(num_blocks=20)
    r = engine.add(distinct(5), max_tokens=max_tokens)
    other = engine.add(distinct(5, 200))
    batch = engine.schedule()
    result = engine.executor.execute(batch)
    engine.scheduler.finish(r)
    outputs = engine.update(batch, result)
    assert [output.request_id for output in outputs] == [other.request_id]
    assert r.status is RequestStatus.ABORTED
    assert r.output_token_ids == []
    engine.run()


def test_an_abort_after_the_end_changes_nothing() -> None:
    engine = FakeEngine(num_blocks=20)
    r = engine.add(distinct(5), max_tokens=1)
    engine.step()
    assert r.status is RequestStatus.LENGTH
    engine.time += 1
    engine.scheduler.finish(r)
    engine.scheduler.finish(r)
    assert r.status is RequestStatus.LENGTH
    assert r.metrics.finished_time == engine.time - 1
    assert engine.pool.usage == 0


def test_a_failed_step_leaves_no_pages_that_were_never_written() -> None:
    """Its blocks are in the prefix cache from the moment it is scheduled."""
    engine = FakeEngine(num_blocks=20)
    r = engine.add(distinct(10))
    engine.step()
    engine.add(distinct(10, 200))
    engine.schedule()  # and then the executor fails, or the user interrupts it
    engine.scheduler.reset_prefix_cache()
    assert not engine.pool.cached_blocks
    assert r.status is RequestStatus.PREEMPTED
    engine.add(distinct(10, 200))
    engine.run()


def test_the_timeline_of_a_request_is_on_the_clock_of_the_scheduler() -> None:
    engine = FakeEngine(num_blocks=20, max_num_seqs=1)
    engine.add(distinct(3), max_tokens=2)
    r = engine.add(distinct(3, 200), max_tokens=2)
    engine.run()
    assert r.metrics.arrival_time == 0
    assert r.metrics.first_scheduled_time == 3
    assert r.metrics.token_times == [3, 4]
    assert r.metrics.finished_time == 4
