"""An autoscaler in charge of real replicas: read the metrics, decide, apply, once an interval.

    def make(clock):
        return SafeAutoscaler(GPUAutoscaler(clock=clock), needs=["num_requests_waiting"])

    ControlLoop(PrometheusMetrics(...), make, fleet).run(interval_s=15, stop=threading.Event())

`SafeAutoscaler` is the decision without the loop: what to do when metrics are missing. Each region
has its own Prometheus and its own loop, so what one region loses does not touch another. A loop can
be recorded, and `replay` gives the record to any autoscaler, as the simulator would.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TextIO

from course_lib.fleet.autoscaler import Autoscaler, ScalingDecision
from course_lib.fleet.keda import Fallback
from course_lib.fleet.metrics import FleetMetrics, ReplicaMetrics, measured
from course_lib.fleet.replica import VirtualClock
from course_lib.validation import number, whole_number

logger = logging.getLogger(__name__)

Clock = Callable[[], float]


class NoMetrics(FleetMetrics):
    """What there is when the source of the metrics fails: no metric, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__({})
        self.reason = reason


class SafeAutoscaler:
    """An autoscaler that never takes replicas away blindly.

    While a metric that it needs is missing, or its autoscaler raises an error, the last decision
    holds, and never fewer replicas than there are. After more failures in a row than KEDA's
    fallback allows, it may add replicas; unlike KEDA's, it takes none away. A replica that reports
    nothing blocks scaling down, to zero as well, since nobody knows what it has to do. At zero no
    replica can report, so that is no failure.

    It is an `Autoscaler` itself: a control loop, Ray Serve and the simulator take it alike.

    Args:
        autoscaler: decides when the metrics are there.
        needs: of `METRICS`; those without which no decision is safe.
        fallback: for when the metrics stay away; None holds the last decision for ever.

    Raises:
        ValueError: nothing is needed, or the fallback has no replicas.
    """

    def __init__(
        self, autoscaler: Autoscaler, needs: Sequence[str], fallback: Fallback | None = None
    ) -> None:
        if not needs or isinstance(needs, str):
            raise ValueError(f"needs must be a list of metrics that the rule reads, got {needs!r}")
        if fallback is not None:
            whole_number("fallback.replicas", fallback.replicas)
        self.autoscaler = autoscaler
        self.needs = tuple(needs)
        self.fallback = fallback
        self.failures = 0  # in a row
        self._last: int | None = None  # replicas of the last decision that had its metrics

    def decide(self, metrics: Mapping[str, float], current_replicas: int) -> ScalingDecision:
        """The autoscaler's decision if it is safe, otherwise what is.

        Args:
            metrics: of the fleet; `NoMetrics` if they could not be read.
            current_replicas: those there are, loading ones included, draining ones not.

        Raises:
            ValueError: `current_replicas` is not a whole number of at least 0.
        """
        current = whole_number("current_replicas", current_replicas, at_least=0)
        if isinstance(metrics, NoMetrics):
            return self._hold(current, metrics.reason)
        missing = ", ".join(name for name in self.needs if measured(metrics, name) is None)
        if missing and current == 0 and not self._last:
            return ScalingDecision(0, f"at zero, where no replica reports {missing}")
        if missing:
            return self._hold(current, f"{missing} could not be measured")
        try:
            decision = self.autoscaler.decide(metrics, current)
            whole_number("its replicas", decision.replicas, at_least=0)
        except Exception as error:  # a rule with a mistake must not take the fleet with it
            name = type(self.autoscaler).__name__
            return self._hold(current, f"{name} failed with {type(error).__name__}: {error}")
        self.failures = 0
        ready = metrics.get("num_replicas_ready", current)
        if decision.replicas < current and ready < current:
            decision = ScalingDecision(
                current,
                f"{ready:g} of {current} replicas report, so no scaling down; "
                f"otherwise {decision.reason}",
            )
        self._last = decision.replicas
        return decision

    def _hold(self, current: int, why: str) -> ScalingDecision:
        self.failures += 1
        replicas = max(current, self._last or 0)
        reason = f"{replicas} held, failure {self.failures} in a row: {why}"
        if self.fallback and self.failures > self.fallback.failure_threshold:
            wanted = self.fallback.replicas_at(replicas)
            if wanted > replicas:
                replicas = wanted
                reason = f"fallback to {replicas}, failure {self.failures} in a row: {why}"
        logger.warning("%s", reason)
        return ScalingDecision(replicas, reason)


class Source(Protocol):
    """Where the metrics come from, such as `PrometheusMetrics`."""

    def read(self) -> FleetMetrics:
        """The metrics now; any error means that they could not be read."""
        ...


class Fleet(Protocol):
    """The replicas that a loop is in charge of."""

    def current_replicas(self) -> int:
        """Those there are, loading ones included, draining ones not."""
        ...

    def scale_to(self, replicas: int) -> None:
        """Order so many, without waiting for them."""
        ...


