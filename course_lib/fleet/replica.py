"""One simulated replica: the engine's own scheduler and block pool, on a clock that jumps.

A `Replica` takes the steps that `LLMEngine` takes: schedule, execute, update. Only the executor is
another one: `ModelledExecutor` computes nothing and says how long it would have taken.

Where the batch cannot change (all decode, nobody ends, nobody is admitted) the steps up to the next
change are alike, and the replica jumps over them. Scheduling stays with `Scheduler.schedule()`,
which makes the first of these steps, and `Scheduler.book()`, which books the last one. What the
steps between would have done to the requests is done at once, and in the same order.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from course_lib.engine.batch import ScheduledBatch, StepResult
from course_lib.engine.block_pool import BlockPool
from course_lib.engine.request import Request, RequestStatus
from course_lib.engine.sampling_params import SamplingParams
from course_lib.engine.scheduler import Scheduler
from course_lib.fleet.block_names import block_names, contents_of
from course_lib.fleet.router import RoutedRequest
from course_lib.fleet.spec import ReplicaSpec
from course_lib.fleet.step_time import StepTimeModel, StepWork
from course_lib.traces.trace import Segment, content_ids


class SimulatedRequest(Request):
    """A request whose prompt and reply are contents of a trace.

    Args:
        request_id: unique in the simulation.
        prompt: its contents, at least one token in all.
        params: its `max_tokens` is the length of the reply.
        reply_token: stands at each place of the reply.
        arrival_time: at the replica, in seconds.
        priority: smaller is served first.
    """

    def __init__(
        self,
        request_id: str,
        prompt: Sequence[Segment],
        params: SamplingParams,
        reply_token: int,
        arrival_time: float,
        priority: int = 0,
    ) -> None:
        super().__init__(
            request_id, content_ids(prompt), params, arrival_time=arrival_time, priority=priority
        )
        assert params.max_tokens is not None
        self.contents = (*prompt, Segment(reply_token, params.max_tokens))
        self.reply = [reply_token]  # of a step
        self.final_tokens = self.num_tokens + params.max_tokens
        self.flight: Any = None  # whose attempt it is, for whoever simulates


class VirtualClock:
    """Seconds since the simulation began. Whoever simulates sets it; it never goes back."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Now."""
        return self.now_s


class ModelledExecutor:
    """An `Executor` that computes nothing: each request gets the token that its trace names.

    Args:
        step_time: how long a step takes.
        clock: tells when it begins.
        slowdown: factor on all step times.
    """

    def __init__(self, step_time: StepTimeModel, clock: VirtualClock, slowdown: float) -> None:
        self.step_time = step_time
        self.clock = clock
        self.slowdown = slowdown
        #: When the steps of the last call end, in seconds.
        self.ends_s: list[float] = []

    def execute(self, batch: ScheduledBatch, num_steps: int = 1) -> StepResult:
        """The tokens of a step that begins now; `ends_s` then tells when it is over.

        Args:
            batch: what to compute.
            num_steps: if above 1, so many steps that each compute one token for each request of
                the batch; the result is that of each.
        """
        now_s = self.clock.now_s
        if num_steps == 1:
            self.ends_s = [
                now_s + self.step_time.seconds(StepWork.of(batch.scheduled)) * self.slowdown
            ]
        else:
            context_tokens = sum([entry.start + 1 for entry in batch.scheduled])
            times = np.empty(num_steps + 1)
            times[0] = now_s
            times[1:] = self.step_time.decode_seconds(
                len(batch.scheduled), context_tokens, num_steps
            )
            times[1:] *= self.slowdown
            self.ends_s = np.cumsum(times)[1:].tolist()  # added up as single steps would be
        return StepResult([_reply(e.request) if e.samples else [] for e in batch.scheduled])


def _reply(request: Request) -> list[int]:
    assert isinstance(request, SimulatedRequest)
    return request.reply


def probe_of(request: RoutedRequest, block_size: int) -> Request:
    """A request with this prompt, to be matched against prefix caches and never queued."""
    probe = Request("probe", request.prompt_token_ids)
    probe.block_hashes = block_names(contents_of(request.prompt_token_ids), block_size)
    return probe


