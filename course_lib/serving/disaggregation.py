"""Whether to try separate pools for prefill and decode.

Split pools (Splitwise, Patel et al., ISCA 2024) keep long prompts from delaying other people's
tokens, and pay with KV transfers and two things to scale. They come last: first tune the scheduler,
chunked prefill, prefix caching and the queue of one mixed pool, then ask
`should_benchmark_split_pools`.
"""

from course_lib.validation import number


def should_benchmark_split_pools(
    ttft_p95_ms: float, tpot_p95_ms: float, ttft_slo_ms: float, tpot_slo_ms: float
) -> bool:
    """Whether a mixed pool that has been tuned still misses both of its objectives.

    Missing one alone has cheaper cures: TTFT with more replicas or smaller queues, TPOT with
    smaller prefill chunks.

    Args:
        ttft_p95_ms: measured time to first token, 95th percentile.
        tpot_p95_ms: measured time per output token, 95th percentile.
        ttft_slo_ms: objective for the first.
        tpot_slo_ms: objective for the second.

    Raises:
        ValueError: a time is negative or not a number, or an objective is not above 0.
    """
    ttft_missed = number("ttft_p95_ms", ttft_p95_ms, at_least=0) > number(
        "ttft_slo_ms", ttft_slo_ms, above=0
    )
    tpot_missed = number("tpot_p95_ms", tpot_p95_ms, at_least=0) > number(
        "tpot_slo_ms", tpot_slo_ms, above=0
    )
    return ttft_missed and tpot_missed
