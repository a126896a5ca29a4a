"""Calibration: the engine's own steps are timed, and the simulator's step times fitted to them.

    calibration = calibrate(LLM("data/models/merchant-chat").llm_engine)
    result = simulate(trace, FleetSpec(calibration.replica))

`replay` runs a trace on the engine in real time, to compare it with what was simulated. Both take
any engine on any device: the time of a step is what passes until its tokens are on the host.
`course calibrate --save` records one, and `load_calibration` reads it back.
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from course_lib.engine.batch import Executor, ScheduledBatch, StepResult
from course_lib.engine.engine import LLMEngine
from course_lib.engine.request import RequestMetrics
from course_lib.engine.sampling_params import RequestOutputKind, SamplingParams
from course_lib.fleet.spec import ReplicaSpec
from course_lib.fleet.step_time import FittedStepTime, StepTimeModel, StepWork
from course_lib.measurements import (
    MEASUREMENTS_DIR,
    Measurement,
    load_measurements,
    measured_here,
    save_measurement,
)
from course_lib.traces.trace import Trace, token_ids
from course_lib.validation import whole_number

Sample = tuple[StepWork, float]

#: What a calibration keeps of the engine's arguments, by their names in `ReplicaSpec`.
ENGINE_ARGUMENTS = (
    "num_blocks",
    "max_model_len",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_prefix_caching",
)

#: Requests that are sent in each pass: enough in small batches too.
REQUESTS_AT_LEAST = 3
REQUESTS_PER_USER = 1

#: Short prompts are at most such a part of the longest.
SHORT = 4

REPLY_TOKENS = (4, 48)

#: Kinds of steps whose errors are told apart, in the order in which they are looked for.
KINDS: dict[str, Callable[[StepWork], bool]] = {
    "1 decode": lambda work: work.num_prefills == 0 and work.num_decodes == 1,
    "2 to 7 decodes": lambda work: work.num_prefills == 0 and work.num_decodes < 8,
    "8 decodes or more": lambda work: work.num_prefills == 0,
    "prefill": lambda work: work.num_decodes == 0,
    "prefill and decodes": lambda work: True,
}


@dataclass(frozen=True)
class StepErrors:
    """How well the fitted times of one kind of step agree with those measured.

    Args:
        kind: of `KINDS`.
        steps: how many were measured.
        measured_ms: mean.
        predicted_ms: mean.
        median_error: of the steps, relative to what was measured, without its sign.
        p95_error: the same, exceeded by one step in twenty.
    """

    kind: str
    steps: int
    measured_ms: float
    predicted_ms: float
    median_error: float
    p95_error: float


@dataclass(frozen=True)
class Calibration:
    """An engine as the simulator needs it.

    Args:
        model: name of the checkpoint's directory.
        engine: what ran where, in one line.
        replica: the engine's arguments, with the fitted step times.
        errors: by kind of step.
    """

    model: str
    engine: str
    replica: ReplicaSpec
    errors: tuple[StepErrors, ...]

    @property
    def step_time(self) -> FittedStepTime:
        """The fitted coefficients."""
        assert isinstance(self.replica.step_time, FittedStepTime)
        return self.replica.step_time


class ComputingClock:
    """Seconds that this thread has computed, for an engine whose machine others use too.

    On a CPU of its own, in one thread, an engine that is never idle sees no difference to a
    wall clock. A GPU's work does not count here, so there it is of no use.
    """

    def __init__(self) -> None:
        self._slept_s = 0.0

    def __call__(self) -> float:
        """Now."""
        return time.thread_time() + self._slept_s

    def sleep(self, seconds: float) -> None:
        """Let so much time pass at once."""
        self._slept_s += seconds


class _Timer:
    """An executor that notes the work of each step; `steps` has their times too."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.executor: Executor = engine.executor
        self.steps: list[Sample] = []
        self._work = StepWork()

    def __enter__(self) -> "_Timer":
        self.engine.executor = self
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.executor = self.executor
        self.engine.abort_request(self.engine.unfinished_request_ids())

    def execute(self, batch: ScheduledBatch) -> StepResult:
        self._work = StepWork.of(batch.scheduled)
        return self.executor.execute(batch)

    def step(self, began_s: float) -> list[RequestMetrics]:
        """Of the requests that ended. What the caller did since `began_s` is the step's too."""
        outputs = self.engine.step()
        self.steps.append((self._work, self.engine.clock() - began_s))
        return [o.metrics for o in outputs if o.finished and o.metrics is not None]


