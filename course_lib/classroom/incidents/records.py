"""The record of an incident: what dashboards and logs hold around one slow request.

    record.request              the log line of the slow request
    record.neighbours           log lines of requests of the same minutes
    record.replicas["replica-1"]  when it started, was ready, ended; its metrics, if it was scraped
    record.fleet["queue_age_s"]   a metric of the fleet at each scrape
    record.decisions            changes that the autoscaler asked for, with its reasons
    record.settings             what the deployment was configured to

All times are in seconds since the slow request arrived, so what came before is negative. Nothing
in a record tells the cause: all of it could be scraped or logged.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

#: What was wrong, by the name that a diagnosis gives it.
CAUSES = {
    "cold_replica": "the request waited for a replica that was still starting",
    "cache_blind_replica": "a new replica had to compute a prompt that the others have in cache",
    "queue_overflow": "more requests than seats: all replicas were full, and none was coming",
    "long_prompt": "the step of another request's long prompt, not chunked, held the engine",
    "preemption_storm": "running requests outgrew the KV cache and were computed again and again",
    "kv_exhaustion": "long contexts filled the KV cache, so free seats could not be taken",
    "flapping": "the autoscaler had just removed the replicas that were needed now",
    "slow_replica": "one replica computes more slowly than its peers",
    "gateway_overload": "the gateway itself was the queue; the replicas had room",
    "spot_reclaim": "the replica was reclaimed, and the request began anew on another one",
}


@dataclass(frozen=True)
class RequestLog:
    """The line that the gateway logs when a request has ended.

    Args:
        request_id: unique in the record.
        arrival_s: at the gateway.
        retried_s: when the last attempt that failed was given up; None without a retry.
        dispatched_s: sent to `replica`, for the last time.
        scheduled_s: first step of the engine that computed some of it.
        first_token_s: the first token left the engine.
        finished_s: the last token.
        prompt_tokens: length of the prompt.
        output_tokens: length of the reply.
        cached_tokens: of the prompt, taken from the prefix cache.
        preemptions: how often its blocks were taken away.
        retries: attempts that failed.
        replica: that of the last attempt.
    """

    request_id: str
    arrival_s: float
    retried_s: float | None
    dispatched_s: float
    scheduled_s: float
    first_token_s: float
    finished_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    preemptions: int
    retries: int
    replica: str

    @property
    def ttft_s(self) -> float:
        """Time to first token, as the client sees it."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for a reply of one token."""
        if self.output_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.output_tokens - 1)


@dataclass(frozen=True)
class TimeSeries:
    """A metric at each scrape. Names that end in `_total`, `_sum` and `_count` are counters."""

    times_s: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, time_s: float) -> float:
        """The value of the last scrape up to then; 0 before the first one."""
        index = bisect_right(self.times_s, time_s)
        return self.values[index - 1] if index else 0.0

    def between(self, start_s: float, end_s: float) -> tuple[float, ...]:
        """The value at `start_s` and those of the scrapes after it, up to `end_s`."""
        inside = zip(self.times_s, self.values, strict=True)
        return (self.at(start_s), *(v for t, v in inside if start_s < t <= end_s))


@dataclass(frozen=True)
class ReplicaLog:
    """A replica's own log, and its metrics under vLLM's names.

    Args:
        name: as in `RequestLog.replica`.
        started_s: it was asked for.
        ready_s: it joined the rotation; None if it had not by the end of the record.
        ended_s: it was gone; None if it still ran then.
        end_reason: "scaled down" or "reclaimed"; empty while it runs.
        metrics: by name; empty if it was never scraped.
    """

    name: str
    started_s: float
    ready_s: float | None
    ended_s: float | None = None
    end_reason: str = ""
    metrics: Mapping[str, TimeSeries] = field(default_factory=dict)

    def in_rotation(self, time_s: float) -> bool:
        """Whether it could get requests then, as far as its log tells."""
        if self.ready_s is None or time_s < self.ready_s:
            return False
        return self.ended_s is None or time_s < self.ended_s


@dataclass(frozen=True)
class DecisionLog:
    """A change that the autoscaler asked for."""

    time_s: float
    current: int
    wanted: int
    reason: str


