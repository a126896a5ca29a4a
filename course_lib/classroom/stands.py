"""Puts an answer that works on the engine's own objects to work on plain data.

A scheduler and a block pool change requests in place, so an oracle cannot hold the requests itself
where the answer runs in a process of its own, as it does when it is graded. A stand holds them
beside the answer; what goes in and out are names and numbers. `stand_beside` makes one, here or
there. A stand knows nothing of what is right.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from course_lib.engine.batch import ScheduledBatch, StepResult
from course_lib.engine.block_pool import BlockPool
from course_lib.engine.request import Request
from course_lib.engine.sampling_params import SamplingParams


def stand_beside(answer: Any, stand: Callable[..., Any]) -> Callable[..., Any]:
    """The stand with the answer in it, still to be given its other arguments."""
    there = getattr(answer, "make_stand", None)  # an answer in another process brings its own
    return partial(stand, answer) if there is None else partial(there, stand)


class SchedulerStand:
    """A scheduler, its requests by name, and the course's own block pool.

    Args:
        scheduler_class: the answer.
        blocks: of the pool, without the null block.
        block_size: tokens in a block.
        reuse: whether prefixes are cached.
        limits: `max_num_seqs` and `max_num_batched_tokens`.
    """

    def __init__(
        self, scheduler_class: Any, blocks: int, block_size: int, *, reuse: bool, **limits: int
    ) -> None:
        pool = BlockPool(blocks + 1, block_size, enable_prefix_caching=reuse)
        length = blocks * block_size
        self.scheduler = scheduler_class(pool, max_model_len=length, clock=lambda: 0.0, **limits)
        self.batch: Any = None

    def add(
        self, name: str, prompt: list[int], max_tokens: int, *, arrival_time: float, priority: int
    ) -> None:
        """Queue a request."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self.scheduler.add_request(
            Request(name, prompt, params, arrival_time=arrival_time, priority=priority)
        )

    def schedule(self) -> Any:
        """A step: its shares as (name, start, number of tokens, tokens computed after it), and
        the names of the preempted. What is no batch is returned as it is.
        """
        self.batch = self.scheduler.schedule()
        if not isinstance(self.batch, ScheduledBatch):
            return self.batch
        shares = [
            (e.request.request_id, e.start, e.num_tokens, e.request.num_computed_tokens)
            for e in self.batch.scheduled
        ]
        return {"shares": shares, "preempted": [r.request_id for r in self.batch.preempted]}

    def update(self, sampled: list[list[int]]) -> list[str]:
        """Book the tokens of the last step. Returns who has ended."""
        outputs = self.scheduler.update(self.batch, StepResult(sampled))
        return [output.request_id for output in outputs if output.finished]


class BlockPoolStand:
    """A block pool and its requests by name.

    Args:
        pool_class: the answer; what follows are its arguments.
    """

    def __init__(self, pool_class: Any, *arguments: Any, **options: Any) -> None:
        self.pool = pool_class(*arguments, **options)
        self.requests: dict[str, Request] = {}

    def look(self, name: str) -> Any:
        """An attribute of the pool; None if there is none."""
        return getattr(self.pool, name, None)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method that takes no request."""
        return getattr(self.pool, method)(*arguments)

    def call_for(
        self,
        method: str,
        name: str,
        state: tuple[list[int], int, str | None, str | None],
        *arguments: Any,
    ) -> tuple[Any, Sequence[int]]:
        """Call a method for a request.

        Args:
            method: of the pool.
            name: of the request.
            state: its tokens, how many of them are computed, its adapter and its salt.
            arguments: what follows the request.

        Returns:
            What the method did, and the block ids that the request then has.
        """
        tokens, num_computed, lora_name, cache_salt = state
        if name not in self.requests:
            self.requests[name] = Request(name, tokens, lora_name=lora_name, cache_salt=cache_salt)
        request = self.requests[name]
        request.token_ids, request.num_computed_tokens = list(tokens), num_computed
        result = getattr(self.pool, method)(request, *arguments)
        return result, list(request.block_ids)
