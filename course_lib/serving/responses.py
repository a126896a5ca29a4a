"""Engine outputs in OpenAI's response shapes, as plain dicts and server-sent events."""

from collections.abc import Callable, Sequence
from typing import Any

from pydantic_core import to_json

from course_lib.engine.outputs import CompletionOutput, Logprob, LogprobsAtPosition

Json = dict[str, Any]

#: The last event of every stream.
DONE = b"data: [DONE]\n\n"


#: Reported for less likely tokens: JSON has no infinity.
_LOWEST_LOGPROB = -9999.0


def event(data: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Json:
    """Token counts of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def chat_logprobs(
    token_ids: Sequence[int], logprobs: list[LogprobsAtPosition], num_top: int
) -> Json:
    """Chat's form: one entry a token, with the likeliest ones beside it."""
    content = []
    for token, position in zip(token_ids, logprobs, strict=True):
        likeliest = sorted(position.values(), key=lambda entry: entry.rank)[:num_top]
        content.append(
            {**_entry(position[token]), "top_logprobs": [_entry(entry) for entry in likeliest]}
        )
    return {"content": content, "refusal": None}


def _entry(entry: Logprob) -> Json:
    text = entry.decoded_token or ""
    return {"token": text, "logprob": _finite(entry), "bytes": list(text.encode())}


def _finite(entry: Logprob) -> float:
    return max(entry.logprob, _LOWEST_LOGPROB)


def completion_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[LogprobsAtPosition | None],
    num_top: int,
    offset: int,
    decode: Callable[[int], str],
) -> Json:
    """The older form: parallel lists. The first prompt token has no probability.

    Args:
        token_ids: the tokens.
        logprobs: one entry each.
        num_top: likeliest tokens to report.
        offset: characters before the first token.
        decode: text of a token that has no entry.
    """
    texts, values, tops, offsets = [], [], [], []
    for token, position in zip(token_ids, logprobs, strict=True):
        entry = None if position is None else position[token]
        text = decode(token) if entry is None else entry.decoded_token or ""
        offsets.append(offset)
        offset += len(text)
        texts.append(text)
        values.append(None if entry is None else _finite(entry))
        likeliest = sorted((position or {}).values(), key=lambda e: e.rank)[:num_top]
        tops.append({e.decoded_token or "": _finite(e) for e in likeliest} if position else None)
    return {
        "tokens": texts,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def merge(pieces: Sequence[CompletionOutput]) -> CompletionOutput:
    """The pieces of one completion, in order, as a whole."""
    last = pieces[-1]
    logprobs = None
    if last.logprobs is not None:
        logprobs = [entry for piece in pieces for entry in piece.logprobs or ()]
    return CompletionOutput(
        index=last.index,
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=logprobs,
    )
