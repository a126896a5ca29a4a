"""What a load generator measured: each request's times, and what follows from all of them.

TTFT is from sending a request to the first chunk with text. TPOT is the mean time of each token
after the first, ITL the time between two chunks that follow each other, end to end the time to the
last event. Only requests that were served to the end count in latencies; all others are counted by
name. vLLM's `bench serve` has the same four, so figures can be compared.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from course_lib.validation import number

#: How a request can end, and what that means.
OUTCOMES = {
    "ok": "served to the end",
    "refused": "the server had no room for it: 429 or 503",
    "http_error": "another status than 200",
    "connection_error": "no connection, or no reply on it",
    "cut": "the stream ended without a final event",
    "stream_error": "the stream carried an error",
    "empty": "the stream ended as it should and had no text",
    "timeout": "not done within the time limit of the client",
}

LATENCIES = ("ttft", "tpot", "itl", "e2e")


@dataclass(frozen=True)
class SLO:
    """Objectives for one request: a time to its first token and a mean time for each later one.

    The defaults are the limits of MLPerf Inference for Llama 2 70B in its server scenario
    (https://github.com/mlcommons/inference_policies).

    Raises:
        ValueError: a time is not above 0.
    """

    ttft_s: float = 2.0
    tpot_s: float = 0.2

    def __post_init__(self) -> None:
        number("ttft_s", self.ttft_s, above=0)
        number("tpot_s", self.tpot_s, above=0)


@dataclass
class RequestRecord:
    """One request as the client saw it. Times are in seconds since the run began.

    Args:
        index: place in the workload.
        traffic_class: name of its class.
        asked_prompt_tokens: length that the workload gave it.
        asked_output_tokens: longest reply it asked for.
        tenant: of its class.
        priority: of its class.
        scheduled_s: when an open loop wanted it sent.
        start_s: when it was sent.
        chunk_times_s: when each chunk with text came; a chunk may hold several tokens.
        end_s: when its last event came, or its failure.
        outcome: one of `OUTCOMES`.
        status: of HTTP, None where there was no reply.
        reason: short name that the server or the client gave for a failure.
        message: the same in a sentence.
        retry_after_s: how long the server asked to stay away.
        finish_reason: the server's, such as "length".
        prompt_tokens: by the server's count, None if it did not say.
        output_tokens: by the server's count; if it did not say, the number of chunks.
        counted_by_server: whether the server counted the tokens.
    """

    index: int
    traffic_class: str
    asked_prompt_tokens: int
    asked_output_tokens: int
    tenant: str | None = None
    priority: int | None = None
    scheduled_s: float | None = None
    start_s: float = 0.0
    chunk_times_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    outcome: str = "ok"
    status: int | None = None
    reason: str | None = None
    message: str | None = None
    retry_after_s: float | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int = 0
    counted_by_server: bool = False

    @property
    def ok(self) -> bool:
        """Whether it was served to the end."""
        return self.outcome == "ok"

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first chunk with text."""
        return self.chunk_times_s[0] - self.start_s if self.chunk_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds of each token after the first; None for a single one."""
        if not self.chunk_times_s or self.output_tokens < 2:
            return None
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Seconds between chunks that follow each other."""
        return [later - earlier for earlier, later in pairwise(self.chunk_times_s)]

    @property
    def e2e_s(self) -> float:
        """Seconds to the last event."""
        return self.end_s - self.start_s

    def met(self, slo: SLO) -> bool:
        """Whether it was served, and within both objectives."""
        if not self.ok or self.ttft_s is None or self.ttft_s > slo.ttft_s:
            return False
        return self.tpot_s is None or self.tpot_s <= slo.tpot_s


@dataclass(frozen=True)
class Percentiles:
    """Of one latency, in seconds, with linear interpolation; `count` values."""

    p50: float
    p95: float
    p99: float
    mean: float
    count: int

    @classmethod
    def of(cls, values_s: Sequence[float]) -> "Percentiles | None":
        """Percentiles of the values, None if there are none."""
        if not values_s:
            return None
        p50, p95, p99 = map(float, np.percentile(values_s, [50, 95, 99]))
        return cls(p50, p95, p99, float(np.mean(values_s)), len(values_s))


@dataclass(frozen=True)
class Goodput:
    """Requests that met an SLO: how many, their share of all that were sent, and their rate."""

    met: int
    share: float
    rate_per_s: float


@dataclass(frozen=True)
class LoadReport:
    """A run of a workload against one server.

    Args:
        url: of the server.
        model: that was asked.
        api: "completions" or "chat".
        workload: its arguments.
        slo: for the goodput.
        started_at: ISO date and time.
        duration_s: from the first request sent to the last one ended.
        client_cpu_s: processor time of the load generator itself.
        records: of all requests, in the order of sending.
    """

    url: str
    model: str
    api: Literal["completions", "chat"]
    workload: Mapping[str, Any]
    slo: SLO
    started_at: str
    duration_s: float
    client_cpu_s: float
    records: Sequence[RequestRecord] = field(repr=False)

    @property
    def served(self) -> list[RequestRecord]:
        """Those with outcome "ok"."""
        return [record for record in self.records if record.ok]

    @property
    def latency(self) -> dict[str, Percentiles | None]:
        """Percentiles of ttft, tpot, itl and e2e in seconds; None where nothing was measured."""
        served = self.served
        values: dict[str, Iterable[float | None]] = {
            "ttft": (record.ttft_s for record in served),
            "tpot": (record.tpot_s for record in served),
            "itl": (gap for record in served for gap in record.itl_s),
            "e2e": (record.e2e_s for record in served),
        }
        return {
            name: Percentiles.of([value for value in values[name] if value is not None])
            for name in LATENCIES
        }

    @property
    def output_tokens(self) -> int:
        """Tokens of the replies that were served to the end."""
        return sum(record.output_tokens for record in self.served)

    @property
    def output_tokens_per_s(self) -> float:
        """Rate of those over the whole run."""
        return _rate(self.output_tokens, self.duration_s)

    @property
    def requests_per_s(self) -> float:
        """Rate of requests served to the end, over the whole run."""
        return _rate(len(self.served), self.duration_s)

    @property
    def outcomes(self) -> dict[str, int]:
        """How many ended how, those that occurred, in the order of `OUTCOMES`."""
        counts = Counter(record.outcome for record in self.records)
        return {outcome: counts[outcome] for outcome in OUTCOMES if counts[outcome]}

    @property
    def statuses(self) -> dict[str, int]:
        """How many had which HTTP status; "none" where there was no reply."""
        counts = Counter(str(record.status or "none") for record in self.records)
        return dict(sorted(counts.items()))

    @property
    def reasons(self) -> dict[str, int]:
        """How many failed or were refused why, the most frequent first."""
        failed = (record for record in self.records if not record.ok)
        return dict(Counter(f"{each.outcome}: {each.reason}" for each in failed).most_common())

    @property
    def other_length(self) -> int:
        """Replies that were served but not as long as asked for, as when the model ended them."""
        return sum(record.output_tokens != record.asked_output_tokens for record in self.served)

    @property
    def counted_by_server(self) -> bool:
        """Whether the server counted the tokens of all replies; chunks were counted if not."""
        return all(record.counted_by_server for record in self.served)

    @property
    def client_cpu_share(self) -> float:
        """Of one core, that the load generator took. Near 1 it measures itself."""
        return _rate(self.client_cpu_s, self.duration_s)

    @property
    def send_lag_p99_s(self) -> float | None:
        """How late an open loop sent its requests; large if the client could not keep up."""
        lags = [r.start_s - r.scheduled_s for r in self.records if r.scheduled_s is not None]
        found = Percentiles.of(lags)
        return None if found is None else found.p99

    def goodput(self, slo: SLO | None = None) -> Goodput:
        """Requests that met the SLO, this report's own unless another is given."""
        met = sum(record.met(slo or self.slo) for record in self.records)
        return Goodput(met, met / max(1, len(self.records)), _rate(met, self.duration_s))

    @property
    def class_names(self) -> list[str]:
        """Of the traffic classes that sent something."""
        return sorted({record.traffic_class for record in self.records})

    def of_class(self, name: str) -> "LoadReport":
        """The same run, with the requests of one traffic class only."""
        return replace(self, records=[r for r in self.records if r.traffic_class == name])

    def summary(self) -> dict[str, Any]:
        """All that follows from the records, as JSON has it."""
        return {
            "num_requests": len(self.records),
            "outcomes": self.outcomes,
            "statuses": self.statuses,
            "reasons": self.reasons,
            "latency_s": {k: v and asdict(v) for k, v in self.latency.items()},
            "output_tokens": self.output_tokens,
            "output_tokens_per_s": self.output_tokens_per_s,
            "requests_per_s": self.requests_per_s,
            "goodput": asdict(self.goodput()),
            "other_length": self.other_length,
            "counted_by_server": self.counted_by_server,
        }

    def to_json(self) -> str:
        """Everything: how it was measured, the summary, that of each class, and the records."""
        fields = {key: value for key, value in vars(self).items() if key != "records"}
        head = {
            **fields,
            "slo": asdict(self.slo),
            "client_cpu_share": self.client_cpu_share,
            "send_lag_p99_s": self.send_lag_p99_s,
            "summary": self.summary(),
            "by_class": {name: self.of_class(name).summary() for name in self.class_names},
        }
        records = ",\n  ".join(json.dumps(_rounded(record)) for record in self.records)
        return f'{json.dumps(head, indent=1)[:-2]},\n "records": [\n  {records}\n ]\n}}'

    def save(self, path: str | Path) -> Path:
        """Write `to_json` to a file, and its folder if it is not there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str | Path) -> "LoadReport":
        """A report that was saved.

        Raises:
            ValueError: the file holds none.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            fields = {name: found[name] for name in cls.__dataclass_fields__}
            fields["slo"] = SLO(**fields["slo"])
            fields["records"] = [RequestRecord(**record) for record in fields["records"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a saved load report ({error!r})") from None
        return cls(**fields)


def _rate(amount: float, duration_s: float) -> float:
    return amount / duration_s if duration_s > 0 else 0.0


def _rounded(record: RequestRecord) -> dict[str, Any]:
    """Its fields, times to a microsecond."""
    fields = dict(vars(record))
    for key, value in fields.items():
        if isinstance(value, float):
            fields[key] = round(value, 6)
    fields["chunk_times_s"] = [round(time_s, 6) for time_s in record.chunk_times_s]
    return fields
