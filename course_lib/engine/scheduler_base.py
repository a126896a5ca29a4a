"""The scheduler's books: the queues, what preemption and admission do to a request, results.

`SchedulerBase` keeps them in order and decides nothing. A scheduler derives from it and implements
`schedule`, out of `preempt_last`, `match_prefix`, `admit` and `make_batch`; the engine's own is in
`scheduler`.
"""

import bisect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from course_lib.engine.batch import ScheduledBatch, ScheduledRequest, StepResult
from course_lib.engine.block_pool_base import BlockPoolBase
from course_lib.engine.outputs import CompletionOutput, RequestOutput
from course_lib.engine.request import Request, RequestStatus
from course_lib.engine.stats import SchedulerStats


class SchedulerBase(ABC):
    """Two queues of requests and the books on them.

    `waiting` and `running` are kept in the order of `Request.order`: the first is served first,
    the last one running is preempted first.

    Args:
        block_pool: owns the KV cache.
        max_num_seqs: requests that may run at once.
        max_num_batched_tokens: tokens a step may compute.
        max_model_len: longest sequence, prompt and output, in tokens. One that fills the whole
            cache ends there too, since it could never be computed further.
        max_loras: different adapters that may run at once; None for any number.
        clock: returns seconds; the simulator passes a virtual one.
    """

    def __init__(
        self,
        block_pool: BlockPoolBase,
        *,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_model_len: int,
        max_loras: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("max_model_len", max_model_len),
            ("max_loras", max_loras),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.block_pool = block_pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.cache_tokens = (block_pool.num_blocks - 1) * block_pool.block_size
        self.max_request_tokens = min(max_model_len, self.cache_tokens)
        self.max_loras = max_loras
        self.clock = clock
        self.stats = SchedulerStats()
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it could never finish, however empty the cache.
        """
        longest_prompt = self.max_request_tokens - 1
        if request.num_prompt_tokens > longest_prompt:
            raise ValueError(
                f"request {request.request_id!r} has a prompt of {request.num_prompt_tokens} "
                f"tokens, but at most {longest_prompt} fit (max_model_len {self.max_model_len}, "
                f"KV cache {self.cache_tokens} tokens, one is kept for the reply); shorten the "
                "prompt or raise the limit"
            )
        bisect.insort(self.waiting, request, key=lambda r: r.order)

    def has_unfinished_requests(self) -> bool:
        """Whether there is anything left to schedule."""
        return bool(self.waiting or self.running)

    @abstractmethod
    def schedule(self) -> ScheduledBatch:
        """Decide what the next step computes."""

    def preempt_last(self) -> Request:
        """Take the blocks of the request that comes last; it will be computed anew."""
        request = self.running.pop()
        self.block_pool.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.draft_token_ids = []
        request.metrics.num_preemptions += 1
        self.stats.num_preemptions += 1
        bisect.insort(self.waiting, request, key=lambda r: r.order)
        return request

    def match_prefix(self, request: Request) -> list[int]:
        """Cached blocks of a waiting request's beginning, as far as it may use them."""
        # Prompt logprobs need the logits of every prompt token, so nothing may be skipped.
        if request.sampling_params.prompt_logprobs is not None:
            return []
        return self.block_pool.match_prefix(request)

    def admit(self, request: Request, num_cached_tokens: int = 0) -> None:
        """Move a waiting request to those running.

        Args:
            request: has got its blocks for this step.
            num_cached_tokens: how many of its tokens the prefix cache has.
        """
        self.waiting.remove(request)
        if request.status is RequestStatus.WAITING:  # a resumed request is not counted twice
            request.metrics.first_scheduled_time = self.clock()
            request.num_cached_tokens = num_cached_tokens
            self.stats.prefix_cache_queries += request.num_tokens
            self.stats.prefix_cache_hits += num_cached_tokens
        request.status = RequestStatus.RUNNING
        bisect.insort(self.running, request, key=lambda r: r.order)

    def make_batch(
        self, scheduled: list[ScheduledRequest], preempted: list[Request], reason: str = ""
    ) -> ScheduledBatch:
        """The step's batch. Computed-token counters advance here, not when the step is done."""
        for entry in scheduled:
            entry.request.num_computed_tokens = entry.end
        return ScheduledBatch(scheduled, preempted, reason if self.waiting else "")

    def reset_prefix_cache(self) -> None:
        """Forget the contents of the cache; what runs is computed anew.

        Called after a step that failed on its way: its blocks count as written since `schedule`.
        """
        while self.running:
            self.preempt_last()
        self.block_pool.reset_prefix_cache()

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[RequestOutput]:
        """Book the result of a step.

        Returns:
            An output for each request that got tokens. Its completion holds this step's tokens;
            the engine adds the text.
        """
        return [_output(request, token_ids) for request, token_ids in self.book(batch, result)]

    def book(self, batch: ScheduledBatch, result: StepResult) -> list[tuple[Request, list[int]]]:
        """Book the result of a step. Returns the requests that got tokens, each with those."""
        now = self.clock()
        self.stats.num_steps += 1
        self.stats.num_scheduled_tokens += batch.num_tokens
        booked = []
        for index, entry in enumerate(batch.scheduled):
            request = entry.request
            new_token_ids = result.sampled_token_ids[index]
            if not new_token_ids or request.status.finished:  # aborted while the step ran
                continue
            if request.draft_token_ids:
                num_rejected = entry.num_draft_tokens - (len(new_token_ids) - 1)
                request.num_computed_tokens -= num_rejected
                request.draft_token_ids = []
            new_token_ids = self._append(request, new_token_ids, now)
            if result.draft_token_ids and not request.status.finished:
                room = self.max_request_tokens - request.num_tokens - 1
                request.draft_token_ids = result.draft_token_ids[index][:room]
            booked.append((request, new_token_ids))
        self.running = [r for r in self.running if not r.status.finished]
        return booked

    def _append(self, request: Request, new_token_ids: list[int], now: float) -> list[int]:
        """Append tokens up to the one that ends the request. Returns those kept."""
        for count, token in enumerate(new_token_ids, start=1):
            request.token_ids.append(token)
            request.metrics.token_times.append(now)
            self.stats.num_generation_tokens += 1
            status = self._end_after(request, token)
            if status is not None:
                self._end(request, status, now)
                return new_token_ids[:count]
        return new_token_ids

    def _end_after(self, request: Request, token: int) -> RequestStatus | None:
        params, num_output_tokens = request.sampling_params, request.num_output_tokens
        if num_output_tokens >= params.min_tokens:
            if token in request.eos_token_ids and not params.ignore_eos:
                return RequestStatus.STOPPED
            if params.stop_token_ids and token in params.stop_token_ids:
                request.stop_reason = token
                return RequestStatus.STOPPED
        full = request.num_tokens >= self.max_request_tokens
        if full or num_output_tokens == params.max_tokens:
            return RequestStatus.LENGTH
        return None

    def _end(self, request: Request, status: RequestStatus, now: float) -> None:
        self.block_pool.free(request)
        request.status = status
        request.metrics.finished_time = now

    def finish(
        self,
        request: Request,
        status: RequestStatus = RequestStatus.ABORTED,
        stop_reason: str | None = None,
    ) -> None:
        """End a request from outside: abort it, or stop it at a stop string.

        Allowed in any state and at any time between steps; nothing happens if it has ended.
        """
        if request.status.finished:
            return
        queue = self.running if request.status is RequestStatus.RUNNING else self.waiting
        queue.remove(request)
        request.stop_reason = stop_reason
        self._end(request, status, self.clock())


def _output(request: Request, new_token_ids: list[int]) -> RequestOutput:
    completion = CompletionOutput(
        index=0,
        text="",
        token_ids=new_token_ids,
        finish_reason=request.status.finish_reason,
        stop_reason=request.stop_reason,
    )
    return RequestOutput(
        request_id=request.request_id,
        prompt=None,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[completion],
        finished=request.status.finished,
        metrics=request.metrics,
        num_cached_tokens=request.num_cached_tokens,
    )
