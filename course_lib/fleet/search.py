"""The cheapest policy that meets the objectives: all of a grid are simulated, side by side.

    policies = grid(autoscaler={"short": short, "long": long}, warm_pool=[0, 5])
    found = search(trace, fleet, policies, Objective(ttft_p95_s=2, tpot_p95_s=0.05))
    found.cheapest, found.reason
    found.table

Prices are the fleet's: `ReplicaSpec.usd_per_hour`, `SpotMarket.price_factor` and those of regions.
Processes share the work where they can be forked, and then a policy may be anything, a function of
a notebook's cell too. Elsewhere policies must be functions of a module or `functools.partial` of
them; others are simulated one after another, with the same result. The table is pandas' (the `labs`
extra).
"""

import itertools
import multiprocessing
import os
import pickle
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from course_lib.fleet.results import SimulationResult, import_pandas
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec
from course_lib.traces.trace import Trace
from course_lib.validation import known_name, number, whole_number

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Objective:
    """What a policy has to achieve over the whole trace.

    Args:
        ttft_p95_s: for the time to first token, gateway and queues included.
        tpot_p95_s: for the time of each further token.
        rejected: share of all requests that may be refused; whoever refuses many is fast.

    Raises:
        ValueError: a number is out of its range.
    """

    ttft_p95_s: float
    tpot_p95_s: float
    rejected: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what nothing could meet."""
        number("ttft_p95_s", self.ttft_p95_s, above=0)
        number("tpot_p95_s", self.tpot_p95_s, above=0)
        number("rejected", self.rejected, at_least=0, at_most=1)

    def missed(self, row: Mapping[str, Any]) -> list[str]:
        """Those that a row of the table exceeds, in words; a latency of nobody is missed."""
        return [
            f"{field.name} {row[field.name]:.3g} > {getattr(self, field.name):g}"
            for field in fields(self)
            if not row[field.name] <= getattr(self, field.name)
        ]


@dataclass(frozen=True)
class SearchResult:
    """All policies of a search.

    Args:
        table: one row a policy, in their order: `policy`, `usd`, `ttft_p95_s`, `tpot_p95_s`,
            `rejected` (share of the requests), `met` and `missed`, which says what was not.
        objective: of the search.
    """

    table: "pd.DataFrame"
    objective: Objective

    @property
    def cheapest(self) -> str | None:
        """The policy that meets the objectives for the fewest dollars; None if none does."""
        met = self.table[self.table.met]
        return None if met.empty else str(met.policy[met.usd.idxmin()])

    @property
    def reason(self) -> str:
        """Why it is the cheapest, or what the nearest one missed."""
        count = f"{int(self.table.met.sum())} of {len(self.table)} policies meet the objectives"
        if self.cheapest is not None:
            usd = self.table.usd[self.table.met].min()
            return f"{count}; {self.cheapest} does for ${usd:.2f}"
        nearest = min(self.table.to_dict("records"), key=self._excess)
        return f"{count}; the nearest is {nearest['policy']}: {nearest['missed']}"

    @property
    def frontier(self) -> "pd.DataFrame":
        """The policies that no other beats in both dollars and p95 TTFT, the cheapest first.

        Those that refuse more than the objective allows do not compete.
        """
        served = self.table[self.table.rejected <= self.objective.rejected]
        ordered = served.dropna().sort_values(["usd", "ttft_p95_s"], kind="stable")
        best_before_s = ordered.ttft_p95_s.cummin().shift(fill_value=float("inf"))
        return ordered[ordered.ttft_p95_s < best_before_s]

    def _excess(self, row: Mapping[str, Any]) -> float:
        """How far the worst of the objectives was missed, as a factor."""
        objective = self.objective
        served = 1 - row["rejected"]
        ratios = [
            row["ttft_p95_s"] / objective.ttft_p95_s,
            row["tpot_p95_s"] / objective.tpot_p95_s,
            (1 - objective.rejected) / served if served else float("inf"),
        ]
        return max(float("inf") if ratio != ratio else ratio for ratio in ratios)


def grid(**choices: Mapping[str, Any] | Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Every combination of the choices, by a name that tells them apart.

    Args:
        choices: for fields of `FleetSpec`, what they may be: by names of your own, which factories
            need, or just the values.

    Raises:
        ValueError: there is no such field, a field has no choices, or two have the same name.
    """
    named = [
        [(label, {field: value}) for label, value in _labelled(field, values)]
        for field, values in choices.items()
    ]
    policies: dict[str, dict[str, Any]] = {}
    for combination in itertools.product(*named):
        name = ", ".join(label for label, _ in combination)
        if name in policies:
            raise ValueError(f"two policies are called {name!r}; give each choice another name")
        policies[name] = {k: v for _, change in combination for k, v in change.items()}
    return policies


