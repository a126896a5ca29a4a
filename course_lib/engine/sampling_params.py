"""What a caller may ask of the tokens: vLLM's `SamplingParams`, checked when it is made.

A value that makes no sense raises `ValueError` here, at the edge, and not later inside a batch
that other people's requests share. How the values act on logits is in `sampler`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from course_lib.validation import number, whole_number

#: Below this temperature sampling is greedy, as in vLLM.
GREEDY_TEMPERATURE = 1e-5


class RequestOutputKind(Enum):
    """What `LLMEngine.step` returns of a request that is still running."""

    CUMULATIVE = 0  # all tokens so far
    DELTA = 1  # the tokens since the last output
    FINAL_ONLY = 2  # nothing until it has finished


@dataclass
class SamplingParams:
    """Options of one request, with vLLM's names and defaults.

    Args:
        n: how many completions of the same prompt.
        presence_penalty: subtracted once from the logit of each token already generated.
        frequency_penalty: subtracted for each time the token was already generated.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occur
            in the prompt or the output; 1 means none (CTRL, Keskar et al., 2019).
        temperature: divides the logits; 0 is greedy.
        top_p: keep the smallest set of likeliest tokens with this much probability.
        top_k: keep this many likeliest tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than this share of the likeliest one's probability.
        seed: makes the request's tokens reproducible, whatever else is in the batch.
        stop: texts that end the reply; not part of it unless `include_stop_str_in_output`.
        stop_token_ids: tokens that end the reply.
        ignore_eos: go on after the end-of-sequence token.
        max_tokens: longest reply, in tokens; None means up to `max_model_len`.
        min_tokens: no end before this many tokens.
        logprobs: report this many likeliest tokens at each output position, and the chosen one.
        prompt_logprobs: the same at each prompt position.
        detokenize: whether the output has text; stop strings need it.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop text (or token) at the end of the text.
        logit_bias: added to the logits of the given tokens, between -100 and 100.
        output_kind: what a streaming caller receives of a running request.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    stop_strings: list[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("ignore_eos", "detokenize", "skip_special_tokens"):
            self._check_type(name, bool, "True or False")
        self._check_type("include_stop_str_in_output", bool, "True or False")
        self._check_type("output_kind", RequestOutputKind, "a RequestOutputKind")
        self._check_numbers()
        stop = [self.stop] if isinstance(self.stop, str) else _entries("stop", self.stop)
        _require(all(isinstance(s, str) and s for s in stop), "stop", "non-empty strings", stop)
        if stop and not self.detokenize:
            raise ValueError(f"stop needs detokenize=True, as it looks at the text; got {stop!r}")
        self.stop_strings = stop
        stop_token_ids = _entries("stop_token_ids", self.stop_token_ids)
        self.stop_token_ids = [
            whole_number("stop_token_ids", token, at_least=0) for token in stop_token_ids
        ]
        self._check_type("logit_bias", Mapping | None, "a dict of token ids and numbers")
        self.logit_bias = {
            _token_id(token): number(f"logit_bias[{token!r}]", bias, at_least=-100, at_most=100)
            for token, bias in (self.logit_bias or {}).items()
        }
        if self.greedy:
            _require(self.n == 1, "n", "1 when temperature is 0: greedy replies are equal", self.n)

    def _check_type(self, name: str, kind: Any, expected: str) -> None:
        value = getattr(self, name)
        _require(isinstance(value, kind), name, expected, value)

    def _check_numbers(self) -> None:
        """Ranges; numpy's numbers become Python's."""
        self.n = whole_number("n", self.n, at_most=16_384)  # as vLLM's VLLM_MAX_N_SEQUENCES
        for name in ("presence_penalty", "frequency_penalty"):
            setattr(self, name, number(name, getattr(self, name), at_least=-2, at_most=2))
        self.repetition_penalty = number("repetition_penalty", self.repetition_penalty, above=0)
        self.temperature = number("temperature", self.temperature, at_least=0)
        self.top_p = number("top_p", self.top_p, above=0, at_most=1)
        self.top_k = whole_number("top_k", self.top_k, at_least=-1)
        self.min_p = number("min_p", self.min_p, at_least=0, at_most=1)
        self.min_tokens = whole_number("min_tokens", self.min_tokens, at_least=0)
        optional = {"seed": -(2**63), "max_tokens": 1, "logprobs": 0, "prompt_logprobs": 0}
        for name, low in optional.items():
            if getattr(self, name) is not None:
                setattr(self, name, whole_number(name, getattr(self, name), at_least=low))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must not exceed max_tokens, got {self.min_tokens} > {self.max_tokens}"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE


def _require(condition: bool, name: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {got!r}")


def _entries(name: str, value: Any) -> list[Any]:
    """A list from a list, a tuple, a set or None."""
    is_list = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
    _require(value is None or is_list, name, "a list", value)
    return [] if value is None else list(value)


def _token_id(value: Any) -> int:
    """A key of `logit_bias`; a string of digits, as JSON has it, counts too."""
    is_text = isinstance(value, str) and value.isdecimal() and len(value) < 20
    return whole_number("logit_bias token", int(value) if is_text else value, at_least=0)
