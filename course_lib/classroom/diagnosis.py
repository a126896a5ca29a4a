"""The course's own answers to C1: where a slow request's time went, and why.

`diagnose` reads the record of an incident from the outside in: the attempts, the autoscaler, the
gateway, then the replica. It compares with the request's own time and with its peers, never with
absolute seconds, so it works for a GPU and for the tiny engine on a CPU alike.
"""

from itertools import pairwise
from statistics import median

from course_lib.classroom.incidents.records import Incident, ReplicaLog, RequestLog, TimeSeries


def split_timeline(request: RequestLog, replica: ReplicaLog) -> dict[str, float]:
    """Seconds of each phase of a request; they add up to its whole time.

    Args:
        request: its log line.
        replica: the log of the replica that answered.
    """
    begin_s = request.arrival_s if request.retried_s is None else request.retried_s
    assert replica.ready_s is not None  # it has answered
    loading_s = min(request.dispatched_s, replica.ready_s) - max(begin_s, replica.started_s)
    cold_start_s = max(0.0, loading_s)
    return {
        "lost": begin_s - request.arrival_s,
        "gateway": request.dispatched_s - begin_s - cold_start_s,
        "cold_start": cold_start_s,
        "queue": request.scheduled_s - request.dispatched_s,
        "prefill": request.first_token_s - request.scheduled_s,
        "decode": request.finished_s - request.first_token_s,
    }


def increase(series: TimeSeries, start_s: float, end_s: float) -> float:
    """How much a counter has grown between two moments, as far as the scrapes tell.

    A counter begins at 0, and begins anew when its process does.
    """
    grown = last = 0.0
    for time_s, value in zip(series.times_s, series.values, strict=True):
        if time_s > end_s:
            break
        if time_s > start_s:
            grown += value - last if value >= last else value
        last = value
    return grown


def tpot_ratio(incident: Incident) -> float:
    """TPOT on the replica of the slow request over that of the others, medians of neighbours.

    1.0 if one of the two has no reply of two tokens or more.
    """
    here: list[float] = []
    elsewhere: list[float] = []
    for line in incident.neighbours:
        if line.tpot_s is not None:
            (here if line.replica == incident.request.replica else elsewhere).append(line.tpot_s)
    return median(here) / median(elsewhere) if here and elsewhere else 1.0


def diagnose(incident: Incident) -> str:
    """The cause of a slow first token, one of `CAUSES`."""
    request = incident.request
    phases = split_timeline(request, incident.replica)
    share = {name: seconds / request.ttft_s for name, seconds in phases.items()}
    if share["lost"] > 0.3:
        return "spot_reclaim"
    if _turns(incident) >= 2:
        return "flapping"
    if share["cold_start"] > 0.5:
        return "cold_replica"
    if share["gateway"] > 0.5:
        return "gateway_overload"
    if _missed_cache(incident):
        return "cache_blind_replica"
    if _behind_long_prompt(incident) > 0.5:
        return "long_prompt"
    if tpot_ratio(incident) > 2:
        return "slow_replica"
    if _preemptions_each(incident) > 0.25:
        return "preemption_storm"
    running = incident.metrics["vllm:num_requests_running"].between(0, request.first_token_s)
    full = max(running) >= 0.9 * incident.settings.max_num_seqs
    return "queue_overflow" if full else "kv_exhaustion"


def _turns(incident: Incident) -> int:
    """How often the autoscaler turned round until the first token."""
    until_s = incident.request.first_token_s
    ups = [d.wanted > d.current for d in incident.decisions if d.time_s < until_s]
    return sum(now != then for then, now in pairwise(ups))


def _missed_cache(incident: Incident) -> bool:
    """Whether a young replica had nothing cached of what its peers have mostly cached."""
    request = incident.request
    elsewhere = [n for n in incident.neighbours if n.replica != request.replica]
    if not elsewhere or not incident.metrics:
        return False
    young = all(incident.replica.started_s > r.started_s or r is incident.replica
                for r in incident.replicas.values())  # fmt: skip
    usual = median(n.cached_tokens / n.prompt_tokens for n in elsewhere)
    return young and usual > 0.5 and request.cached_tokens < 0.2 * request.prompt_tokens


def _behind_long_prompt(incident: Incident) -> float:
    """Share of the TTFT in which one step computed another request's long prompt."""
    request, longest = incident.request, 0.0
    budget = incident.settings.max_num_batched_tokens
    usual = median([n.prompt_tokens for n in incident.neighbours] or [0])
    for other in incident.neighbours:
        computed = other.prompt_tokens - other.cached_tokens
        if other.replica == request.replica and 5 * usual < computed <= budget:
            end_s = min(other.first_token_s, request.first_token_s)
            longest = max(longest, end_s - max(other.scheduled_s, request.arrival_s))
    return longest / request.ttft_s


def _preemptions_each(incident: Incident) -> float:
    """Preemptions a request on its replica, of those whose lives overlap with its wait."""
    request = incident.request
    near = [request] + [
        n
        for n in incident.neighbours
        if n.replica == request.replica
        and n.arrival_s < request.first_token_s
        and n.finished_s > request.arrival_s
    ]
    return sum(n.preemptions for n in near) / len(near)
