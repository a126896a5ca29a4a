"""One request on its way through the engine: its tokens, its blocks, its timeline.

A request owns what is known of it (prompt and output tokens), how much of that is computed
(`num_computed_tokens`), and the ids of the KV blocks that hold it. The scheduler moves it through
the states of `RequestStatus`. No PyTorch here: the fleet simulator uses the same class.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from course_lib.engine.sampling_params import SamplingParams

_arrival_counter = itertools.count()


class RequestStatus(Enum):
    """Where a request stands. Everything from `STOPPED` on is an end."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"  # waiting again, to be recomputed
    STOPPED = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens or max_model_len
    ABORTED = "abort"

    finished: bool  # nothing more will come
    finish_reason: str | None  # vLLM's and OpenAI's name of the end, None while there is none

    def __init__(self, value: str) -> None:
        self.finished = value in ("stop", "length", "abort")
        self.finish_reason = value if self.finished else None


@dataclass
class RequestMetrics:
    """The timeline of a request, in seconds of the engine's clock."""

    arrival_time: float
    first_scheduled_time: float | None = None
    token_times: list[float] = field(default_factory=list)
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def first_token_time(self) -> float | None:
        """When the first output token was there."""
        return self.token_times[0] if self.token_times else None

    @property
    def queue_time_s(self) -> float | None:
        """From arrival until the first step that computed some of it."""
        return _between(self.arrival_time, self.first_scheduled_time)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: queue and prefill."""
        return _between(self.arrival_time, self.first_token_time)

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first one."""
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)

    @property
    def e2e_latency_s(self) -> float | None:
        """From arrival to the end."""
        return _between(self.arrival_time, self.finished_time)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


class Request:
    """The state of one request.

    Args:
        request_id: unique among the requests of an engine.
        prompt_token_ids: at least one token.
        sampling_params: what was asked for.
        arrival_time: seconds of the engine's clock.
        priority: smaller is served first, as in vLLM.
        eos_token_ids: tokens that end a reply unless `ignore_eos`.
        seed: of its draws; without it the one in `sampling_params`, or 0.
        lora_name: adapter of the request; blocks computed with another one are not shared.
        cache_salt: requests with different salts never share blocks.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams | None = None,
        *,
        arrival_time: float = 0.0,
        priority: int = 0,
        eos_token_ids: Iterable[int] = (),
        seed: int | None = None,
        lora_name: str | None = None,
        cache_salt: str | None = None,
    ) -> None:
        if not prompt_token_ids:
            raise ValueError(f"request {request_id!r} has an empty prompt; give at least one token")
        self.request_id = request_id
        self.sampling_params = sampling_params or SamplingParams()
        self.priority = priority
        self.eos_token_ids = frozenset(eos_token_ids)
        self.seed = (self.sampling_params.seed or 0) if seed is None else seed
        self.lora_name = lora_name
        self.cache_salt = cache_salt
        self.arrival_index = next(_arrival_counter)

        self.status = RequestStatus.WAITING
        self.stop_reason: int | str | None = None
        self.metrics = RequestMetrics(arrival_time)

        self.prompt_token_ids = list(prompt_token_ids)
        self.token_ids = list(prompt_token_ids)  # prompt, then output
        self.draft_token_ids: list[int] = []  # proposed for the next step, not yet verified
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # taken from the prefix cache at the first admission

        self.block_ids: list[int] = []
        self.num_final_blocks = 0  # of these, the first ones, full of tokens that are certain
        self.block_hashes: list[bytes] = []  # of full blocks, as far as anyone has asked

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.token_ids)

    @property
    def num_tokens_with_draft(self) -> int:
        """Known tokens and those proposed by speculative decoding."""
        return len(self.token_ids) + len(self.draft_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def order(self) -> tuple[int, float, int]:
        """Sort key of the queues: smaller is served first and preempted last."""
        return (self.priority, self.metrics.arrival_time, self.arrival_index)

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.value}, prompt={self.num_prompt_tokens}, "
            f"output={self.num_output_tokens}, computed={self.num_computed_tokens})"
        )
