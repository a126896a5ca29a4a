"""Autoscalers that plan: by what is spare, by the clock, or by objectives.

`SaturationAutoscaler` is llm-d's rule on the spare KV cache and queue of each replica.
`PredictiveAutoscaler` starts replicas before a rush that comes each day. `SloPlanner` is the idea
of NVIDIA Dynamo's planner: as many engines as the expected load needs within its objectives.
"""

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression

import numpy as np

from course_lib.fleet.autoscaler import AutoscalerBase, ScalingDecision
from course_lib.fleet.metrics import ReplicaMetrics, measured, replicas_in
from course_lib.validation import number, whole_number

# kvCacheThreshold, queueLengthThreshold, kvSpareTrigger and queueSpareTrigger that the saturation
# analyzer of llm-d's workload variant autoscaler is shipped with.
SATURATED_KV_CACHE = 0.80
SATURATED_QUEUE = 5  # requests
MIN_SPARE_KV_CACHE = 0.1
MIN_SPARE_QUEUE = 3  # requests

# How much of each step's surprise moves the forecast's level, and how much its season: a rush that
# is late or higher today shows within the hour at steps of 5 minutes, a new habit within the week.
SMOOTHING_LEVEL = 0.2
SMOOTHING_SEASON = 0.3

# --adjustment-interval of Dynamo's SLA planner.
ADJUSTMENT_INTERVAL_S = 180

# The trend that `SloPlanner` continues is that of so many intervals.
TREND_INTERVALS = 5


class _Planner(AutoscalerBase):
    """An autoscaler whose rule is `plan`, which gives its reason too."""

    @abstractmethod
    def plan(self, metrics: Mapping[str, float], current: int, now: float) -> ScalingDecision:
        """How many replicas there should be, limits aside."""

    def recommend(self, metrics: Mapping[str, float], current_replicas: int) -> int:
        """The number of replicas of `decide`."""
        return self.decide(metrics, current_replicas).replicas

    def decide(self, metrics: Mapping[str, float], current_replicas: int) -> ScalingDecision:
        """Decide once, within `min_replicas` and `max_replicas`.

        Raises:
            ValueError: `current_replicas` is not a whole number of at least 0.
        """
        current = whole_number("current_replicas", current_replicas, at_least=0)
        planned = self.plan(metrics, current, self.clock())
        replicas = min(max(planned.replicas, self.min_replicas), self.max_replicas)
        if replicas == planned.replicas:
            return planned
        limit = "min_replicas" if replicas == self.min_replicas else "max_replicas"
        return ScalingDecision(replicas, f"{limit} {replicas}; {planned.reason}")