def replay(
    engine: LLMEngine,
    trace: Trace,
    *,
    sleep: Callable[[float], None] = time.sleep,
    show_progress: bool = False,
) -> tuple[list[RequestMetrics], list[Sample]]:
    """Run a trace on the engine, each request added when its time has come.

    Replies have the length that the trace says. Prompts are spelled out before the clock starts,
    and the prefix cache is emptied.

    Args:
        engine: any; it must be idle.
        trace: the requests.
        sleep: waits for the next arrival by the engine's clock.
        show_progress: a bar.

    Returns:
        The timelines of the requests in the order of their ends, in seconds of the engine's clock
        since the beginning of the trace, and the work and seconds of all steps.

    Raises:
        ValueError: a request of the trace can never be served by this engine.
    """
    vocab_size = engine.model_config.vocab_size
    coming = [
        (request.arrival_s, token_ids(request, -1 - i, vocab_size), _exactly(request.output_tokens))
        for i, request in enumerate(trace.requests)
    ]
    engine.scheduler.reset_prefix_cache()
    finished: list[RequestMetrics] = []
    progress = tqdm(total=len(coming), unit="request", disable=not show_progress, leave=False)
    start_s = engine.clock()
    with progress, _Timer(engine) as timer:
        added = 0
        while len(finished) < len(coming):
            began_s = engine.clock()
            now_s = began_s - start_s
            while added < len(coming) and coming[added][0] <= now_s:
                arrival_s, prompt, params = coming[added]
                engine.add_request(str(added), prompt, params, arrival_time=start_s + arrival_s)
                added += 1
            if engine.has_unfinished_requests():
                ended = timer.step(began_s)
                finished += ended
                progress.update(len(ended))
            else:
                sleep(max(0.0, coming[added][0] - now_s))
    return [_since(metrics, start_s) for metrics in finished], timer.steps


