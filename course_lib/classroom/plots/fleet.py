"""Plots of a fleet over time: load, replicas by state, queues, KV cache, latency, signals.

Each takes the result of a simulation; in several regions, the fleet is drawn as a whole.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from course_lib.classroom.plots.style import COLORS, REPLY_COLORS, caption, stacked_figure
from course_lib.classroom.plots.time_axis import label_time_axis
from course_lib.fleet.results import SimulationResult

#: Of replicas, in every plot. Yellow is what is paid and serves nobody yet.
STATE_COLORS = {
    "ready": "#009E73",
    "draining": "#CC79A7",
    "loading": "#F0E442",
    "standby": "#56B4E9",
}
_STATE_COLUMNS = {
    "ready": "replicas_ready",
    "draining": "replicas_draining",
    "loading": "replicas_loading",
    "standby": "replicas_standby",
}

# Bars of arrivals across an axis: enough for a spike, few enough that chance does not rule.
_BINS = 96


# How the metrics of several regions are those of the fleet. Counts are added up.
_MEANS = ("kv_cache_utilization", "gpu_utilization", "cpu_utilization")
_MAXIMA = ("ttft_p95_ms", "tpot_p95_ms", "queue_age_s")


def plot_fleet(
    result: SimulationResult,
    slo_ttft_s: float | None = None,
    title: str = "The fleet",
    window_s: tuple[float, float] | None = None,
) -> Figure:
    """Draw what came, what served it, and what it was like to wait, on one time axis.

    Args:
        result: of a simulation.
        slo_ttft_s: draw this objective of the time to first token, and mark where it was missed.
        title: what was simulated.
        window_s: draw only this part of the trace, as (start, end).

    Raises:
        ValueError: the result has no samples.
    """
    timeline = fleet_timeline(result)
    start_s, end_s = window_s or (0.0, float(timeline.time_s.iloc[-1]))
    regions = list(result.replicas.region.unique())
    rows = 6 if len(regions) > 1 else 5
    with stacked_figure(rows, [1] * rows, height=1.1 + 1.55 * rows) as (figure, panels):
        arrivals, replicas, *others = panels
        draw_arrivals(arrivals, result.requests, start_s, end_s)
        draw_replicas(replicas, timeline)
        _mark_ends(replicas, result.replicas)
        if len(regions) > 1:
            _draw_regions(others.pop(0), result.replicas, regions, result.duration_s)
        queue, kv_cache, ttft = others
        draw_queue(queue, timeline)
        _draw_running(queue, timeline)
        _draw_kv_cache(kv_cache, timeline)
        _draw_ttft(ttft, timeline, slo_ttft_s)
        label_time_axis(panels[-1], start_s, end_s)
        figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=13)
        figure.align_ylabels(panels)
        note = "" if slo_ttft_s is None else " Shaded: above the objective."
        caption(
            figure,
            "Replicas that load are paid for and serve nobody yet. The time to first token, on a "
            f"logarithmic scale,\nis the p95 of the last minute.{note}",
        )
    return figure


def plot_signals(
    result: SimulationResult,
    slo_ttft_s: float,
    title: str = "Which signal tells?",
    window_s: tuple[float, float] | None = None,
) -> Figure:
    """Draw GPU utilization and CPU percent above queue depth and TTFT: when does each one react?

    Args:
        result: of a simulation.
        slo_ttft_s: objective of the time to first token; where it is missed, all panels are shaded.
        title: what was simulated.
        window_s: draw only this part of the trace, as (start, end).

    Raises:
        ValueError: the result has no samples.
    """
    timeline = fleet_timeline(result)
    start_s, end_s = window_s or (0.0, float(timeline.time_s.iloc[-1]))
    with stacked_figure(4, [1, 1, 1, 1], height=7.0) as (figure, panels):
        gpu, cpu, queue, ttft = panels
        times = timeline.time_s
        gpu.plot(times, 100 * timeline.gpu_utilization, color=REPLY_COLORS[3])
        gpu.set_title("GPU utilization (DCGM_FI_DEV_GPU_UTIL)")
        cpu.plot(times, 100 * timeline.cpu_utilization, color=REPLY_COLORS[4])
        cpu.set_title("CPU")
        for ax in (gpu, cpu):
            ax.set_ylabel("%")
            ax.set_ylim(0, 105)
        draw_queue(queue, timeline)
        _draw_ttft(ttft, timeline, slo_ttft_s)
        for ax in (gpu, cpu, queue):
            shade_misses(ax, timeline, slo_ttft_s)
        label_time_axis(ttft, start_s, end_s)
        figure.align_ylabels(panels)
        figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=13)
        caption(
            figure,
            "Shaded: users wait longer than the objective. A signal is of use if it is high there "
            "and low elsewhere.\nGPU utilization is the share of the time in which a kernel ran, "
            "be it for one request or for a hundred.",
        )
    return figure


def fleet_timeline(result: SimulationResult) -> pd.DataFrame:
    """The metrics of all regions together, one row a scrape.

    Raises:
        ValueError: the result has no samples.
    """
    if result.timeline.empty:
        raise ValueError("the result has no samples; simulate for longer than a scrape interval")
    columns = result.timeline.select_dtypes("number").columns.drop("time_s")
    how = dict.fromkeys(columns, "sum")
    how |= dict.fromkeys(_MEANS, "mean") | dict.fromkeys(_MAXIMA, "max")
    return result.timeline.groupby("time_s", as_index=False).agg(how)


def draw_arrivals(ax: Axes, requests: pd.DataFrame, start_s: float, end_s: float) -> None:
    """Bars of the requests that came, as a rate."""
    counts, edges = np.histogram(requests.arrival_s, bins=_BINS, range=(start_s, end_s))
    width_s = (end_s - start_s) / _BINS
    ax.stairs(counts / width_s, edges, fill=True, color=COLORS["prefill"], alpha=0.75)
    some = "" if counts.sum() == len(requests) else f" of {len(requests):,}"
    ax.set_title(f"Arrivals: {counts.sum():,}{some} requests")
    ax.set_ylabel("requests/s")


def draw_replicas(ax: Axes, timeline: pd.DataFrame) -> None:
    """Replicas by what they do, stacked, and the number that the autoscaler wants."""
    below = np.zeros(len(timeline))
    for state, column in _STATE_COLUMNS.items():
        above = below + timeline[column].to_numpy()
        if state == "ready" or (above > below).any():
            ax.fill_between(
                timeline.time_s, below, above, step="post", color=STATE_COLORS[state],
                linewidth=0, label=state,
            )  # fmt: skip
        below = above
    wanted = timeline.replicas_wanted
    ax.plot(timeline.time_s, wanted, drawstyle="steps-post", color="black", lw=1, label="wanted")
    ax.set_title(f"Replicas: up to {below.max():.0f}")
    ax.set_ylabel("replicas")
    ax.set_ylim(0, 1.1 * max(1, below.max(), wanted.max()))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def draw_queue(ax: Axes, timeline: pd.DataFrame) -> None:
    """Requests that wait, at the gateway and in the replicas."""
    waiting = timeline.num_requests_waiting
    ax.fill_between(timeline.time_s, waiting, color=COLORS["queue"], linewidth=0, label="waiting")
    ax.set_title(f"Queue: up to {waiting.max():,.0f} waiting")
    ax.set_ylabel("requests")
    ax.set_ylim(bottom=0)


def _draw_running(ax: Axes, timeline: pd.DataFrame) -> None:
    running = timeline.num_requests_running
    ax.plot(timeline.time_s, running, color=COLORS["decode"], linewidth=1.2, label="running")
    ax.set_title(f"{ax.get_title(loc='left')}, {running.max():,.0f} running")
    ax.set_ylim(0, 1.05 * max(1, timeline.num_requests_waiting.max(), running.max()))
    _legend(ax)


def _draw_kv_cache(ax: Axes, timeline: pd.DataFrame) -> None:
    used = 100 * timeline.kv_cache_utilization
    ax.plot(timeline.time_s, used, color=COLORS["decode"], linewidth=1.2)
    ax.set_title(f"KV cache in use: up to {used.max():.0f} %")
    ax.set_ylabel("%")
    ax.set_ylim(0, 105)


def _draw_ttft(ax: Axes, timeline: pd.DataFrame, slo_s: float | None) -> None:
    seconds = _ttft_s(timeline)
    ax.plot(timeline.time_s, seconds, color=COLORS["prefill"], linewidth=1.2)
    worst = f": up to {seconds.max():,.3g} s" if seconds.notna().any() else ""
    ax.set_title(f"Time to first token, p95{worst}")
    ax.set_ylabel("s")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    if slo_s is not None:
        ax.axhline(slo_s, color="black", linewidth=1, linestyle="--", label="objective")
        shade_misses(ax, timeline, slo_s)
        _legend(ax)


def _ttft_s(timeline: pd.DataFrame) -> pd.Series:
    """p95 of the last minute; none where there was no first token."""
    return timeline.ttft_p95_ms.where(timeline.ttft_p95_ms > 0) / 1000


def shade_misses(ax: Axes, timeline: pd.DataFrame, slo_s: float) -> None:
    """Shade the times at which the time to first token was above the objective."""
    ax.fill_between(
        timeline.time_s, 0, 1, where=_ttft_s(timeline) > slo_s, step="post",
        color=COLORS["accent"], alpha=0.2, linewidth=0, zorder=0.5,
        transform=ax.get_xaxis_transform(),
    )  # fmt: skip


def _mark_ends(ax: Axes, replicas: pd.DataFrame) -> None:
    """A mark on the upper edge for each replica that was taken away."""
    for reason, marker, label in (("reclaimed", "v", "spot reclaim"), ("outage", "X", "outage")):
        ended_s = replicas.ended_s[replicas.end_reason == reason]
        if len(ended_s):
            ax.plot(
                ended_s, [1.0] * len(ended_s), marker, color=COLORS["accent"], markersize=6,
                transform=ax.get_xaxis_transform(), clip_on=False, linestyle="none",
                label=f"{label} ({len(ended_s)})",
            )  # fmt: skip
    _legend(ax)


def _draw_regions(ax: Axes, replicas: pd.DataFrame, regions: Sequence[str], end_s: float) -> None:
    for color, region in zip(REPLY_COLORS, regions, strict=False):
        own = replicas[(replicas.region == region) & replicas.ready_s.notna()]
        changes = sorted(
            [(at_s, 1) for at_s in own.ready_s]
            + [(at_s, -1) for at_s in own.ended_s.dropna()]
            + [(0.0, 0), (end_s, 0)]
        )
        times, steps = zip(*changes, strict=True)
        ax.step(times, np.cumsum(steps), where="post", color=color, label=region)
    ax.set_title("Replicas in each region, from ready to gone")
    ax.set_ylabel("replicas")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    _legend(ax)


def _legend(ax: Axes) -> None:
    """Beside the panel, where it covers no data."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), fontsize=9, handlelength=1.2)
