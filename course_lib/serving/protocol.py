"""What clients may send: OpenAI's request bodies, with vLLM's additions, each bounded.

A field that is not here is refused, never ignored; so is a value of another type. What cannot be
served (tools, images, JSON mode) has no field. Sizes are bounded so that one request cannot take
the server's memory.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
)

from course_lib.engine.sampling_params import SamplingParams
from course_lib.serving.admission_base import PriorityClass

MAX_MESSAGES = 1024
MAX_N = 16
MAX_STOPS = 16
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_PROMPTS = 64
_LIMIT = 2**31


def _printable(text: str) -> str:
    """Refuse halves of surrogate pairs, which no UTF-8 text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not valid Unicode: it has half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_printable)]
Whole = Annotated[StrictInt, Field(ge=-_LIMIT, lt=_LIMIT)]
Number = Annotated[FiniteFloat, Field(strict=True)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Body):
    """What a stream has besides the pieces."""

    include_usage: StrictBool = False


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]
    name: Text | None = None

    def as_dict(self) -> dict[str, str]:
        """For the chat template; the developer is OpenAI's newer word for the system."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class SamplingBody(_Body):
    """What both kinds of completion share."""

    model: Text | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_N)] = 1
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Number], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    user: Text | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    metadata: dict[str, Text] | None = None
    # Additions of vLLM.
    top_k: Whole | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[Whole, Field(ge=0)] = 0
    ignore_eos: StrictBool = False
    stop_token_ids: Annotated[list[Whole], Field(max_length=MAX_STOPS)] | None = None
    include_stop_str_in_output: StrictBool = False
    skip_special_tokens: StrictBool = True
    cache_salt: Annotated[Text, Field(min_length=1)] | None = None
    priority: Whole = 0

    @property
    def priority_class(self) -> PriorityClass:
        """Batch may wait behind interactive requests: OpenAI's flex tier, vLLM's priority."""
        is_batch = self.service_tier == "flex" or self.priority > 0
        return "batch" if is_batch else "interactive"

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _params(self, max_tokens: int, defaults: SamplingParams, **more: Any) -> SamplingParams:
        """Options for the engine; what the body leaves open is the model's default.

        Raises:
            ValueError: values that do not go together.
        """
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for streams; set stream to true or leave them out")
        given = {
            name: value
            for name in (
                "temperature", "top_p", "top_k", "min_p", "presence_penalty",
                "frequency_penalty", "repetition_penalty",
            )
            for value in [getattr(self, name)]
        }  # fmt: skip
        options = {k: getattr(defaults, k) if v is None else v for k, v in given.items()}
        return SamplingParams(
            n=self.n,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            logit_bias=_token_biases(self.logit_bias),
            **options,
            **more,
        )


class ChatCompletionRequest(SamplingBody):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def params(self, room: int, defaults: SamplingParams) -> SamplingParams:
        """Options for the engine, with at most `room` tokens of reply."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        wanted = self.max_completion_tokens or self.max_tokens or room
        return self._params(
            wanted, defaults, logprobs=(self.top_logprobs or 0) if self.logprobs else None
        )


class CompletionRequest(SamplingBody):
    """Body of `/v1/completions`. `prompt` is a text, tokens, or several of either."""

    prompt: (
        Text
        | Annotated[list[Whole], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[
            list[Annotated[list[Whole], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    echo: StrictBool | None = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[StrictInt, Field(ge=1, le=MAX_N)] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def params(self, room: int, defaults: SamplingParams) -> SamplingParams:
        """Options for the engine, with at most `room` tokens of reply; OpenAI's default is 16."""
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of must equal n ({self.n}) or be absent, got {self.best_of}")
        wanted = min(16, room) if self.max_tokens is None else self.max_tokens
        echoed = self.logprobs if self.echo else None
        return self._params(wanted, defaults, logprobs=self.logprobs, prompt_logprobs=echoed)


class TokenizeRequest(_Body):
    """Body of `/tokenize`: a prompt or messages."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: StrictBool = True
    add_generation_prompt: StrictBool = True


class DetokenizeRequest(_Body):
    """Body of `/detokenize`."""

    model: Text | None = None
    tokens: list[Annotated[Whole, Field(ge=0)]]


def _token_biases(biases: dict[str, float] | None) -> dict[int, float] | None:
    """OpenAI's keys are token ids as texts."""
    if biases is None:
        return None
    result = {}
    for token, bias in biases.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ValueError(f"logit_bias has the key {token!r}; expected a token id such as '42'")
        result[int(token)] = bias
    return result