class SaturationAutoscaler(_Planner):
    """One up when little is spare, one down when enough stays spare without it.

    A replica is saturated from a KV cache use of 0.80 or a queue of 5 on; the others' mean spare
    is what is left to those thresholds. Nothing moves while a replica is not ready, and a replica
    whose scrape failed blocks scaling down.

    Source: llm-d's workload variant autoscaler, saturation analyzer.

    Args:
        min_replicas: never fewer; at least 1, since at zero no replica reports metrics.
        max_replicas: never more.
        clock: not asked: the rule knows the present alone.

    Raises:
        ValueError: a bound is not a whole number of at least 1, or the minimum is above the
            maximum.
    """

    def __init__(
        self,
        min_replicas: int = 1,
        max_replicas: int = 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(whole_number("min_replicas", min_replicas), max_replicas, clock)

    def plan(self, metrics: Mapping[str, float], current: int, now: float) -> ScalingDecision:
        """Look at `kv_cache_utilization` and `num_requests_waiting` of each replica."""
        replicas = replicas_in(metrics)
        ready = sum(replica.ready for replica in replicas)
        if replicas and (ready < len(replicas) or len(replicas) != current):
            return ScalingDecision(current, f"in transition: {ready} of {current} are ready")
        loads = [load for replica in replicas if (load := _load(replica))]
        if not loads:
            return ScalingDecision(
                current, "kv_cache_utilization and num_requests_waiting of no replica are known"
            )

        free = [
            (used, waiting)
            for used, waiting in loads
            if used < SATURATED_KV_CACHE and waiting < SATURATED_QUEUE
        ]
        if not free:
            return ScalingDecision(current + 1, f"all {len(loads)} replicas are saturated")
        kv_cache, queue = (fmean(column) for column in zip(*free, strict=True))
        spare = _Spare.at(kv_cache, queue)
        if not spare.enough:
            return ScalingDecision(current + 1, f"{spare} of {len(free)} replicas")
        if len(loads) < ready:
            return ScalingDecision(current, f"{ready - len(loads)} replicas could not be measured")
        if len(free) < 2:
            return ScalingDecision(current, f"{spare}, and no other replica takes the load")
        growth = len(free) / (len(free) - 1)
        after = _Spare.at(kv_cache * growth, queue * growth)
        if after.enough:
            return ScalingDecision(current - 1, f"with one fewer still {after}")
        return ScalingDecision(current, f"{spare}, but with one fewer {after}")


@dataclass(frozen=True)
class _Spare:
    kv_cache: float
    queue: float

    @classmethod
    def at(cls, kv_cache: float, queue: float) -> "_Spare":
        # Rounded, so that 0.8 - 0.7 is not below 0.1 nor above it.
        return cls(round(SATURATED_KV_CACHE - kv_cache, 9), round(SATURATED_QUEUE - queue, 9))

    @property
    def enough(self) -> bool:
        return self.kv_cache >= MIN_SPARE_KV_CACHE and self.queue >= MIN_SPARE_QUEUE

    def __str__(self) -> str:
        return (
            f"spare kv_cache_utilization {self.kv_cache:.3g} (at least {MIN_SPARE_KV_CACHE:g}) and "
            f"num_requests_waiting {self.queue:.3g} (at least {MIN_SPARE_QUEUE})"
        )


def _load(replica: ReplicaMetrics) -> tuple[float, float] | None:
    used = measured(replica.values, "kv_cache_utilization")
    waiting = measured(replica.values, "num_requests_waiting")
    return None if used is None or waiting is None else (used, waiting)


class PredictiveAutoscaler(_Planner):
    """As many replicas as the load now needs, or that of the time until a new one would be ready.

    The load is recorded in steps; from a full season on, Holt-Winters forecasts it. Before that
    only the load now counts. What was needed is kept for `ready_time_s`, since giving it back for
    less costs more than it saves.

    Source: Holt-Winters' additive method without a trend, Hyndman and Athanasopoulos,
    "Forecasting: Principles and Practice", 8.3, as statsmodels has it (the `fleet` extra).

    Args:
        capacity_per_replica: of `metric`, what one replica serves.
        ready_time_s: from the decision to a ready replica; the measured p95 is a good choice.
        metric: of `METRICS`, or several joined by `" + "`; it must grow with what users want and
            not with the replicas there are.
        season_s: after which the load repeats.
        step_s: resolution of the forecast; divides the season.
        history: mean of `metric` in each step before the first decision, the latest last.
        min_replicas: never fewer.
        max_replicas: never more.
        clock: returns seconds; only differences matter.

    Raises:
        ValueError: an argument is out of its range, or the season is not a whole number of steps
            or not longer than `ready_time_s` and two steps.
    """

    def __init__(
        self,
        capacity_per_replica: float,
        ready_time_s: float,
        metric: str = "request_rate_per_s",
        season_s: float = 86_400,
        step_s: float = 300,
        history: Sequence[float] = (),
        min_replicas: int = 1,
        max_replicas: int = 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(min_replicas, max_replicas, clock)
        self.capacity_per_replica = number("capacity_per_replica", capacity_per_replica, above=0)
        self.ready_time_s = number("ready_time_s", ready_time_s, at_least=0)
        self.metric = metric
        self.step_s = number("step_s", step_s, above=0)
        steps = number("season_s", season_s, above=0) / self.step_s
        # The step that is not over, those that are whole, and the one in which it is ready.
        self._horizon = int(self.ready_time_s // self.step_s) + 2
        if steps != int(steps) or steps <= self._horizon:
            raise ValueError(
                "season_s must be a whole number of step_s and longer than ready_time_s and two "
                f"steps, got {season_s} s, steps of {step_s} s and {ready_time_s} s"
            )
        self.steps_per_season = int(steps)
        self._history = [number("history", value, at_least=0) for value in history]
        self._samples: list[float] = []  # of the step that is not over
        self._started_s: float | None = None
        self._steps = 0  # over since the start
        self._forecast: list[float] | None = None  # from the step that is not over on
        self._needs: list[tuple[float, int]] = []  # when, replicas

    def plan(self, metrics: Mapping[str, float], current: int, now: float) -> ScalingDecision:
        """The highest need of now, the forecast and the last `ready_time_s`.

        A metric that could not be measured needs the replicas there are.
        """
        value = measured(metrics, self.metric)
        self._record(value, now)
        reactive = current if value is None else self._replicas(value)
        shown = "could not be measured" if value is None else f"{value:g}"
        reason = f"{self.metric} {shown}, {self.capacity_per_replica:g} for each replica"
        expected = self._expected(now)
        if expected is None:
            need, reason = reactive, f"{reason}; no full season is known yet"
        else:
            need = max(reactive, self._replicas(expected))
            reason += f"; up to {expected:.3g} forecast for the next {self.ready_time_s:g} s"
        self._needs = [
            *(past for past in self._needs if now - past[0] < self.ready_time_s),
            (now, need),
        ]
        replicas = max(wanted for _, wanted in self._needs)
        kept = f"; {replicas} were needed not long ago" if replicas > need else ""
        return ScalingDecision(replicas, f"{reason}: {need} needed{kept}")

    def _replicas(self, value: float) -> int:
        return math.ceil(round(value / self.capacity_per_replica, 6))

    def _record(self, value: float | None, now: float) -> None:
        """Close the steps that are over, then take the value into the one that is not."""
        if self._started_s is None:
            self._started_s = now
            self._forecast_anew()
        while self._steps < (now - self._started_s) // self.step_s:
            self._history.append(fmean(self._samples) if self._samples else self._unseen())
            self._samples = []
            self._steps += 1
            self._forecast_anew()
        if value is not None:
            self._samples.append(value)

    def _unseen(self) -> float:
        """A step without a sample is taken to be as a season before, or as the step before."""
        if len(self._history) >= self.steps_per_season:
            return self._history[-self.steps_per_season]
        return self._history[-1] if self._history else 0.0

    def _forecast_anew(self) -> None:
        if len(self._history) >= self.steps_per_season:
            self._forecast = seasonal_forecast(self._history, self.steps_per_season, self._horizon)

    def _expected(self, now: float) -> float | None:
        """The highest forecast of the steps from now until a replica started now is ready."""
        if self._forecast is None:
            return None
        assert self._started_s is not None
        last = int((now + self.ready_time_s - self._started_s) // self.step_s) - self._steps
        return max(self._forecast[: last + 1])


def seasonal_forecast(history: Sequence[float], season: int, horizon: int) -> list[float]:
    """The next values of a series that repeats, never below 0, by Holt-Winters without a trend.

    Level and season start from the first season, so one is enough; smoothing is fixed at
    `SMOOTHING_LEVEL` and `SMOOTHING_SEASON`.

    Args:
        history: at least one season.
        season: values in a season, at least 2.
        horizon: values wanted, fewer than a season: statsmodels' forecast leaves the last value
            out of its own season.

    Raises:
        ImportError: statsmodels is not installed.
        ValueError: there is less than one season, or the horizon reaches a whole one.
    """
    try:
        from statsmodels.tsa.holtwinters import ExponentialSmoothing
    except ImportError as error:
        raise ImportError(
            "forecasts need statsmodels; install it with pip install 'gpu-serving-labs[fleet]'"
        ) from error
    if len(history) < season:
        raise ValueError(f"history must have at least {season} values, got {len(history)}")
    whole_number("horizon", horizon, at_most=season - 1)
    level = fmean(history[:season])
    model = ExponentialSmoothing(
        list(history),
        seasonal="add",
        seasonal_periods=season,
        initialization_method="known",
        initial_level=level,
        initial_seasonal=[value - level for value in history[:season]],
    )
    with np.errstate(all="ignore"):  # a perfect fit has no information criterion
        fitted = model.fit(
            smoothing_level=SMOOTHING_LEVEL, smoothing_seasonal=SMOOTHING_SEASON, optimized=False
        )
        forecast = fitted.forecast(horizon)
    return [max(0.0, float(value)) for value in forecast]


class SloPlanner(_Planner):
    """As many engines as the next interval's requests need, one more when latency says so.

    At the end of each interval a rise of the request rate and of the lengths is continued by one
    interval; the replicas for it are ceil(rate / what one engine serves within the objectives). In
    between, one is added when p95 TTFT or TPOT exceeds its objective and no replica is still
    loading. Fewer come only at the end of an interval in which the rate was measured, and both
    latencies were measured and kept, throughout.

    Source: the SLA planner of NVIDIA Dynamo's documentation, with our own predictor.

    Args:
        max_rate_per_s: of prompt tokens and output tokens: the requests/s that one engine serves
            within both objectives; 0 if it cannot even for one.
        ttft_objective_ms: for `ttft_p95_ms`.
        tpot_objective_ms: for `tpot_p95_ms`.
        interval_s: between two plans.
        min_replicas: never fewer.
        max_replicas: never more.
        clock: returns seconds; only differences matter.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        max_rate_per_s: Callable[[float, float], float],
        ttft_objective_ms: float,
        tpot_objective_ms: float,
        interval_s: float = ADJUSTMENT_INTERVAL_S,
        min_replicas: int = 1,
        max_replicas: int = 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(min_replicas, max_replicas, clock)
        self.max_rate_per_s = max_rate_per_s
        self.objectives_ms = {
            "ttft_p95_ms": number("ttft_objective_ms", ttft_objective_ms, above=0),
            "tpot_p95_ms": number("tpot_objective_ms", tpot_objective_ms, above=0),
        }
        self.interval_s = number("interval_s", interval_s, above=0)
        self._rates = _Trend()
        self._prompts = _Trend()
        self._outputs = _Trend()
        self._interval_started_s: float | None = None
        self._kept = True  # both objectives, so far in this interval
        self._planned: ScalingDecision | None = None

    def plan(self, metrics: Mapping[str, float], current: int, now: float) -> ScalingDecision:
        """The plan's replicas at least; one more or fewer as latency tells."""
        rate = measured(metrics, "request_rate_per_s")
        self._rates.see(rate)
        # A mean of no requests is 0 and tells nothing.
        self._prompts.see(measured(metrics, "prompt_tokens_mean") or None)
        self._outputs.see(measured(metrics, "output_tokens_mean") or None)
        values = {name: measured(metrics, name) for name in self.objectives_ms}
        exceeded = [
            f"{name} {value:g} > {self.objectives_ms[name]:g}"
            for name, value in values.items()
            if value is not None and value > self.objectives_ms[name]
        ]
        if exceeded or rate is None or None in values.values():
            self._kept = False

        fewer_may_do = False
        if self._interval_started_s is None:
            self._interval_started_s = now
        elif now - self._interval_started_s >= self.interval_s:
            fewer_may_do, self._kept = self._kept, True
            self._interval_started_s = now
            self._planned = self._plan_interval()

        planned = self._planned or ScalingDecision(current, "no interval is over yet")
        if exceeded and not _loading(metrics, current) and planned.replicas <= current:
            return ScalingDecision(current + 1, f"{' and '.join(exceeded)}: one more")
        if planned.replicas >= current or fewer_may_do:
            return planned
        return ScalingDecision(current, f"fewer only after an interval in order; {planned.reason}")

    def _plan_interval(self) -> ScalingDecision | None:
        """What the next interval needs; None if rate or lengths are not known."""
        rate, prompt, output = (
            trend.next() for trend in (self._rates, self._prompts, self._outputs)
        )
        if rate is None or prompt is None or output is None:
            return None
        each = number("max_rate_per_s()", self.max_rate_per_s(prompt, output), at_least=0)
        expected = (
            f"request_rate_per_s {rate:.3g}, prompt_tokens_mean {prompt:.4g} and "
            f"output_tokens_mean {output:.4g} expected"
        )
        if each == 0:
            return ScalingDecision(
                self.max_replicas, f"{expected}; no engine keeps the objectives with those"
            )
        needed = math.ceil(round(rate / each, 6))
        return ScalingDecision(
            needed, f"{expected}, {each:.3g} per s for each engine: {needed} needed"
        )


class _Trend:
    """Means of the last intervals; a rise is continued, a fall is not trusted."""

    def __init__(self) -> None:
        self._samples: list[float] = []
        self._means: list[float] = []

    def see(self, value: float | None) -> None:
        if value is not None:
            self._samples.append(value)

    def next(self) -> float | None:
        """Close the interval; its successor by least squares, at least as high as itself."""
        if self._samples:
            self._means = [*self._means, fmean(self._samples)][-TREND_INTERVALS:]
            self._samples = []
        if len(self._means) < 2:
            return self._means[0] if self._means else None
        slope, intercept = linear_regression(range(len(self._means)), self._means)
        return max(self._means[-1], intercept + slope * len(self._means))


def _loading(metrics: Mapping[str, float], current: int) -> bool:
    if replicas := replicas_in(metrics):
        return any(not replica.ready for replica in replicas)
    return metrics.get("num_replicas_ready", current) < current
