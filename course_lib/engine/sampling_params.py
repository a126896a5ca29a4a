"""What a caller may ask of the tokens: vLLM's `SamplingParams`, checked when it is made.

A value that makes no sense raises `ValueError` here, at the edge, and not later inside a batch
that other people's requests share. How the values act on logits is in `sampler`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

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
        stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        _require(all(isinstance(s, str) and s for s in stop), "stop", "non-empty strings", stop)
        _require(
            self.detokenize or not stop, "stop", "empty when detokenize is False, since it", stop
        )
        self.stop_strings = stop
        self.stop_token_ids = list(self.stop_token_ids or [])
        self.logit_bias = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        self._check_ranges()
        if self.greedy:
            _require(self.n == 1, "n", "1 when temperature is 0: greedy replies are equal", self.n)

    def _check_ranges(self) -> None:
        _check_int("n", self.n, 1)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), -2.0, 2.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _check_number("temperature", self.temperature, 0.0, math.inf)
        _check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_int("top_k", self.top_k, -1)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63))
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        _check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must not exceed max_tokens, got {self.min_tokens} > {self.max_tokens}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0)
        for token in self.stop_token_ids or []:
            _check_int("stop_token_ids", token, 0)
        for token, bias in (self.logit_bias or {}).items():
            _check_int("logit_bias token", token, 0)
            _check_number(f"logit_bias[{token}]", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE


def _require(condition: bool, name: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {got!r}")


def _check_int(name: str, value: Any, low: int) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
    _require(ok, name, f"an integer of at least {low}", value)


def _check_number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ok = ok and (low < value if open_low else low <= value) and value <= high
    above = "above" if open_low else "at least"
    limit = "" if high == math.inf else f" and at most {high:g}"
    _require(ok, name, f"a finite number {above} {low:g}{limit}", value)