class Replica:
    """An engine on a virtual clock.

    Whoever drives it sets the clock and calls `complete` when `end_s` has come.

    Args:
        name: unique in the fleet.
        spec: what it is.
        clock: all replicas of a simulation share one.
        region: where it is.
        slowdown: factor on its step times.
        jump: jump over steps alike. None: with the course's own scheduler and block pool only,
            since it is these whose rules are known.
        probe_of: makes the probe that `cached_tokens` looks up. One that keeps it has the prompt
            hashed once for all replicas.
    """

    def __init__(
        self,
        name: str,
        spec: ReplicaSpec,
        clock: VirtualClock,
        region: str = "",
        slowdown: float = 1.0,
        jump: bool | None = None,
        probe_of: Callable[[RoutedRequest, int], Request] = probe_of,
    ) -> None:
        self.name = name
        self.region = region
        self.clock = clock
        self.probe_of = probe_of
        self.block_size = spec.block_size
        self.num_blocks = spec.num_blocks
        self.block_pool = spec.block_pool(
            spec.num_blocks, spec.block_size, enable_prefix_caching=spec.enable_prefix_caching
        )
        self.scheduler = spec.scheduler(
            self.block_pool,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            max_model_len=spec.max_model_len,
            clock=clock,
        )
        self.executor = ModelledExecutor(spec.step_time, clock, slowdown)
        known = type(self.scheduler) is Scheduler and type(self.block_pool) is BlockPool
        self.jump = known if jump is None else jump
        #: When the step or the steps alike that run now end; infinite if none does.
        self.end_s = math.inf
        #: Called with the name and each batch, but for those that are jumped over.
        self.observe: Callable[[str, ScheduledBatch], None] | None = None
        self._batch: ScheduledBatch | None = None
        self._result: StepResult | None = None
        self._ends_s: list[float] = []  # of the steps alike, those not yet in the requests
        self._busy_s = 0.0  # before the present run of steps
        self._busy_since_s = math.inf

    # What routers, admission and autoscalers look at.

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self.scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self.scheduler.running)

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV blocks that requests own, 0 to 1."""
        self.settle()
        return self.block_pool.usage

    def cached_tokens(self, request: RoutedRequest) -> int:
        """Tokens of the prompt that the prefix cache holds. Exact, and nothing is changed."""
        self.settle()
        return (
            len(self.block_pool.match_prefix(self.probe_of(request, self.block_size)))
            * self.block_size
        )

    @property
    def busy_s(self) -> float:
        """Time in which a step ran, since the start."""
        return self._busy_s + max(0.0, self.clock.now_s - self._busy_since_s)

    @property
    def requests(self) -> list[Request]:
        """All that is unfinished, those that run first."""
        return [*self.scheduler.running, *self.scheduler.waiting]

    def remaining_s(self, request: Request) -> float:
        """How long a request still takes if the batch stays as it is."""
        self.settle()
        running = self.scheduler.running
        seconds = self.executor.step_time.seconds
        num_decodes = max(1, len(running))
        step_s = seconds(
            StepWork(num_decodes=num_decodes, context_tokens=sum(r.num_tokens for r in running))
        )
        prefill_s, computed = 0.0, request.num_computed_tokens
        tokens = request.num_tokens - computed
        if tokens > 1:
            pairs = tokens * computed + tokens * (tokens + 1) // 2
            prefill_s = seconds(
                StepWork(prefill_tokens=tokens, prefill_pairs=pairs, num_prefills=1)
            )
        if request.status is not RequestStatus.RUNNING:  # until a place is free
            prefill_s += step_s * min(map(_remaining, running), default=0)
        return (prefill_s + step_s * _remaining(request)) * self.executor.slowdown

    # What happens to it.

    def add_request(self, request: SimulatedRequest) -> None:
        """Queue a request. If no step runs, `begin` is to be called when all of this moment are in.

        Raises:
            ValueError: it could never finish, however empty the cache.
        """
        self.settle()
        head = self.scheduler.waiting[0] if self.scheduler.waiting else None
        self.scheduler.add_request(request)
        if self.block_pool.enable_prefix_caching:
            request.block_hashes = block_names(request.contents, self.block_size)
        if not self._still_blocked(head):
            self._cut()

    def begin(self) -> None:
        """Begin a step, if none runs."""
        if self._batch is None:
            self._begin()

    def abort(self, request: Request) -> None:
        """End a request from outside; the step that runs is not interrupted."""
        self.settle()
        self.scheduler.finish(request)
        self._cut()

    def complete(self) -> ScheduledBatch:
        """Book the step that ends now, at `end_s`, and begin the next one.

        Returns:
            The batch of that step; its requests have their tokens and their new states.
        """
        batch, result = self._batch, self._result
        assert batch is not None and result is not None
        self.settle()
        self.scheduler.book(batch, result)
        self._begin()
        return batch

    def stop(self) -> list[Request]:
        """Stop for good, in the middle of a step if need be. Returns what was unfinished."""
        self.settle()
        self._end_of_work()
        return self.requests

    def _begin(self) -> None:
        """Schedule the next step, and find out how many like it follow."""
        batch = self.scheduler.schedule()
        if not batch.scheduled:
            if self.scheduler.has_unfinished_requests():
                raise RuntimeError(
                    f"{self.name}: the scheduler schedules nothing though {self.num_waiting} "
                    f"requests wait and {self.num_running} run; it would never finish them"
                )
            self._end_of_work()
            return
        self._busy_since_s = min(self._busy_since_s, self.clock.now_s)
        self._batch = batch
        if self.observe is not None:
            self.observe(self.name, batch)
        self._result = self.executor.execute(
            batch, self._num_steps_alike(batch) if self.jump else 1
        )
        self._ends_s = self.executor.ends_s
        self.end_s = self._ends_s[-1]

    def _end_of_work(self) -> None:
        self._busy_s = self.busy_s
        self._busy_since_s = self.end_s = math.inf
        self._batch = self._result = None
        self._ends_s = []

    # Jumping.

    def _num_steps_alike(self, batch: ScheduledBatch) -> int:
        """How many steps, `batch` the first of them, compute one token for each of its requests.

        At the last one a request may end. Fewer than there are is right, too.
        """
        scheduler, pool = self.scheduler, self.block_pool
        entries, limit = batch.scheduled, scheduler.max_request_tokens
        if len(entries) != len(scheduler.running):
            return 1
        num_steps = 1 << 30
        for entry in entries:
            request = entry.request
            num_tokens = len(request.token_ids)
            decodes = entry.start + 1 == num_tokens > len(request.prompt_token_ids)
            if not decodes:
                return 1
            num_steps = min(num_steps, _final_tokens(request) - num_tokens, limit - num_tokens)
        if num_steps > 1 and not self._admits_nobody():
            return 1
        # Each request takes at most one block for each `block_size` steps, rounded up.
        each = pool.num_free_blocks // len(entries)
        return max(1, min(num_steps, 1 + each * self.block_size))

    def _admits_nobody(self) -> bool:
        """Whether no request can be admitted until one ends or arrives."""
        scheduler, pool = self.scheduler, self.block_pool
        if not scheduler.waiting or len(scheduler.running) >= scheduler.max_num_seqs:
            return True
        head = scheduler.waiting[0]
        prefix = scheduler.match_prefix(head)
        if pool.can_admit(head, prefix):
            return False
        # Free blocks only get fewer. Cached ones that it could use come only out of replies that
        # its prompt repeats, and then the very next block holds a token of such a reply.
        start = len(prefix) * self.block_size
        following = head.token_ids[start : start + self.block_size]
        replies = {token for request in scheduler.running for token in _reply(request)}
        return replies.isdisjoint(following)

    def _still_blocked(self, head: Request | None) -> bool:
        """Whether a request that has just been queued changes nothing before the steps end."""
        scheduler = self.scheduler
        if len(scheduler.running) >= scheduler.max_num_seqs:
            return True
        return head is not None and scheduler.waiting[0] is head

    def settle(self) -> None:
        """Bring the requests to where they are now: the steps that have ended are in them.

        The last one of the steps alike is left to `complete`.
        """
        if len(self._ends_s) > 1:
            num_steps = min(bisect_right(self._ends_s, self.clock.now_s), len(self._ends_s) - 1)
            if num_steps:
                self._skip(self._ends_s[:num_steps])
                del self._ends_s[:num_steps]

    def _cut(self) -> None:
        """Let the steps alike end with the one that runs now."""
        if len(self._ends_s) > 1:
            del self._ends_s[1:]
            self.end_s = self._ends_s[0]

    def _skip(self, ends_s: list[float]) -> None:
        """Do to the requests what so many decode steps would have done."""
        assert self._batch is not None
        num_steps = len(ends_s)
        requests = [entry.request for entry in self._batch.scheduled]
        for request in requests:
            request.token_ids += _reply(request) * num_steps
            request.metrics.token_times += ends_s
        if self.block_pool.enable_prefix_caching:
            self._allocate_in_order(requests, num_steps)
        else:
            for request in requests:
                self.block_pool.allocate(request, num_steps)
                request.num_computed_tokens += num_steps
        stats = self.scheduler.stats
        stats.num_steps += num_steps
        stats.num_scheduled_tokens += num_steps * len(requests)
        stats.num_generation_tokens += num_steps * len(requests)

    def _allocate_in_order(self, requests: Sequence[Request], num_steps: int) -> None:
        """Take and cache blocks in the order of the steps: eviction and sharing depend on it.

        A step matters to the pool if its token is the first or the last one of a block.
        """
        size, count, allocate = self.block_size, len(requests), self.block_pool.allocate
        computed = [request.num_computed_tokens for request in requests]
        moments: list[int] = []  # step * count + place, so that they sort by step, then by place
        for place, start in enumerate(computed):
            first = -start % size  # until a block begins
            last = first - 1 if first else size - 1  # until one ends
            for step in {first, last}:
                moments += range(step * count + place, num_steps * count, size * count)
        moments.sort()
        for moment in moments:
            step, place = divmod(moment, count)
            request = requests[place]
            request.num_computed_tokens = computed[place] + step
            allocate(request, 1)
        for request, start in zip(requests, computed, strict=True):
            request.num_computed_tokens = start + num_steps


def _final_tokens(request: Request) -> int:
    assert isinstance(request, SimulatedRequest)
    return request.final_tokens


def _remaining(request: Request) -> int:
    return _final_tokens(request) - request.num_tokens
