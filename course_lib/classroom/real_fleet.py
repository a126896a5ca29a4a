"""Two real servers behind a real Prometheus, and a control loop that looks at them: notebook A4.

    steps = watch(make_autoscaler)

Where the program `prometheus` is not installed, the metrics are those of a recording, and the
autoscaler decides on them as it would have then. The servers run the shipped model, as they did
when the recording was made, whatever `COURSE_MODEL` says. It was made by

    python -m course_lib.classroom.real_fleet
"""

import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from typing import TextIO
from urllib.parse import urlsplit

from course_lib.data import DATA_DIR, DEFAULT_MODEL
from course_lib.fleet.control_loop import (
    Clock,
    ControlLoop,
    LoopDecision,
    NoMetrics,
    SafeAutoscaler,
    read_record,
    replay,
)
from course_lib.fleet.metrics import FleetMetrics
from course_lib.fleet.prometheus import Prometheus, PrometheusError, PrometheusMetrics
from course_lib.fleet.proportional_base import LOAD_METRICS

RECORDING = DATA_DIR / "control_loop" / "two-servers.jsonl"

#: The job by which Prometheus knows the servers.
JOB = {"job": "merchant-chat"}

SERVERS = 2
SEATS = 4  # of each

#: What the loop looks at, one step each: how many customers there are. None: Prometheus is killed.
MOMENTS: dict[str, int | None] = {
    "nobody is there": 0,
    "24 customers": 24,
    "they have gone": 0,
    "Prometheus is gone": None,
}

SCRAPE_INTERVAL_S = 0.5
TIMEOUT_S = 120.0  # on a busy machine

# Longer than it takes Prometheus to see them, and within the model's context.
_REPLY_TOKENS = 3500

MakeAutoscaler = Callable[[Clock], SafeAutoscaler]


def can_run() -> bool:
    """Whether this machine has what the real thing needs."""
    served = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn"))
    return served and shutil.which("prometheus") is not None


def watch(make_autoscaler: MakeAutoscaler) -> list[LoopDecision]:
    """A step of the control loop at each of `MOMENTS`, real or recorded.

    Args:
        make_autoscaler: makes it with a clock; safe, since Prometheus will be gone.
    """
    if can_run():
        return run(make_autoscaler)
    steps = read_record(RECORDING.read_text(encoding="utf-8").splitlines())
    decisions = replay(steps, make_autoscaler)
    return [replace(s, decision=d) for s, d in zip(steps, decisions, strict=True)]


class OrderedFleet:
    """Counts the replicas that were ordered. Two run; the others load for as long as we watch."""

    def __init__(self) -> None:
        self.replicas = SERVERS

    def current_replicas(self) -> int:
        """Those ordered."""
        return self.replicas

    def scale_to(self, replicas: int) -> None:
        """Order so many."""
        self.replicas = replicas


def run(make_autoscaler: MakeAutoscaler, record: TextIO | None = None) -> list[LoopDecision]:
    """The real thing: it starts servers and Prometheus, sends customers, kills Prometheus.

    Args:
        make_autoscaler: see `watch`.
        record: each step is written there.

    Raises:
        TimeoutError: Prometheus did not see what was sent.
    """
    from course_lib.fleet.prometheus_server import PrometheusServer

    with ExitStack() as stack:
        urls = [stack.enter_context(_server()) for _ in range(SERVERS)]
        server = stack.enter_context(PrometheusServer({JOB["job"]: urls}, SCRAPE_INTERVAL_S))
        source = PrometheusMetrics(Prometheus(server.url, timeout_s=30), JOB)
        loop = ControlLoop(source, make_autoscaler, OrderedFleet(), record=record)
        steps = []
        for customers in MOMENTS.values():
            if customers is None:
                server.kill()
                steps.append(loop.step())
                continue
            with _customers(urls, customers // len(urls)):
                _wait_until_seen(source, customers)
                steps.append(loop.step())
        return steps


@contextmanager
def _server() -> Iterator[str]:
    """The URL of a server with the shipped model, which ends with the block."""
    from course_lib.engine.llm import LLM
    from course_lib.serving.admission import AdmissionPolicy
    from course_lib.serving.api import Replica
    from course_lib.serving.server import BackgroundServer

    llm = LLM(DEFAULT_MODEL, max_num_seqs=SEATS)
    admission = AdmissionPolicy(max_num_queued_reqs=100, max_queue_age_s=600)
    with BackgroundServer(Replica(llm, DEFAULT_MODEL.name, admission)) as server:
        yield server.url


@contextmanager
def _customers(urls: list[str], each: int) -> Iterator[None]:
    """So many at each server, who wait for a long reply until the end of the block, then hang up.

    The reply is a stream: who hangs up is noticed, and the request is aborted.
    """
    body = json.dumps(
        {
            "model": DEFAULT_MODEL.name,
            "prompt": "Hello",
            "max_tokens": _REPLY_TOKENS,
            "ignore_eos": True,
            "stream": True,
        }
    )
    with ExitStack() as stack:
        for url in urls:
            for _ in range(each):
                connection = HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
                stack.callback(connection.close)
                connection.request(
                    "POST", "/v1/completions", body, {"Content-Type": "application/json"}
                )
        yield


def _wait_until_seen(source: PrometheusMetrics, customers: int) -> None:
    """Return when Prometheus says what is true: every seat taken, and the others waiting."""
    running = min(customers, SERVERS * SEATS)
    expected = {
        "num_requests_running": running,
        "num_requests_waiting": customers - running,
        "num_replicas_ready": SERVERS,
    }
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        metrics: FleetMetrics
        try:
            metrics = source.read()
        except PrometheusError as error:  # a busy machine
            metrics = NoMetrics(str(error))
        seen = {name: metrics.get(name) for name in expected}
        if seen == expected and all(name in metrics for name in LOAD_METRICS):
            return
        if time.monotonic() > deadline_s:
            raise TimeoutError(
                f"{customers} customers: expected {expected}, Prometheus says {seen}"
            )
        time.sleep(0.05)


def described(metrics: FleetMetrics) -> str:
    """What the load is, in a few words."""
    if not metrics:
        return "no metrics"
    return (
        f"{metrics['num_requests_waiting']:.0f} wait, {metrics['num_requests_running']:.0f} run, "
        f"{metrics['num_replicas_ready']:.0f} servers answer"
    )


def main() -> None:
    """Record the real thing."""
    from course_lib.fleet.proportional import ProportionalAutoscaler

    RECORDING.parent.mkdir(parents=True, exist_ok=True)
    with RECORDING.open("w", encoding="utf-8") as record:
        run(
            lambda clock: SafeAutoscaler(
                ProportionalAutoscaler(min_replicas=SERVERS, max_replicas=8, clock=clock),
                LOAD_METRICS,
            ),
            record,
        )


if __name__ == "__main__":
    main()
