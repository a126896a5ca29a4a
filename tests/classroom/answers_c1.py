"""Answers to the exercises of C1: right ones in several styles, and wrong ones of typical kinds."""

import itertools
import statistics


def split_by_overlap(request, replica):
    """Right: the length of what two spans have in common."""

    def common(a, b):
        start, end = max(a[0], b[0]), min(a[1], b[1])
        return end - start if end > start else 0.0

    start = request.retried_s if request.retried_s is not None else request.arrival_s
    waiting = (start, request.dispatched_s)
    cold = common(waiting, (replica.started_s, replica.ready_s))
    return {
        "cold_start": cold,
        "lost": start - request.arrival_s,
        "gateway": waiting[1] - waiting[0] - cold,
        "queue": request.scheduled_s - request.dispatched_s,
        "prefill": request.first_token_s - request.scheduled_s,
        "decode": request.finished_s - request.first_token_s,
    }


def split_by_subtraction(request, replica):
    """Right: the gateway has what is left of the whole."""
    phases = dict.fromkeys(("lost", "gateway", "cold_start", "queue", "prefill", "decode"), 0.0)
    if request.retries:
        phases["lost"] = request.retried_s - request.arrival_s
    loads_from = max(replica.started_s, request.arrival_s + phases["lost"])
    if replica.ready_s > loads_from:
        phases["cold_start"] = replica.ready_s - loads_from
    phases["queue"] = request.scheduled_s - request.dispatched_s
    phases["prefill"] = request.first_token_s - request.scheduled_s
    phases["decode"] = request.finished_s - request.first_token_s
    phases["gateway"] = request.finished_s - request.arrival_s - sum(phases.values())
    return phases


def split_without_cold_start(request, replica):
    right = split_by_overlap(request, replica)
    return right | {"cold_start": 0.0, "gateway": right["gateway"] + right["cold_start"]}


def split_with_the_whole_start(request, replica):
    right = split_by_overlap(request, replica)
    cold = replica.ready_s - replica.started_s
    return right | {
        "cold_start": cold,
        "gateway": right["gateway"] + right["cold_start"] - cold,
    }


def split_with_negative_times(request, replica):
    start = request.arrival_s if request.retried_s is None else request.retried_s
    cold = min(request.dispatched_s, replica.ready_s) - max(start, replica.started_s)
    gateway = request.dispatched_s - start - cold
    return split_by_overlap(request, replica) | {"cold_start": cold, "gateway": gateway}


def split_counting_twice(request, replica):
    right = split_by_overlap(request, replica)
    return right | {"gateway": right["gateway"] + right["cold_start"]}


def split_without_retries(request, replica):
    waited = request.dispatched_s - request.arrival_s
    cold = max(0, replica.ready_s - max(request.arrival_s, replica.started_s))
    return split_by_overlap(request, replica) | {
        "lost": 0.0,
        "cold_start": cold,
        "gateway": waited - cold,
    }


def split_with_the_queue_from_arrival(request, replica):
    right = split_by_overlap(request, replica)
    return right | {"queue": request.scheduled_s - request.arrival_s}


def split_in_milliseconds(request, replica):
    return {name: 1000 * s for name, s in split_by_overlap(request, replica).items()}


def split_without_decode(request, replica):
    right = split_by_overlap(request, replica)
    del right["decode"]
    return right


def increase_in_steps(series, start_s, end_s):
    """Right: the growth of each scrape by itself."""
    total, before = 0.0, 0.0
    for time_s, value in zip(series.times_s, series.values, strict=False):
        grown = value if value < before else value - before
        total += grown * (start_s < time_s <= end_s)
        before = value
    return total


def increase_by_pairs(series, start_s, end_s):
    """Right: the values that matter, then neighbours."""
    values = series.between(start_s, end_s)
    if series.times_s[0] > end_s:
        return 0.0
    return sum(b - a if b >= a else b for a, b in itertools.pairwise(values))


def increase_without_resets(series, start_s, end_s):
    return series.at(end_s) - series.at(start_s)


def increase_of_those_inside(series, start_s, end_s):
    values = [
        v for t, v in zip(series.times_s, series.values, strict=False) if start_s <= t <= end_s
    ]
    return values[-1] - values[0] if values else 0.0


def increase_of_all(series, start_s, end_s):
    return increase_in_steps(series, -1e9, 1e9)


def increase_since_the_beginning(series, start_s, end_s):
    return increase_in_steps(series, -1e9, end_s)


def increase_last_value(series, start_s, end_s):
    return series.at(end_s)


def increase_per_second(series, start_s, end_s):
    return increase_in_steps(series, start_s, end_s) / (end_s - start_s)


def ratio_of_medians(incident):
    """Right: two lists."""
    own = incident.request.replica
    timed = [n for n in incident.neighbours if n.tpot_s is not None]
    here = [n.tpot_s for n in timed if n.replica == own]
    there = [n.tpot_s for n in timed if n.replica != own]
    if not here or not there:
        return 1.0
    return statistics.median(here) / statistics.median(there)


