"""A trace: requests in the order of their arrival, with their lengths and what they share.

A trace has no texts. Where two prompts begin alike, both name the same `Segment`s, and that is all
that prefix caching needs: `token_ids` spells a prompt out so that equal contents are equal tokens.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

#: Prompts are spelled out in tokens below this, which every real tokenizer has.
SMALLEST_VOCABULARY = 512


class Segment(NamedTuple):
    """The first `tokens` tokens of the text `content`; texts with the same number are equal."""

    content: int
    tokens: int


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request.

    Args:
        arrival_s: from the beginning of the trace.
        prompt_tokens: length of the prompt; at least 1.
        output_tokens: length of the reply; at least 1.
        segments: what the prompt begins with, if that is shared; at most `prompt_tokens` in all.
            The rest is the request's own.
        reply: content of the reply, if a later prompt repeats it.
        session: requests with the same one are turns of one conversation.
        tenant: whose it is.
        priority_class: "interactive" or "batch".
        region: where it comes from.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    segments: tuple[Segment, ...] = ()
    reply: int | None = None
    session: str | None = None
    tenant: str = "default"
    priority_class: Literal["interactive", "batch"] = "interactive"
    region: str | None = None


@dataclass(frozen=True)
class Trace:
    """Requests in the order of arrival, and how they were changed when read."""

    name: str
    requests: tuple[TraceRequest, ...]
    speed: float = 1.0
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None

    @property
    def duration_s(self) -> float:
        """From its beginning to the last arrival."""
        return self.requests[-1].arrival_s if self.requests else 0.0

    @property
    def has_shared_prefixes(self) -> bool:
        """Whether any prompt names what it shares."""
        return any(request.segments for request in self.requests)


def prompt_contents(request: TraceRequest, own: int) -> tuple[Segment, ...]:
    """The whole prompt as segments; the last one is the request's own part, if it has one.

    Args:
        request: whose prompt it is.
        own: a negative number that no other request has.
    """
    shared = sum(tokens for _, tokens in request.segments)
    if shared == request.prompt_tokens:
        return request.segments
    return (*request.segments, Segment(own, request.prompt_tokens - shared))


def content_ids(contents: Iterable[Segment]) -> list[int]:
    """One number a token, equal where the contents are: a prompt for a simulator."""
    ids: list[int] = []
    for content, tokens in contents:
        ids += [content] * tokens
    return ids


def token_ids(request: TraceRequest, own: int, vocab_size: int = SMALLEST_VOCABULARY) -> list[int]:
    """The prompt as tokens of a real model, equal where the contents are: random, but fixed.

    Args:
        request: whose prompt it is.
        own: a negative number that no other request has.
        vocab_size: tokens are below this.
    """
    ids: list[int] = []
    for content, tokens in prompt_contents(request, own):
        ids += _spelled(content, tokens, vocab_size)
    return ids


def _spelled(content: int, tokens: int, vocab_size: int) -> list[int]:
    return random.Random(f"content/{content}").choices(range(vocab_size), k=tokens)