def _labelled(field: str, values: Mapping[str, Any] | Sequence[Any]) -> Iterator[tuple[str, Any]]:
    known_name("field of FleetSpec", field, _FIELDS)
    if not values:
        raise ValueError(f"{field} has no choices; give it at least one or leave it out")
    if isinstance(values, Mapping):
        yield from values.items()
        return
    for value in values:
        if callable(value):
            raise ValueError(
                f"{field} has {value!r} among its choices, which needs a name: "
                f'{field}={{"a name": ...}}'
            )
        yield f"{field} {value}", value


_FIELDS = tuple(field.name for field in fields(FleetSpec))


def search(
    trace: Trace,
    fleet: FleetSpec,
    policies: Mapping[str, Mapping[str, Any]],
    objective: Objective,
    *,
    seed: int = 0,
    processes: int | None = None,
    show_progress: bool = True,
) -> SearchResult:
    """Simulate the trace under each policy.

    Args:
        trace: the requests.
        fleet: what all policies have in common.
        policies: by name, the fields of `fleet` that they change; `grid` makes them.
        objective: what has to be met.
        seed: of each simulation, so that all meet the same cold starts.
        processes: as many at a time; by default one for each core that may be used.
        show_progress: a bar of the policies that are done.

    Raises:
        ValueError: there are no policies, or one has no such field or value.
    """
    fleets = _fleets(fleet, policies)
    cores = _usable_cores() if processes is None else whole_number("processes", processes)
    rows: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(fleets), unit="policy", disable=not show_progress) as progress:
        for name, row in _simulated(_Work(trace, fleets, seed), min(cores, len(fleets))):
            rows[name] = row
            progress.update()
    for row in rows.values():
        missed = objective.missed(row)
        row.update(met=not missed, missed=", ".join(missed))
    # Whichever was done first, the order is that of the policies.
    table = import_pandas().DataFrame([{"policy": name, **rows[name]} for name in fleets])
    return SearchResult(table, objective)


def _fleets(fleet: FleetSpec, policies: Mapping[str, Mapping[str, Any]]) -> dict[str, FleetSpec]:
    if not policies:
        raise ValueError("policies must have at least one, got none")
    fleets = {}
    for name, changes in policies.items():
        named = {
            known_name(f"field in policy {name!r}", field, _FIELDS): value
            for field, value in changes.items()
        }
        try:
            fleets[name] = replace(fleet, **named)
        except ValueError as error:
            raise ValueError(f"policy {name!r}: {error}") from error
    return fleets


@dataclass(frozen=True)
class _Work:
    """What the processes share."""

    trace: Trace
    fleets: Mapping[str, FleetSpec]
    seed: int

    def row(self, name: str) -> dict[str, Any]:
        """What one policy came to."""
        try:
            return _row(simulate(self.trace, self.fleets[name], seed=self.seed))
        except Exception as error:
            error.add_note(f"in policy {name!r} of the search")
            raise


def _row(result: SimulationResult) -> dict[str, Any]:
    summary = result.summary()
    unserved = summary["requests"] - summary["requests_finished"]
    return {
        "usd": summary["usd"],
        "ttft_p95_s": summary["ttft_p95_s"],
        "tpot_p95_s": summary["tpot_p95_s"],
        "rejected": unserved / max(1, summary["requests"]),
    }


def _simulated(work: _Work, processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each policy's row, in the order in which they are done."""
    method = _start_method(work) if processes > 1 else None
    if method is None:
        for name in work.fleets:
            yield name, work.row(name)
        return
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context(method), _keep_work, (work,)
    ) as pool:
        futures = {pool.submit(_kept_row, name): name for name in work.fleets}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


# A process of the pool keeps its work here: a forked one is born with it, so that the trace is not
# sent to it again for each policy and nothing of it need be picklable.
_kept: list[_Work] = []


def _keep_work(work: _Work) -> None:
    _kept[:] = [work]


def _kept_row(name: str) -> dict[str, Any]:
    return _kept[0].row(name)


def _start_method(work: _Work) -> str | None:
    """How to start processes: None if these policies cannot be sent to any."""
    # macOS can fork, but its own libraries do not survive that.
    if "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin":
        return "fork"
    try:
        sent = pickle.dumps(work)
    except Exception as error:
        problem = str(error)
    else:
        if b"__main__" not in sent:
            return "spawn"
        problem = "a policy is defined in a notebook or script, where another process has no access"
    warnings.warn(
        f"the policies are simulated one after another, since they cannot be sent to other "
        f"processes ({problem}); define them in a module of their own to use all cores",
        stacklevel=4,
    )
    return None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