def ratio_by_hand(incident):
    """Right: computes TPOT and the median itself."""
    sides = {True: [], False: []}
    for line in incident.neighbours:
        if line.output_tokens >= 2:
            tpot = (line.finished_s - line.first_token_s) / (line.output_tokens - 1)
            sides[line.replica == incident.request.replica].append(tpot)
    if not all(sides.values()):
        return 1
    middles = {}
    for side, values in sides.items():
        values.sort()
        n = len(values)
        middles[side] = (values[n // 2] + values[(n - 1) // 2]) / 2
    return middles[True] / middles[False]


def ratio_of_means(incident):
    timed = [n for n in incident.neighbours if n.tpot_s is not None]
    here = [n.tpot_s for n in timed if n.replica == incident.request.replica]
    there = [n.tpot_s for n in timed if n.replica != incident.request.replica]
    return statistics.mean(here) / statistics.mean(there) if here and there else 1.0


def ratio_upside_down(incident):
    return 1 / ratio_of_medians(incident)


def ratio_with_everybody(incident):
    timed = [n for n in incident.neighbours if n.tpot_s is not None]
    here = [n.tpot_s for n in timed if n.replica == incident.request.replica]
    if not here or len(here) == len(timed):
        return 1.0
    return statistics.median(here) / statistics.median([n.tpot_s for n in timed])


def ratio_with_short_replies(incident):
    here = [n.tpot_s for n in incident.neighbours if n.replica == incident.request.replica]
    there = [n.tpot_s for n in incident.neighbours if n.replica != incident.request.replica]
    return statistics.median(here) / statistics.median(there) if here and there else 1.0


def ratio_without_peers_is_nothing(incident):
    ratio = ratio_of_medians(incident)
    return None if ratio == 1.0 else ratio


def ratio_of_the_request(incident):
    there = [
        n.tpot_s
        for n in incident.neighbours
        if n.tpot_s is not None and n.replica != incident.request.replica
    ]
    return incident.request.tpot_s / statistics.median(there) if there else 1.0


def diagnose_by_scores(incident):
    """Right: a list of tests, the first that holds."""
    request, logs = incident.request, incident.replicas
    phases = split_by_overlap(request, incident.replica)
    wait = request.first_token_s
    here = [n for n in incident.neighbours if n.replica == request.replica]
    there = [n for n in incident.neighbours if n.replica != request.replica]
    moves = [d.wanted - d.current > 0 for d in incident.decisions if d.time_s < wait]
    lengths = [n.prompt_tokens for n in incident.neighbours]
    typical = statistics.median(lengths) if lengths else 0
    meanwhile = [n for n in here if n.arrival_s < wait and n.finished_s > 0] + [request]
    cached = [n.cached_tokens / n.prompt_tokens for n in there]
    youngest = request.replica == max(logs, key=lambda name: logs[name].started_s)

    def overlap(other):
        return min(other.first_token_s, wait) - max(other.scheduled_s, 0)

    giants = [
        n
        for n in here
        if 4 * typical < n.prompt_tokens - n.cached_tokens
        and n.prompt_tokens <= incident.settings.max_num_batched_tokens
    ]
    seats = incident.settings.max_num_seqs
    running = incident.metrics.get("vllm:num_requests_running")
    tests = {
        "spot_reclaim": phases["lost"] > 0.25 * wait,
        "flapping": sum(a != b for a, b in itertools.pairwise(moves)) > 1,
        "cold_replica": phases["cold_start"] > 0.4 * wait,
        "gateway_overload": phases["gateway"] > 0.4 * wait,
        "cache_blind_replica": youngest
        and bool(cached)
        and statistics.median(cached) > 0.4
        and request.cached_tokens < 0.1 * request.prompt_tokens,
        "long_prompt": any(overlap(giant) > 0.4 * wait for giant in giants),
        "slow_replica": ratio_of_medians(incident) > 1.9,
        "preemption_storm": sum(n.preemptions for n in meanwhile) > 0.25 * len(meanwhile),
        "queue_overflow": running is not None and max(running.between(0, wait)) >= 0.9 * seats,
    }
    return next((cause for cause, holds in tests.items() if holds), "kv_exhaustion")


def diagnose_by_rules(incident):
    """Right: nested rules, the replica's metrics before its neighbours."""
    request = incident.request
    phases = split_by_subtraction(request, incident.replica)
    ups = ["up" if d.wanted > d.current else "down" for d in incident.decisions
           if d.time_s < request.first_token_s]  # fmt: skip
    if request.retries and phases["lost"] > 0.3 * request.ttft_s:
        return "spot_reclaim"
    if "updownup" in "".join(ups).replace("upup", "up") or (ups[:1] == ["down"] and (
        "up" in ups and "down" in ups[ups.index("up") :]
    )):  # fmt: skip
        return "flapping"
    turns = sum(a != b for a, b in itertools.pairwise(ups))
    if turns >= 2:
        return "flapping"
    outside = max(("gateway", "cold_start"), key=phases.get)
    if phases[outside] > request.ttft_s / 2:
        return {"gateway": "gateway_overload", "cold_start": "cold_replica"}[outside]
    return _inside_the_replica(incident)


def _inside_the_replica(incident):
    request = incident.request
    here = [n for n in incident.neighbours if n.replica == request.replica]
    there = [n for n in incident.neighbours if n.replica != request.replica]
    others = [r for r in incident.replicas.values() if r is not incident.replica]
    if all(incident.replica.started_s > r.started_s for r in others):
        missed = request.cached_tokens / request.prompt_tokens < 0.15
        hits = [n.cached_tokens > 0.4 * n.prompt_tokens for n in there]
        if hits and missed and sum(hits) > len(hits) / 2:
            return "cache_blind_replica"
    lengths = sorted(n.prompt_tokens for n in incident.neighbours)
    for n in here:
        meanwhile = min(n.first_token_s, request.first_token_s) - max(0.0, n.scheduled_s)
        whole = n.prompt_tokens <= incident.settings.max_num_batched_tokens
        long = n.prompt_tokens > 4 * lengths[len(lengths) // 2]
        if long and whole and meanwhile > request.ttft_s / 2:
            return "long_prompt"
    if ratio_by_hand(incident) > 2:
        return "slow_replica"
    lived = [n for n in here if n.finished_s > 0 and n.arrival_s < request.first_token_s]
    if sum(n.preemptions for n in lived) + request.preemptions > len(lived) / 4:
        return "preemption_storm"
    seats = incident.metrics["vllm:num_requests_running"].between(0, request.first_token_s)
    if max(seats) < 0.9 * incident.settings.max_num_seqs:
        return "kv_exhaustion"
    return "queue_overflow"


def diagnose_always_the_queue(incident):
    return "queue_overflow"


def diagnose_by_largest_phase(incident):
    """A naive rule: the largest part of the TTFT names the cause."""
    phases = split_by_overlap(incident.request, incident.replica)
    del phases["decode"]
    return {
        "lost": "spot_reclaim",
        "gateway": "gateway_overload",
        "cold_start": "cold_replica",
        "queue": "queue_overflow",
        "prefill": "long_prompt",
    }[max(phases, key=phases.get)]


def diagnose_by_seconds(incident):
    """A naive rule: the longer, the larger the trouble."""
    ttft_s = incident.request.ttft_s
    if ttft_s > 20:
        return "cold_replica"
    return "queue_overflow" if ttft_s > 5 else "long_prompt"


def diagnose_by_kv_usage(incident):
    """Takes every full cache for exhaustion."""
    usage = incident.metrics.get("vllm:kv_cache_usage_perc")
    if usage and max(usage.between(0, incident.request.first_token_s)) > 0.8:
        return "kv_exhaustion"
    return diagnose_by_scores(incident)


def diagnose_without_peers(incident):
    """Never looks at neighbours."""
    cause = diagnose_by_scores(incident)
    peers = ("slow_replica", "cache_blind_replica", "long_prompt", "preemption_storm")
    return "queue_overflow" if cause in peers else cause


def diagnose_in_words(incident):
    return CAUSE_IN_WORDS.get(diagnose_by_scores(incident), "the queue was full")


CAUSE_IN_WORDS = {"slow_replica": "a slow replica"}


RIGHT = {
    "C1.1": [split_by_overlap, split_by_subtraction],
    "C1.2": [increase_in_steps, increase_by_pairs],
    "C1.3": [ratio_of_medians, ratio_by_hand],
    "C1.4": [diagnose_by_scores, diagnose_by_rules],
}
WRONG = {
    "C1.1": [
        split_without_cold_start,
        split_with_the_whole_start,
        split_with_negative_times,
        split_counting_twice,
        split_without_retries,
        split_with_the_queue_from_arrival,
        split_in_milliseconds,
        split_without_decode,
    ],
    "C1.2": [
        increase_without_resets,
        increase_of_those_inside,
        increase_of_all,
        increase_since_the_beginning,
        increase_last_value,
        increase_per_second,
    ],
    "C1.3": [
        ratio_of_means,
        ratio_upside_down,
        ratio_with_everybody,
        ratio_with_short_replies,
        ratio_without_peers_is_nothing,
        ratio_of_the_request,
    ],
    "C1.4": [
        diagnose_always_the_queue,
        diagnose_by_largest_phase,
        diagnose_by_seconds,
        diagnose_by_kv_usage,
        diagnose_without_peers,
        diagnose_in_words,
    ],
}
