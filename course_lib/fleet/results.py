"""What a simulation found: its requests, its replicas, its metrics over time, and what it cost.

    result = simulate(trace, fleet)
    result.summary()["ttft_p95_s"]
    result.timeline.plot("time_s", "replicas_ready")

Tables are pandas' (the `labs` extra), with units in the names of their columns; times are in
seconds since the beginning of the trace.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

#: Columns of `SimulationResult.requests` as they are recorded; others, as `ttft_s`, follow.
REQUEST_COLUMNS = (
    "index",
    "arrival_s",
    "prompt_tokens",
    "output_tokens",  # generated; of one that was rejected, asked for
    "tenant",
    "priority_class",
    "session",
    "region",
    "status",  # "finished" or "rejected"; "lost" would be a mistake of the simulator
    "reason",  # of a rejection
    "replica",  # the last one
    "dispatched_s",  # reached the replica that served it
    "scheduled_s",  # its first step there
    "first_token_s",
    "finished_s",
    "cached_tokens",  # of the prompt, from the prefix cache
    "preemptions",
    "retries",
)

QUANTILES = (50, 95, 99)


@dataclass(frozen=True)
class SimulationResult:
    """A run of the simulator.

    Args:
        name: of the trace.
        duration_s: when the simulation ended.
        request_rows: in the order of their ends, with `REQUEST_COLUMNS`.
        timeline_rows: one a scrape; the metrics of `fleet.metrics.METRICS`, counts of replicas by
            state (`replicas_ready` ...), `replicas_wanted`, and `gateway_queue`.
        replica_timeline_rows: one a scrape and replica: what its `/metrics` says. Counters are
            since its start.
        decision_rows: of the autoscalers.
        replica_rows: one a replica: its life, its phases, `usd`, hours by state.
        events: (time_s, kind, who ...), if they were asked for.
    """

    name: str
    duration_s: float
    request_rows: list[tuple[Any, ...]]
    timeline_rows: list[dict[str, Any]]
    replica_timeline_rows: list[dict[str, Any]]
    decision_rows: list[dict[str, Any]]
    replica_rows: list[dict[str, Any]]
    events: list[tuple[Any, ...]] = field(default_factory=list)

    @cached_property
    def requests(self) -> "pd.DataFrame":
        """One row a request, in the order of arrival."""
        pd = import_pandas()
        table = pd.DataFrame(self.request_rows, columns=list(REQUEST_COLUMNS))
        table = table.set_index("index").sort_index()
        for column in ("dispatched_s", "scheduled_s", "first_token_s", "finished_s"):
            table[column] = table[column].astype(float)
        table["queue_s"] = table.scheduled_s - table.arrival_s
        table["ttft_s"] = table.first_token_s - table.arrival_s
        table["e2e_s"] = table.finished_s.where(table.status == "finished") - table.arrival_s
        more = (table.output_tokens - 1).where(table.output_tokens > 1)
        table["tpot_s"] = (table.finished_s - table.first_token_s) / more
        return table

    @cached_property
    def timeline(self) -> "pd.DataFrame":
        """The fleet's metrics, one row a scrape."""
        return import_pandas().DataFrame(self.timeline_rows)

    @cached_property
    def replica_timeline(self) -> "pd.DataFrame":
        """Each replica's metrics, one row a scrape and replica."""
        return import_pandas().DataFrame(self.replica_timeline_rows)

    @cached_property
    def decisions(self) -> "pd.DataFrame":
        """What the autoscalers decided: `time_s`, `region`, `current`, `wanted`, `reason`."""
        columns = ["time_s", "region", "current", "wanted", "reason"]
        return import_pandas().DataFrame(self.decision_rows, columns=columns)

    @cached_property
    def replicas(self) -> "pd.DataFrame":
        """One row a replica that ever was."""
        return import_pandas().DataFrame(self.replica_rows)

    @cached_property
    def _columns(self) -> dict[str, NDArray[Any]]:
        """Times of the finished requests, without pandas."""
        names = ("arrival_s", "first_token_s", "finished_s", "output_tokens", "scheduled_s")
        places = [REQUEST_COLUMNS.index(name) for name in names]
        status = REQUEST_COLUMNS.index("status")
        rows = [[row[p] for p in places] for row in self.request_rows if row[status] == "finished"]
        columns = np.array(rows, dtype=float).reshape(-1, len(names)).T
        return dict(zip(names, columns, strict=True))

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """Time to first token of each finished request, from its arrival at the gateway."""
        return self._columns["first_token_s"] - self._columns["arrival_s"]

    @property
    def tpot_s(self) -> NDArray[np.float64]:
        """Mean time per token after the first, of each finished request that has more than one."""
        columns = self._columns
        several = columns["output_tokens"] > 1
        decode_s = (columns["finished_s"] - columns["first_token_s"])[several]
        return decode_s / (columns["output_tokens"][several] - 1)

    def slo_attainment(self, ttft_s: float, tpot_s: float) -> float:
        """Share of all requests that finished within both objectives; 1 if there were none."""
        if not self.request_rows:
            return 1.0
        columns = self._columns
        more = np.maximum(columns["output_tokens"] - 1, 1)
        tpot = (columns["finished_s"] - columns["first_token_s"]) / more
        kept = (self.ttft_s <= ttft_s) & (tpot <= tpot_s)
        return float(kept.sum() / len(self.request_rows))

    @property
    def usd(self) -> float:
        """What all replicas cost together."""
        return sum(row["usd"] for row in self.replica_rows)

    @property
    def gpu_hours(self) -> dict[str, float]:
        """Replica-hours by what the replica did: serving, idle, loading, standby."""
        states = ("serving", "idle", "loading", "standby")
        return {s: sum(row[f"{s}_s"] for row in self.replica_rows) / 3600 for s in states}

    @property
    def starts(self) -> int:
        """Replicas that were started cold, at whatever time."""
        return sum(row["cold"] for row in self.replica_rows)

    @property
    def reversals(self) -> int:
        """How often the wanted number turned round: from up to down or from down to up."""
        turns, last = 0, dict[str, int]()
        for row in self.decision_rows:
            step = int(np.sign(row["wanted"] - row["current"]))
            if step:
                turns += last.get(row["region"], step) != step
                last[row["region"]] = step
        return turns

    def summary(self) -> dict[str, float]:
        """The numbers to compare runs by."""
        status = REQUEST_COLUMNS.index("status")
        retries = REQUEST_COLUMNS.index("retries")
        counts = {
            f"requests_{name}": sum(row[status] == name for row in self.request_rows)
            for name in ("finished", "rejected", "lost")
        }
        columns = self._columns
        latencies = {
            f"{name}_p{q}_s": float(np.percentile(values, q)) if len(values) else float("nan")
            for name, values in (("ttft", self.ttft_s), ("tpot", self.tpot_s))
            for q in QUANTILES
        }
        return {
            "requests": len(self.request_rows),
            **counts,
            "retries": sum(row[retries] for row in self.request_rows),
            **latencies,
            "queue_s": float((columns["scheduled_s"] - columns["arrival_s"]).sum()),
            "starts": self.starts,
            "reversals": self.reversals,
            **{f"gpu_hours_{name}": hours for name, hours in self.gpu_hours.items()},
            "usd": self.usd,
        }


def import_pandas() -> Any:
    """pandas, or an `ImportError` that says how to get it."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "tables need pandas; install it with pip install 'gpu-serving-labs[labs]'"
        ) from error
    return pandas
