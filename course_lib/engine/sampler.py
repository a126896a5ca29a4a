"""From logits to tokens: vLLM's sampling options, for a whole batch at once.

The order is vLLM's: logprobs are read from the raw logits; then `min_tokens`, `logit_bias` and
penalties change the logits; then greedy requests take the largest, and the others divide by the
temperature, drop tokens by `min_p`, `top_k`, `top_p`, and draw.

A draw inverts the cumulative distribution at one uniform number that depends only on the request's
seed and on how many tokens it has. So a request's tokens do not depend on its company, and a
preempted request needs no state to go on.

Everything happens on the device of the logits. What the host contributes is sent without waiting,
and the host waits once, to read the tokens.
"""

from collections.abc import Sequence

import torch

from course_lib.engine.outputs import Logprob, LogprobsAtPosition
from course_lib.engine.request import Request


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that is random in both arguments: SplitMix64 (Steele et al., 2014)."""
    mask = (1 << 64) - 1
    state = _mix((seed & mask) ^ _mix((index * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & mask))
    return (state >> 12) / (1 << 52)


def _mix(z: int) -> int:
    mask = (1 << 64) - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def sample(
    logits: torch.Tensor, requests: Sequence[Request]
) -> tuple[list[int], list[list[LogprobsAtPosition]]]:
    """The next token of each request.

    Args:
        logits: `[num_requests, vocab_size]` float32; changed in place.
        requests: what the rows belong to.

    Returns:
        One token a request, and for each a list with its logprobs if it asked for them.
    """
    params = [request.sampling_params for request in requests]
    wants_logprobs = any(p.logprobs is not None for p in params)
    raw = logits.log_softmax(dim=-1) if wants_logprobs else None
    _adjust(logits, requests)
    greedy = logits.argmax(dim=-1)
    if all(p.greedy for p in params):
        tokens = greedy
    else:
        rows = [row for row, p in enumerate(params) if not p.greedy]
        index = _send(rows, logits)
        drawn = _draw(logits[index], [requests[row] for row in rows])
        tokens = greedy.index_copy(0, index, drawn)
    logprobs: list[list[LogprobsAtPosition]] = [[] for _ in requests]
    if raw is not None:
        for row, p in enumerate(params):
            if p.logprobs is not None:
                here = slice(row, row + 1)
                logprobs[row] = gather_logprobs(raw[here], tokens[here], p.logprobs)
    return tokens.tolist(), logprobs


def _send(
    values: Sequence[float], like: torch.Tensor, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """The host's numbers as `[n]` on the device of `like`, without waiting for it."""
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)


def gather_logprobs(
    logprobs: torch.Tensor, chosen: torch.Tensor, num_top: int
) -> list[LogprobsAtPosition]:
    """The chosen token and the likeliest ones at each position.

    Args:
        logprobs: `[n, vocab_size]`.
        chosen: `[n]` int64.
        num_top: how many likeliest tokens to report.
    """
    top_values, top_tokens = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    chosen_values = logprobs.gather(1, chosen[:, None])
    ranks = (logprobs > chosen_values).sum(dim=-1) + 1
    positions = []
    for token, value, rank, tokens, values in zip(
        chosen.tolist(),
        chosen_values[:, 0].tolist(),
        ranks.tolist(),
        top_tokens.tolist(),
        top_values.tolist(),
        strict=True,
    ):
        entry = {token: Logprob(value, rank)}
        for top_rank, (t, v) in enumerate(zip(tokens, values, strict=True), start=1):
            entry.setdefault(t, Logprob(v, top_rank))
        positions.append(entry)
    return positions


def _adjust(logits: torch.Tensor, requests: Sequence[Request]) -> None:
    """Options that change logits whatever the temperature; in place, row by row where used."""
    for row, request in enumerate(requests):
        p = request.sampling_params
        if request.num_output_tokens < p.min_tokens:
            stops = set(p.stop_token_ids or ())
            if not p.ignore_eos:
                stops |= request.eos_token_ids
            logits[row].index_fill_(0, _send(list(stops), logits), float("-inf"))
        if p.logit_bias:
            bias = _send(list(p.logit_bias.values()), logits, torch.float32)
            logits[row].index_add_(0, _send(list(p.logit_bias), logits), bias)
        if p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty:
            _penalise(logits[row], request)


def _penalise(logits: torch.Tensor, request: Request) -> None:
    p = request.sampling_params
    output = _send(request.output_token_ids, logits)
    counts = torch.zeros_like(logits).index_add_(
        0, output, torch.ones_like(output, dtype=logits.dtype)
    )
    if p.repetition_penalty != 1:
        seen = counts > 0
        seen.index_fill_(0, _send(request.prompt_token_ids, logits), True)
        penalised = torch.where(
            logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty
        )
        logits.copy_(torch.where(seen, penalised, logits))
    logits -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)


def _draw(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """One token for each row, `[n]` int64."""
    params = [request.sampling_params for request in requests]

    def column(values: list[float]) -> torch.Tensor:
        return _send(values, logits, torch.float32)[:, None]

    logits = logits / column([p.temperature for p in params])
    if any(p.min_p > 0 for p in params):
        # p < min_p * p_max, in logarithms so that it needs no softmax.
        threshold = logits.amax(dim=-1, keepdim=True) + column([p.min_p for p in params]).log()
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if any(p.top_k > 0 or p.top_p < 1 for p in params):
        vocab_size = logits.shape[-1]
        top_k = column([min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params])
        # Above 1 for rows without top_p: a rounded sum may reach 1 before the end.
        top_p = column([p.top_p if p.top_p < 1 else 2.0 for p in params])
        logits = _keep_top(logits, top_k, top_p)
    cumulative = logits.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    draws = [uniform(request.seed, request.num_output_tokens) for request in requests]
    points = _send(draws, logits, torch.float64)[:, None]
    tokens = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1)  # a row of NaN finds no place


def _keep_top(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Drop what `top_k` leaves out, then what `top_p` does; `[n, vocab_size]` and `[n, 1]` twice.

    Nucleus sampling (Holtzman et al., 2020): a token stays while those before it have less than
    `top_p` of the probability, so the likeliest always stays.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill(ranks >= top_k, float("-inf"))
    probs = ordered.softmax(dim=-1)
    ordered = ordered.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ordered)
