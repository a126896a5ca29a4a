"""What a caller gets back: vLLM's `RequestOutput`, `CompletionOutput` and `Logprob`."""

from dataclasses import dataclass, field

from course_lib.engine.request import RequestMetrics


@dataclass(frozen=True)
class Logprob:
    """Natural log of a token's probability before any sampling option acted on it."""

    logprob: float
    rank: int  # 1 is the likeliest token
    decoded_token: str | None = None


#: At one position: the likeliest tokens and the one that stands there.
LogprobsAtPosition = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop", "length", "abort"; None while it runs
    stop_reason: int | str | None = None  # the stop string or stop token; None for the EOS token
    cumulative_logprob: float | None = None
    logprobs: list[LogprobsAtPosition] | None = None

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The state of a request after a step, or at its end."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    prompt_logprobs: list[LogprobsAtPosition | None] | None = field(default=None, repr=False)
