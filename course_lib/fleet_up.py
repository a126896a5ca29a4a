"""`course fleet up`: a fleet on Ray Serve, and a table of it that is drawn anew each second."""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from course_lib.fleet.control_loop import Clock, LoopDecision, SafeAutoscaler
from course_lib.fleet.proportional_base import LOAD_METRICS
from course_lib.fleet.ray_fleet import FleetView, RayFleet, ReplicaView
from course_lib.fleet.ray_serve import FleetConfig

_STATES = {
    "STARTING": "[yellow]starting[/]",
    "RUNNING": "[green]running[/]",
    "STOPPING": "[magenta]draining[/]",
}


def fleet_up(
    config: FleetConfig, autoscaler: Callable[..., Any], console: Console, **settings: Any
) -> None:
    """Keep a fleet up until Ctrl-C or SIGTERM.

    Args:
        config: what it runs on.
        autoscaler: the class that decides, such as `ProportionalAutoscaler`.
        console: where the table is drawn; where it is no terminal, each new decision is a line.
        settings: of the autoscaler.

    Raises:
        OSError: the address or the cluster cannot be used.
        RuntimeError: the replicas did not start.
    """

    def make(clock: Clock) -> SafeAutoscaler:
        rule = autoscaler(
            min_replicas=config.min_replicas, max_replicas=config.max_replicas, clock=clock,
            **settings,
        )  # fmt: skip
        return SafeAutoscaler(rule, LOAD_METRICS)

    logging.disable(logging.INFO)  # Ray tells more than a user wants to know
    with _interrupted_by_sigterm(), console.status("starting") as status:
        try:
            with RayFleet(config, make, status.update) as fleet:
                status.stop()
                console.print(
                    f"serving {config.model.name} on {fleet.url} (Ctrl-C drains and stops)\n"
                    f"load for it: course load --url {fleet.url} --users 48 --requests 400"
                )
                try:
                    _watch(fleet, console)
                finally:
                    status.update("draining and stopping; Ctrl-C again stops at once")
                    status.start()
        except KeyboardInterrupt:
            pass
    console.print("stopped")


def _watch(fleet: RayFleet, console: Console) -> None:
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(as_table(fleet.view()), refresh=True)
                time.sleep(1)
    said = None
    while True:
        last = fleet.view().last
        if last is not None and last.decision.replicas != said:
            console.print(f"{_replicas(last.decision.replicas)}: {last.decision.reason}")
            said = last.decision.replicas
        time.sleep(1)


def as_table(view: FleetView) -> RenderableType:
    """The fleet for a terminal of 80 columns or more."""
    table = Table(box=None, pad_edge=False)
    for name in ("replica", "state", "pid"):
        table.add_column(name, min_width=8)
    for name in ("running", "waiting", "KV cache", "TTFT p95"):
        table.add_column(name, justify="right", min_width=8)
    metrics = dict(view.last.metrics) if view.last else {}
    held = metrics.get("num_requests_waiting", 0) - sum(
        replica.values.get("num_requests_waiting", 0) for replica in view.replicas
    )
    table.add_row("gateway", "", "", "", f"{max(0, held):.0f}")
    for replica in sorted(view.replicas, key=lambda r: r.name):
        table.add_row(*_row(replica))
    table.add_row("[bold]fleet[/]", "", "", *_numbers(metrics))
    return Group("", table, "", _decision(view.last))


def _row(replica: ReplicaView) -> list[str]:
    state = _STATES.get(replica.state, replica.state.lower())
    return [replica.name, state, str(replica.pid or ""), *_numbers(replica.values)]


def _numbers(values: dict[str, float]) -> list[str]:
    forms: dict[str, Callable[[float], str]] = {
        "num_requests_running": "{:.0f}".format,
        "num_requests_waiting": "{:.0f}".format,
        "kv_cache_utilization": "{:.0%}".format,
        "ttft_p95_ms": lambda ms: f"{ms / 1000:.2f} s" if ms else "--",
    }
    return [form(values[name]) if name in values else "--" for name, form in forms.items()]


def _decision(last: LoopDecision | None) -> RenderableType:
    if last is None:
        return Text("no decision yet", style="dim")
    age_s = max(0.0, time.time() - last.time_s)
    before, after = last.current, last.decision.replicas
    what = _replicas(after) if before == after else f"{before} → {_replicas(after)}"
    return f"[bold]{what}[/], decided {age_s:.0f} s ago: {escape(last.decision.reason)}"


def _replicas(count: int) -> str:
    return f"{count} replica{'s' * (count != 1)}"


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM ends as Ctrl-C does."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
