"""What travels between the scheduler and whatever executes a step.

`Scheduler.schedule()` makes a `ScheduledBatch`, an `Executor` answers with a `StepResult`, and
`Scheduler.update()` takes both. The executor is a `ModelRunner` on real hardware and a step-time
model in the fleet simulator, so nothing here imports PyTorch.
"""

from dataclasses import dataclass, field
from typing import Protocol

from course_lib.engine.outputs import LogprobsAtPosition
from course_lib.engine.request import Request


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's share of a step: compute its tokens `start` to `start + num_tokens`."""

    request: Request
    start: int
    num_tokens: int

    @property
    def num_draft_tokens(self) -> int:
        """How many of these, the last ones, are proposed and not yet verified."""
        return max(0, self.end - self.request.num_tokens)

    @property
    def end(self) -> int:
        """Context length after this step, in tokens."""
        return self.start + self.num_tokens

    @property
    def samples(self) -> bool:
        """Whether the step reaches the last known token, so that the next one can be sampled."""
        return self.end >= self.request.num_tokens

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute."""
        known = self.request.token_ids[self.start : self.end]
        return known + self.request.draft_token_ids[: self.num_draft_tokens]


@dataclass(frozen=True)
class ScheduledBatch:
    """The work of one step, and why it looks as it does."""

    scheduled: list[ScheduledRequest]
    preempted: list[Request] = field(default_factory=list)
    reason: str = ""  # why the next waiting request was not admitted, if the scheduler says

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return sum(entry.num_tokens for entry in self.scheduled)


@dataclass
class StepResult:
    """What a step produced, each list parallel to `ScheduledBatch.scheduled`.

    `sampled_token_ids[i]` is empty for a request whose prompt is not finished, has one token
    otherwise, and more when draft tokens were accepted. The others are empty lists where nobody
    asked for them.
    """

    sampled_token_ids: list[list[int]]
    logprobs: list[list[LogprobsAtPosition]] = field(default_factory=list)
    prompt_logprobs: list[list[LogprobsAtPosition]] = field(default_factory=list)
    draft_token_ids: list[list[int]] = field(default_factory=list)  # proposals for the next step


class Executor(Protocol):
    """Carries out a step."""

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Compute the batch's tokens and sample where a request has reached its last one."""
        ...
