"""One completion as it grows: tokens into text, stop strings, logprobs.

Text is held back while it might be the beginning of a stop string, so that a streaming caller never
sees a part of one.
"""

from collections.abc import Sequence
from dataclasses import replace

from course_lib.engine.outputs import CompletionOutput, LogprobsAtPosition
from course_lib.engine.sampling_params import RequestOutputKind, SamplingParams
from course_lib.model.tokenizer import Tokenizer


class CompletionBuilder:
    """Collects the tokens of one completion.

    Args:
        params: of its request.
        tokenizer: None gives no text.
        index: which of the prompt's `n` completions it is.
    """

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer | None, index: int) -> None:
        self.params = params
        self.tokenizer = tokenizer if params.detokenize else None
        self.index = index
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[LogprobsAtPosition] | None = [] if params.logprobs is not None else None
        self.cumulative_logprob = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._stream = self.tokenizer.stream(params.skip_special_tokens) if self.tokenizer else None
        self._longest_stop = max((len(s) for s in params.stop_strings), default=0)
        self._num_searched_chars = 0  # no stop string ends within these
        self._num_sent_tokens = 0
        self._num_sent_chars = 0

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[LogprobsAtPosition],
        finish_reason: str | None,
        stop_reason: int | str | None,
    ) -> bool:
        """Add the tokens of a step. Returns whether a stop string ended the completion."""
        ended_by_token = finish_reason == "stop"
        for position, token in enumerate(token_ids):
            self.token_ids.append(token)
            if self.logprobs is not None:
                self._add_logprobs(token, logprobs[position])
            is_end = ended_by_token and position == len(token_ids) - 1
            if self._stream is not None and not (
                is_end and not self.params.include_stop_str_in_output
            ):
                self.text += self._stream.push(token)
            stop = self._find_stop_string()
            if stop is not None:
                self.finish_reason, self.stop_reason = "stop", stop
                return True
        self.finish_reason, self.stop_reason = finish_reason, stop_reason
        return False

    def _find_stop_string(self) -> str | None:
        """Look in the text that is new; cut the text at the first stop string found."""
        if not self._longest_stop:
            return None
        searched, self._num_searched_chars = self._num_searched_chars, len(self.text)
        if len(self.token_ids) <= self.params.min_tokens:
            return None
        found = [
            (at, stop)
            for stop in self.params.stop_strings
            if (at := self.text.find(stop, max(0, searched - len(stop) + 1))) >= 0
        ]
        if not found:
            return None
        at, stop = min(found)
        included = len(stop) if self.params.include_stop_str_in_output else 0
        self.text = self.text[: at + included]
        return stop

    def _add_logprobs(self, token: int, logprobs: LogprobsAtPosition) -> None:
        assert self.logprobs is not None
        self.cumulative_logprob += logprobs[token].logprob
        self.logprobs.append(with_decoded_tokens(logprobs, self.tokenizer))

    def output(self, kind: RequestOutputKind) -> CompletionOutput:
        """The completion as the caller sees it now; `DELTA` gives what was not yet given."""
        num_chars = len(self.text)
        if self.finish_reason is None and self._longest_stop:
            num_chars = max(self._num_sent_chars, num_chars - self._longest_stop + 1)
        delta = kind is RequestOutputKind.DELTA
        first_token = self._num_sent_tokens if delta else 0
        first_char = self._num_sent_chars if delta else 0
        self._num_sent_tokens, self._num_sent_chars = len(self.token_ids), num_chars
        return CompletionOutput(
            index=self.index,
            text=self.text[first_char:num_chars],
            token_ids=self.token_ids[first_token:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[first_token:],
        )


def with_decoded_tokens(
    logprobs: LogprobsAtPosition, tokenizer: Tokenizer | None
) -> LogprobsAtPosition:
    """The same with each token's text filled in."""
    if tokenizer is None:
        return logprobs
    return {
        token: replace(logprob, decoded_token=tokenizer.decode([token], skip_special_tokens=False))
        for token, logprob in logprobs.items()
    }