@dataclass(frozen=True)
class LoopDecision:
    """One step of a loop.

    Args:
        time_s: by the loop's clock.
        metrics: what was read.
        current: replicas that the autoscaler was told of.
        decision: what it said.
    """

    time_s: float
    metrics: FleetMetrics
    current: int
    decision: ScalingDecision

    def to_json(self) -> str:
        """One line of a record."""
        failure = self.metrics.reason if isinstance(self.metrics, NoMetrics) else None
        return json.dumps(
            {
                "time_s": self.time_s,
                "current": self.current,
                "metrics": dict(self.metrics),
                "replicas": [asdict(replica) for replica in self.metrics.replicas],
                "failure": failure,
                "decision": asdict(self.decision),
            }
        )

    @classmethod
    def from_json(cls, line: str) -> "LoopDecision":
        """Read what `to_json` wrote.

        Raises:
            ValueError: the line is none of these.
        """
        try:
            row: dict[str, Any] = json.loads(line)
            metrics = (
                FleetMetrics(row["metrics"], [ReplicaMetrics(**r) for r in row["replicas"]])
                if row["failure"] is None
                else NoMetrics(row["failure"])
            )
            decision = ScalingDecision(**row["decision"])
            return cls(row["time_s"], metrics, row["current"], decision)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"expected a step of a control loop, got {line[:80]!r}") from error


class ControlLoop:
    """A source of metrics, an autoscaler and a fleet, put together.

    Args:
        source: is read once a step.
        make_autoscaler: makes it with the loop's clock, which stands still within a step; the
            simulator's `FleetSpec` and `replay` take the same function.
        fleet: is asked for its replicas and told how many there should be.
        clock: returns seconds; only differences matter.
        record: each step is written there as a line of JSON.
    """

    def __init__(
        self,
        source: Source,
        make_autoscaler: Callable[[Clock], SafeAutoscaler],
        fleet: Fleet,
        clock: Clock = time.monotonic,
        record: TextIO | None = None,
    ) -> None:
        self.source = source
        self.fleet = fleet
        self.clock = clock
        self.record = record
        self._step_clock = VirtualClock()
        self.autoscaler = make_autoscaler(self._step_clock)
        # A step up that could not be applied counts as done, so that the autoscaler's cooldown
        # does not forget it. A step down is decided anew: it might not be right any more.
        self._owed = 0

    def run(self, interval_s: float, stop: threading.Event) -> None:
        """Step once an interval until `stop` is set; a step that fails is tried again."""
        number("interval_s", interval_s, above=0)
        while not stop.is_set():
            try:
                self.step()
            except Exception as error:
                logger.error("no step: %s: %s", type(error).__name__, error)
            stop.wait(interval_s)

    def step(self) -> LoopDecision:
        """Read, decide, apply.

        Errors of the source, of the autoscaler and of `scale_to` are logged; the fleet stays.

        Raises:
            Exception: whatever `fleet.current_replicas` raises; nothing was decided then.
        """
        current = self.fleet.current_replicas()
        self._step_clock.now_s = self.clock()
        told = max(current, self._owed)
        metrics = self._read()
        decision = self.autoscaler.decide(metrics, told)
        step = LoopDecision(self._step_clock.now_s, metrics, told, decision)
        if self.record is not None:
            self.record.write(step.to_json() + "\n")
            self.record.flush()
        self._apply(decision, current)
        return step

    def _read(self) -> FleetMetrics:
        try:
            return self.source.read()
        except Exception as error:
            return NoMetrics(str(error) or type(error).__name__)

    def _apply(self, decision: ScalingDecision, current: int) -> None:
        self._owed = 0
        if decision.replicas == current:
            return
        change = f"from {current} to {decision.replicas} replicas, {decision.reason}"
        try:
            self.fleet.scale_to(decision.replicas)
        except Exception as error:
            self._owed = decision.replicas
            logger.error("not scaled %s: %s: %s", change, type(error).__name__, error)
        else:
            logger.info("scaled %s", change)


def read_record(lines: Iterable[str]) -> list[LoopDecision]:
    """The steps of a loop's record.

    Raises:
        ValueError: a line is none of a record.
    """
    return [LoopDecision.from_json(line) for line in lines]


def replay(
    steps: Iterable[LoopDecision], make_autoscaler: Callable[[Clock], Autoscaler]
) -> list[ScalingDecision]:
    """What an autoscaler decides on recorded metrics, on a clock that goes as the loop's did.

    The autoscaler of the loop decides as it did then. Another one tells what it would have said
    to that fleet; the record goes on all the same, with the replicas there were. One that is not a
    `SafeAutoscaler` is shown empty metrics where they were lost.
    """
    clock = VirtualClock()
    autoscaler = make_autoscaler(clock)
    decisions = []
    for step in steps:
        clock.now_s = step.time_s
        decisions.append(autoscaler.decide(step.metrics, step.current))
    return decisions
