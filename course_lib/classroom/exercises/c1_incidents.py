"""The oracle of C1.4: a diagnosis against incidents that nobody has shown to it.

The held-out records get other names each time, so that nothing but what they hold can tell them
apart. A few more are simulated during the check.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from course_lib.classroom.checks import Mismatch
from course_lib.classroom.incidents.bank import fresh, load
from course_lib.classroom.incidents.records import (
    CAUSES,
    Case,
    Incident,
    ReplicaLog,
    RequestLog,
    Settings,
    renamed,
)

#: Share of the held-out incidents, and of those of each cause, that must be right.
NEEDED, NEEDED_OF_EACH = 0.85, 0.5

#: Causes that are simulated afresh, those that take least time, and how many must be right.
FRESH = ("cold_replica", "queue_overflow", "long_prompt", "slow_replica", "gateway_overload")
FRESH_NEEDED = 4

_HINTS = {
    "cold_replica": "Compare the wait with `started_s` and `ready_s` of the replica that answered: "
    "it was not there yet.",
    "cache_blind_replica": "Compare `cached_tokens` / `prompt_tokens` of the request with that of "
    "its neighbours on other replicas. And how old was its replica?",
    "queue_overflow": "Look at vllm:num_requests_running of its replica while the request waited, "
    "beside settings.max_num_seqs. A full KV cache beside full seats is just what one pays for.",
    "long_prompt": "Look for a neighbour on the same replica whose prompt is many times longer and "
    "fits max_num_batched_tokens. Was it between scheduled_s and first_token_s meanwhile?",
    "preemption_storm": "Count the `preemptions` of the neighbours on the same replica that ran "
    "while the request waited; vllm:num_preemptions_total grows as well.",
    "kv_exhaustion": "Look at vllm:num_requests_running of its replica: seats were free. Then what "
    "was not? Preemptions are rare here.",
    "flapping": "Look at `decisions` before the first token: how often did the autoscaler turn "
    "round, from up to down or from down to up?",
    "slow_replica": "Compare TPOT on its replica with that on the others. The queue there is only "
    "a consequence.",
    "gateway_overload": "The largest phase is the gateway's, no replica was loading, and the "
    "replicas had room.",
    "spot_reclaim": "Look at `retried_s`: how much of the TTFT had been for nothing?",
}


@lru_cache(maxsize=1)
def _held_out() -> tuple[Case, ...]:
    return tuple(load("held_out"))


def verify_diagnose(answer: Callable[..., Any], rng: random.Random) -> None:
    """The recorded incidents first, then a few new ones."""
    cases = [_disguised(case, rng, n) for n, case in enumerate(_held_out(), start=1)]
    rng.shuffle(cases)
    said = _ask(answer, cases)
    wrong = [(case, name) for case, name in zip(cases, said, strict=True) if name != case.cause]
    of_each = Counter(case.cause for case in cases)
    missed = Counter(case.cause for case, _ in wrong)
    num_right = len(cases) - len(wrong)
    worst = max(of_each, key=lambda cause: missed[cause] / of_each[cause])
    score = f"{num_right} of {len(cases)} held-out incidents have the right cause"
    if num_right < NEEDED * len(cases):
        _report(f"{score}; {NEEDED:.0%} are needed", wrong, worst)
    if missed[worst] > (1 - NEEDED_OF_EACH) * of_each[worst]:
        _report(f"{score}, but of one cause more than half are missed", wrong, worst)
    new = list(fresh(rng, held_out=True, causes=FRESH))
    wrong = [
        (case, name)
        for case, name in zip(new, _ask(answer, new), strict=True)
        if name != case.cause
    ]
    if len(new) - len(wrong) < FRESH_NEEDED:
        _report(
            f"{score}, but of {len(new)} that were simulated just now only "
            f"{len(new) - len(wrong)}; {FRESH_NEEDED} are needed",
            wrong,
            wrong[0][0].cause,
        )


def _ask(answer: Callable[..., Any], cases: Sequence[Case]) -> list[str]:
    said = []
    for case in cases:
        name = answer(case.incident)
        if name not in CAUSES:
            raise Mismatch(
                f"diagnose returned {name!r} for {summary(case.incident)}",
                f"Return one of the names in CAUSES: {', '.join(CAUSES)}.",
            )
        said.append(name)
    return said


def _report(score: str, wrong: Sequence[tuple[Case, str]], cause: str) -> None:
    """Name one incident of the cause that is missed most."""
    case, name = next(pair for pair in wrong if pair[0].cause == cause)
    raise Mismatch(
        f"{score}. One that is missed: {summary(case.incident)}. diagnose said {name!r}",
        _HINTS[cause],
    )


def summary(incident: Incident) -> str:
    """An incident in a sentence: what its log line and its settings say."""
    request, settings = incident.request, incident.settings
    ttft_s = request.ttft_s
    moments = (
        ("retried", request.retried_s),
        ("dispatched", request.dispatched_s),
        ("scheduled", request.scheduled_s),
        ("first token", request.first_token_s),
    )
    told = ", ".join(f"{name} at {at_s:.4g} s" for name, at_s in moments if at_s is not None)
    return (
        f"{incident.name} (TTFT {ttft_s:.3g} s: {told}; prompt {request.prompt_tokens} tokens, "
        f"{request.cached_tokens} cached, {request.preemptions} preemptions, {request.retries} "
        f"retries; max_num_seqs {settings.max_num_seqs}, max_num_batched_tokens "
        f"{settings.max_num_batched_tokens}; {len(incident.decisions)} scaling decisions, "
        f"{len(incident.replicas)} replicas)"
    )


def _disguised(case: Case, rng: random.Random, number: int) -> Case:
    old = list(case.incident.replicas)
    new = [f"replica-{n}" for n in rng.sample(range(100), len(old))]
    incident = renamed(
        case.incident, dict(zip(old, new, strict=True)), f"held-out incident {number}"
    )
    return Case(incident, case.cause, case.source)


def incident_with(lines: Sequence[tuple[str, float]], tokens: Sequence[int]) -> Incident:
    """A record with nothing in it but neighbours, each on its replica with its TPOT.

    Args:
        lines: (replica, TPOT in seconds) of each neighbour.
        tokens: length of each reply.
    """

    def line(number: int, replica: str, tpot_s: float, count: int) -> RequestLog:
        return RequestLog(
            f"request-{number}", 0.0, None, 0.0, 0.0, 1.0, 1.0 + (count - 1) * tpot_s,
            10, count, 0, 0, 0, replica,
        )  # fmt: skip

    neighbours = tuple(
        line(number, replica, tpot_s, count)
        for number, ((replica, tpot_s), count) in enumerate(zip(lines, tokens, strict=True))
    )
    names = {"replica-0", *(replica for replica, _ in lines)}
    return Incident(
        "neighbours",
        Settings(8, 256, 8192, 5.0),
        line(0, "replica-0", 0.5, 2),
        neighbours,
        {name: ReplicaLog(name, -60.0, -30.0) for name in sorted(names)},
        (),
        {},
    )