@dataclass(frozen=True)
class Settings:
    """What the deployment was configured to; for each replica where that makes sense."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_tokens: int
    scrape_interval_s: float


@dataclass(frozen=True)
class Incident:
    """The record around one slow request."""

    name: str
    settings: Settings
    request: RequestLog
    neighbours: tuple[RequestLog, ...]
    replicas: Mapping[str, ReplicaLog]
    decisions: tuple[DecisionLog, ...]
    fleet: Mapping[str, TimeSeries]

    @property
    def replica(self) -> ReplicaLog:
        """The one that answered the slow request."""
        return self.replicas[self.request.replica]

    @property
    def metrics(self) -> Mapping[str, TimeSeries]:
        """Those of that replica."""
        return self.replica.metrics


@dataclass(frozen=True)
class Case:
    """An incident with its label.

    Args:
        incident: the record.
        cause: one of `CAUSES`.
        source: "engine" for the real one, "simulator".
    """

    incident: Incident
    cause: str
    source: str


@dataclass
class FleetRun:
    """All that a run of a fleet logged and scraped, before a record is cut out of it.

    Args:
        settings: of the deployment.
        requests: those that finished, in any order.
        replicas: without metrics.
        decisions: changes only.
        fleet: one row a scrape, "time_s" among the names.
        engines: the same for each replica that was scraped.
    """

    settings: Settings
    requests: list[RequestLog]
    replicas: list[ReplicaLog]
    decisions: list[DecisionLog]
    fleet: list[dict[str, float]]
    engines: dict[str, list[dict[str, float]]]


#: A record has so many scrapes before the arrival of the request and after its last token.
SCRAPES_BEFORE, SCRAPES_AFTER = 20, 3

#: Log lines of other requests in a record, at most; those that overlap with its wait, then others.
MAX_NEIGHBOURS = 60


def cut(run: FleetRun, request: RequestLog, name: str) -> Incident:
    """The record around one request of a run."""
    zero = request.arrival_s
    start_s = zero - SCRAPES_BEFORE * run.settings.scrape_interval_s
    end_s = request.finished_s + SCRAPES_AFTER * run.settings.scrape_interval_s
    logged = [r for r in run.requests if r is not request and start_s <= r.finished_s <= end_s]
    logged.sort(key=lambda other: _apart_s(request, other))
    neighbours = sorted(logged[:MAX_NEIGHBOURS], key=lambda other: other.arrival_s)
    names = {line.replica for line in [request, *neighbours]}
    replicas = [
        _replica_until(replica, end_s, _window(run.engines.get(replica.name, []), start_s, end_s))
        for replica in run.replicas
        if replica.started_s <= end_s
        and (replica.ended_s is None or replica.ended_s >= start_s or replica.name in names)
    ]
    incident = Incident(
        name=name,
        settings=run.settings,
        request=replace(request, request_id="slow"),
        neighbours=tuple(
            replace(line, request_id=f"request-{number}")
            for number, line in enumerate(neighbours, start=1)
        ),
        replicas={replica.name: replica for replica in replicas},
        decisions=tuple(d for d in run.decisions if start_s <= d.time_s <= end_s),
        fleet=_window(run.fleet, start_s, end_s),
    )
    return _rounded(shifted(incident, -zero))


def _apart_s(request: RequestLog, other: RequestLog) -> float:
    """How far the life of another request is from the wait of this one; 0 if they overlap."""
    wait = (request.arrival_s, request.first_token_s)
    gap_s = max(other.arrival_s - wait[1], wait[0] - other.finished_s, 0.0)
    return gap_s if gap_s else abs(other.arrival_s - request.arrival_s) * 1e-9


def _replica_until(
    replica: ReplicaLog, end_s: float, metrics: Mapping[str, TimeSeries]
) -> ReplicaLog:
    """What its log says at the end of the record: nothing that came later."""
    ready = replica.ready_s is not None and replica.ready_s <= end_s
    ended = replica.ended_s is not None and replica.ended_s <= end_s
    return replace(
        replica,
        ready_s=replica.ready_s if ready else None,
        ended_s=replica.ended_s if ended else None,
        end_reason=replica.end_reason if ended else "",
        metrics=metrics,
    )


def _window(
    rows: Sequence[Mapping[str, float]], start_s: float, end_s: float
) -> dict[str, TimeSeries]:
    inside = [row for row in rows if start_s <= row["time_s"] <= end_s]
    times_s = tuple(row["time_s"] for row in inside)
    names = [name for name in inside[0] if name != "time_s"] if inside else []
    return {name: TimeSeries(times_s, tuple(row[name] for row in inside)) for name in names}


def shifted(incident: Incident, by_s: float) -> Incident:
    """The same record on another clock."""
    return _with_times(incident, lambda time_s: time_s + by_s)


def renamed(incident: Incident, names: Mapping[str, str], name: str) -> Incident:
    """The same record with other names of its replicas.

    Args:
        incident: whose.
        names: from each replica's name to its new one.
        name: of the record.
    """
    return replace(
        incident,
        name=name,
        request=replace(incident.request, replica=names[incident.request.replica]),
        neighbours=tuple(replace(n, replica=names[n.replica]) for n in incident.neighbours),
        replicas={
            names[key]: replace(log, name=names[key]) for key, log in incident.replicas.items()
        },
    )


def _rounded(incident: Incident) -> Incident:
    """Times to 0.1 ms, values to five digits: what a log has, and a small file."""
    short = _with_times(incident, lambda time_s: round(time_s, 4))

    def rounded(series: TimeSeries) -> TimeSeries:
        return TimeSeries(series.times_s, tuple(float(f"{value:.5g}") for value in series.values))

    return replace(
        short,
        fleet={key: rounded(series) for key, series in short.fleet.items()},
        replicas={
            key: replace(log, metrics={k: rounded(series) for k, series in log.metrics.items()})
            for key, log in short.replicas.items()
        },
    )


def _with_times(incident: Incident, change: Any) -> Incident:
    def line(log: Any) -> Any:
        times = {
            f.name: change(getattr(log, f.name))
            for f in fields(log)
            if f.name.endswith("_s") and getattr(log, f.name) is not None
        }
        return replace(log, **times)

    def series(metrics: Mapping[str, TimeSeries]) -> dict[str, TimeSeries]:
        moved = {}
        for name, one in metrics.items():
            moved[name] = TimeSeries(tuple(change(time_s) for time_s in one.times_s), one.values)
        return moved

    return replace(
        incident,
        request=line(incident.request),
        neighbours=tuple(line(neighbour) for neighbour in incident.neighbours),
        replicas={
            name: replace(line(log), metrics=series(log.metrics))
            for name, log in incident.replicas.items()
        },
        decisions=tuple(line(decision) for decision in incident.decisions),
        fleet=series(incident.fleet),
    )


# Records as JSON: log lines and metrics as columns, since their names would fill the file.


def to_json(incident: Incident) -> dict[str, Any]:
    """A record as plain lists and dicts."""

    def columns(metrics: Mapping[str, TimeSeries]) -> dict[str, Any]:
        times_s = next(iter(metrics.values())).times_s if metrics else ()
        return {"time_s": times_s, **{name: series.values for name, series in metrics.items()}}

    lines = [incident.request, *incident.neighbours]
    return {
        "name": incident.name,
        "settings": asdict(incident.settings),
        "requests": {f.name: [getattr(r, f.name) for r in lines] for f in fields(RequestLog)},
        "replicas": [
            {f.name: getattr(log, f.name) for f in fields(log) if f.name != "metrics"}
            | {"metrics": columns(log.metrics)}
            for log in incident.replicas.values()
        ],
        "decisions": [asdict(decision) for decision in incident.decisions],
        "fleet": columns(incident.fleet),
    }


def from_json(stored: Mapping[str, Any]) -> Incident:
    """The record that `to_json` gave."""

    def series(columns: Mapping[str, Any]) -> dict[str, TimeSeries]:
        times_s = tuple(columns["time_s"])
        return {
            name: TimeSeries(times_s, tuple(values))
            for name, values in columns.items()
            if name != "time_s"
        }

    rows = zip(*(stored["requests"][f.name] for f in fields(RequestLog)), strict=True)
    request, *neighbours = (RequestLog(*row) for row in rows)
    replicas = [
        ReplicaLog(**{**log, "metrics": series(log["metrics"])}) for log in stored["replicas"]
    ]
    return Incident(
        name=stored["name"],
        settings=Settings(**stored["settings"]),
        request=request,
        neighbours=tuple(neighbours),
        replicas={replica.name: replica for replica in replicas},
        decisions=tuple(DecisionLog(**decision) for decision in stored["decisions"]),
        fleet=series(stored["fleet"]),
    )