def calibrate(
    engine: LLMEngine,
    *,
    max_users: int = 32,
    max_prompt_tokens: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> Calibration:
    """Time steps of all kinds, and fit step times to them.

    One user, then 2, 4 and so on up to `max_users` send a prompt as soon as their last reply has
    ended, so that batches of all sizes occur, with prompts and without. At each number of users
    prompts are first short, then long: together, the attention of a CPU would pad the short ones.
    The engine is warmed up before, since a first use takes longer.

    Args:
        engine: any; it must be idle.
        max_users: about the largest batch to be expected, at most `max_num_seqs`.
        max_prompt_tokens: 2048 or half of `max_model_len`, if that is less, unless given.
        seed: of the lengths and the prompts.
        show_progress: a bar.

    Raises:
        ValueError: the engine is busy, or a number is out of its range.
    """
    if engine.has_unfinished_requests():
        raise ValueError("the engine has unfinished requests; calibrate one that is idle")
    whole_number("max_users", max_users, at_most=engine.config.max_num_seqs)
    longest = min(2048, engine.max_model_len // 2)
    if max_prompt_tokens is not None:
        longest = whole_number(
            "max_prompt_tokens", max_prompt_tokens, at_least=2, at_most=engine.max_model_len - 1
        )
    rng = random.Random(seed)
    levels = sorted({min(2**n, max_users) for n in range(max_users.bit_length() + 1)})
    short, long = (2, max(2, longest // SHORT)), (max(2, longest // SHORT), longest)
    passes = [
        (users, REQUESTS_AT_LEAST + REQUESTS_PER_USER * users, lengths)
        for users in levels
        for lengths in (short, short, long)
    ]
    engine.scheduler.reset_prefix_cache()
    total = sum(count for _, count, _ in passes)
    progress = tqdm(total=total, unit="request", disable=not show_progress, leave=False)
    with progress, _Timer(engine) as timer:
        for users in (max_users, 1):
            _send(timer, users, users + 3, (2, longest), rng)
        timer.steps.clear()
        for users, count, lengths in passes:
            _send(timer, users, count, lengths, rng)
            progress.update(count)
    return _fit(engine, timer.steps)


def _send(
    timer: _Timer, users: int, count: int, prompt_tokens: tuple[int, int], rng: random.Random
) -> None:
    """So many requests of users who wait for each reply before they send the next prompt."""
    engine = timer.engine
    added = ended = 0
    while ended < count:
        began_s = engine.clock()
        while added < min(ended + users, count):
            length = rng.randint(*prompt_tokens)
            prompt = rng.choices(range(engine.model_config.vocab_size), k=length)
            room = engine.max_model_len - length
            params = _exactly(min(rng.randint(*REPLY_TOKENS), room))
            engine.add_request(str(added), prompt, params)
            added += 1
        ended += len(timer.step(began_s))


def _exactly(output_tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=output_tokens,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )


def _since(metrics: RequestMetrics, start_s: float) -> RequestMetrics:
    def since(at_s: float | None) -> float | None:
        return None if at_s is None else at_s - start_s

    return replace(
        metrics,
        arrival_time=metrics.arrival_time - start_s,
        first_scheduled_time=since(metrics.first_scheduled_time),
        token_times=[at_s - start_s for at_s in metrics.token_times],
        finished_time=since(metrics.finished_time),
    )


def _fit(engine: LLMEngine, samples: Sequence[Sample]) -> Calibration:
    step_time = FittedStepTime.fit(samples)
    config = engine.config
    return Calibration(
        model=Path(config.model).name,
        engine=str(engine),
        replica=ReplicaSpec(
            step_time,
            num_blocks=engine.block_pool.num_blocks,
            max_model_len=engine.max_model_len,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
        ),
        errors=step_errors(step_time, samples),
    )


def step_errors(step_time: StepTimeModel, samples: Sequence[Sample]) -> tuple[StepErrors, ...]:
    """By kind of step, how far the model is from what was measured."""
    by_kind: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
    for work, seconds in samples:
        by_kind[next(kind for kind, holds in KINDS.items() if holds(work))].append((work, seconds))
    errors = []
    for kind, steps in by_kind.items():
        if steps:
            measured = np.array([seconds for _, seconds in steps])
            predicted = np.array([step_time.seconds(work) for work, _ in steps])
            relative = np.abs(predicted / measured - 1)
            errors.append(
                StepErrors(
                    kind=kind,
                    steps=len(steps),
                    measured_ms=1e3 * float(measured.mean()),
                    predicted_ms=1e3 * float(predicted.mean()),
                    median_error=float(np.median(relative)),
                    p95_error=float(np.quantile(relative, 0.95)),
                )
            )
    return tuple(errors)


def save_calibration(calibration: Calibration, directory: Path = MEASUREMENTS_DIR) -> Path:
    """Write it among the measurements, as of this device and this day."""
    arguments = {name: getattr(calibration.replica, name) for name in ENGINE_ARGUMENTS}
    rows = [
        {"part": "engine", "model": calibration.model, "engine": calibration.engine, **arguments},
        {"part": "coefficients", **asdict(calibration.step_time)},
        *({"part": "errors", **asdict(errors)} for errors in calibration.errors),
    ]
    measurement = measured_here("calibration", rows)
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])  # wherever it is installed
    return save_measurement(replace(measurement, command=command), calibration.model, directory)


def load_calibration(
    model: str | None = None, *, device: str | None = None, directory: Path = MEASUREMENTS_DIR
) -> Calibration:
    """The latest calibration on record.

    Args:
        model: name of the checkpoint's directory; any if not given.
        device: name of the device as the measurement has it, or a part of it; any if not given.
        directory: where calibrations were saved.

    Raises:
        ValueError: there is none, or its file does not hold one.
    """
    measurements = load_measurements("calibration", directory)
    for measurement in measurements:
        found = _read(measurement)
        if model in (None, found.model) and (device or "") in measurement.device["name"]:
            return found
    wanted = " ".join(filter(None, ["of", model or "any model", "on", device or "any device"]))
    raise ValueError(
        f"no calibration {wanted} is recorded in {directory}; record one with "
        "course calibrate --save"
    )


def _read(measurement: Measurement) -> Calibration:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in measurement.rows:
        fields_ = dict(row)
        rows.setdefault(fields_.pop("part"), []).append(fields_)
    try:
        (engine,), (coefficients,) = rows["engine"], rows["coefficients"]
        return Calibration(
            model=engine.pop("model"),
            engine=engine.pop("engine"),
            replica=ReplicaSpec(FittedStepTime(**coefficients), **engine),
            errors=tuple(StepErrors(**row) for row in rows["errors"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the calibration of {measurement.date} on {measurement.device['name']} cannot be "
            f"read ({error}); record it anew with course calibrate --save"
        ) from None
