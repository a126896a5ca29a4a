"""How a replica comes and goes: ready after its warm-up, and no request lost when it leaves.

A spot machine is taken away a fixed time after its warning. `DrainPolicy` lets those requests
finish that will be done before then, less a margin for shutting down, and hands back the others to
be retried elsewhere at once, while there is time for that. `Lifecycle` carries it out.
"""

import asyncio
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from course_lib.engine.sampling_params import SamplingParams
from course_lib.engine.startup import log_ready, phase
from course_lib.validation import number

if TYPE_CHECKING:  # the policy alone needs no engine, and the simulator has none
    from course_lib.engine.engine import Prompt
    from course_lib.serving.async_llm import AsyncLLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DrainPolicy:
    """Finish what fits the time after a termination warning, retry the rest elsewhere.

    Args:
        warning_s: from the warning (SIGTERM) to the end of the machine.
        shutdown_margin_s: the last part of it, kept for closing down.

    Raises:
        ValueError: a time is negative or not a number, or the margin exceeds the warning.
    """

    warning_s: float
    shutdown_margin_s: float

    def __post_init__(self) -> None:
        number("warning_s", self.warning_s, at_least=0)
        number("shutdown_margin_s", self.shutdown_margin_s, at_least=0, at_most=self.warning_s)

    def decide(self, remaining_s: Mapping[str, float]) -> dict[str, str]:
        """Give each request "finish" or "retry".

        Args:
            remaining_s: seconds that each request still needs, by its name.

        Raises:
            ValueError: a time is negative or not a number.
        """
        budget_s = self.warning_s - self.shutdown_margin_s
        return {
            name: "finish"
            if number(f"remaining_s[{name!r}]", seconds, at_least=0) <= budget_s
            else "retry"
            for name, seconds in remaining_s.items()
        }


class ReplicaState(Enum):
    """Where a replica stands."""

    STARTING = "starting"  # loaded, warming up
    READY = "ready"  # in rotation
    DRAINING = "draining"  # finishes what it has, takes nothing new


class DrainingError(RuntimeError):
    """The replica leaves before this request would be done."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("this replica is shutting down; send the request again")
        self.retry_after_s = retry_after_s


class Lifecycle:
    """Starts and drains one replica.

    Args:
        llm: the engine.
        drain_policy: who may finish; a part with `warning_s`, `shutdown_margin_s` and `decide`.
    """

    def __init__(self, llm: "AsyncLLM", drain_policy: DrainPolicy) -> None:
        self.llm = llm
        self.drain_policy = drain_policy
        self.state = ReplicaState.STARTING

    async def warm_up(self, prompts: "Sequence[Prompt]") -> None:
        """Run each prompt once, then join the rotation.

        What is slow the first time is over then, and the prefix cache holds their beginnings. A
        replica that cannot run them stays out.
        """
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        try:
            with phase("warm_up"):
                for index, prompt in enumerate(prompts):
                    async for _ in self.llm.generate(f"warm-up-{index}", prompt, params):
                        pass
        except Exception as error:
            if self.state is ReplicaState.STARTING:
                logger.error("not ready: the warm-up failed, %s: %s", type(error).__name__, error)
            return
        if self.state is ReplicaState.STARTING:
            self.state = ReplicaState.READY
            log_ready()

    def check_open(self) -> None:
        """Raise `DrainingError` if nothing new is taken."""
        if self.state is ReplicaState.DRAINING:
            raise DrainingError(self._retry_after_s)

    async def drain(self) -> None:
        """Leave the rotation and return once every request has got its answer.

        Those that do not fit the budget are ended at once; those that were expected to fit and do
        not, at its end. Only for a client that does not read its answer nobody waits longer.
        """
        self.state = ReplicaState.DRAINING
        policy = self.drain_policy
        self._fail(
            name
            for name, choice in policy.decide(self.llm.remaining_s()).items()
            if choice == "retry"
        )
        await self._all_done(policy.warning_s - policy.shutdown_margin_s)
        self._fail(self.llm.unfinished_request_ids())
        await self._all_done(policy.shutdown_margin_s)

    def _fail(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.llm.fail(request_id, DrainingError(self._retry_after_s))

    async def _all_done(self, timeout_s: float) -> None:
        """Return when no request is left, or when the time is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.llm.num_unfinished and loop.time() < deadline:
            await asyncio.sleep(0.02)

    @property
    def _retry_after_s(self) -> int:
        return max(1, math.ceil(self.drain_policy.shutdown_margin_s))
