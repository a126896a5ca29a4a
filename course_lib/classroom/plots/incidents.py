"""Plots of an incident: the request's phases, and what the fleet's metrics said meanwhile."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from course_lib.classroom.incidents.records import Incident, TimeSeries
from course_lib.classroom.plots.fleet import STATE_COLORS
from course_lib.classroom.plots.style import COLORS, REPLY_COLORS, STYLE, caption

PHASE_COLORS = {
    "lost": "#CC79A7",
    "gateway": "#56B4E9",
    "cold_start": "#F0E442",
    "queue": COLORS["queue"],
    "prefill": COLORS["prefill"],
    "decode": COLORS["decode"],
}


def plot_incident(incident: Incident, phases: Mapping[str, float]) -> Figure:
    """Draw where the request's time went, above the replicas' lives, their queues and KV caches.

    Args:
        incident: the record.
        phases: seconds of each phase in their order, as `split_timeline` gives them.
    """
    request = incident.request
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            4, 1, sharex=True, figsize=(8.4, 7.6), height_ratios=[0.7, 1.1, 1, 1]
        )
        _draw_phases(axes[0], phases)
        axes[0].set_title(
            f"{incident.name}: phases of the slow request, TTFT {request.ttft_s:.3g} s"
        )
        _draw_lives(axes[1], incident)
        colors = dict(zip(incident.replicas, REPLY_COLORS * 3, strict=False))
        _draw_gauge(axes[2], incident, colors, "vllm:num_requests_waiting")
        axes[2].set_title("Requests waiting in the replicas (vllm:num_requests_waiting)")
        axes[2].set_ylabel("requests")
        axes[2].set_ylim(bottom=0)
        _draw_gauge(axes[3], incident, colors, "vllm:kv_cache_usage_perc")
        axes[3].set_title("KV cache in use (vllm:kv_cache_usage_perc)")
        axes[3].set_ylabel("share")
        axes[3].set_ylim(0, 1.05)
        for ax in axes[1:]:
            ax.axvspan(0, request.ttft_s, color=COLORS["accent"], alpha=0.15, linewidth=0)
        axes[3].set_xlabel("time since the slow request arrived (s)")
        caption(
            figure,
            "Shaded: the wait for the first token. Thick: the replica that answered. A triangle is "
            "a change that\nthe autoscaler asked for, up or down.",
        )
        plt.close(figure)
    return figure


def _draw_phases(ax: Axes, phases: Mapping[str, float]) -> None:
    left = 0.0
    for name, seconds in phases.items():
        if seconds > 0:
            label = f"{name.replace('_', ' ')} {seconds:.3g} s"
            ax.barh(0, seconds, left=left, height=0.6, color=PHASE_COLORS[name], label=label)
            left += seconds
    ax.set_yticks([])
    ax.set_ylim(-0.5, 0.5)
    ax.grid(visible=False)
    ax.legend(
        loc="upper left", bbox_to_anchor=(0, -0.02), ncols=5, fontsize=8, handlelength=1,
        columnspacing=1.2,
    )  # fmt: skip


def _draw_lives(ax: Axes, incident: Incident) -> None:
    times_s = incident.fleet["queue_age_s"].times_s
    begin_s, end_s = times_s[0], max(times_s[-1], incident.request.finished_s)
    for row, log in enumerate(incident.replicas.values()):
        height = 0.8 if log.name == incident.request.replica else 0.4
        over_s = end_s if log.ended_s is None else log.ended_s
        ready_s = over_s if log.ready_s is None else log.ready_s
        for start_s, stop_s, color in (
            (max(begin_s, log.started_s), ready_s, STATE_COLORS["loading"]),
            (max(begin_s, ready_s), over_s, STATE_COLORS["ready"]),
        ):
            if stop_s > start_s:
                ax.barh(row, stop_s - start_s, left=start_s, height=height, color=color)
        if log.end_reason == "reclaimed":
            ax.plot(over_s, row, "x", color="black", markersize=8)
    rows = len(incident.replicas)
    for decision in incident.decisions:
        up = decision.wanted > decision.current
        ax.plot(decision.time_s, rows - 0.2, "^" if up else "v", color="black", markersize=5)
    ax.set_yticks(range(rows), labels=list(incident.replicas))
    ax.set_ylim(-0.6, rows + 0.2)
    ax.set_xlim(begin_s, end_s + 0.02 * (end_s - begin_s))
    ax.grid(axis="y", visible=False)
    ax.set_title("Lives of the replicas")
    handles: list[Any] = [
        Patch(color=STATE_COLORS["loading"], label="loading"),
        Patch(color=STATE_COLORS["ready"], label="in rotation"),
    ]
    for marker, label, there in (
        ("^", "autoscaler: up", any(d.wanted > d.current for d in incident.decisions)),
        ("v", "autoscaler: down", any(d.wanted < d.current for d in incident.decisions)),
        ("x", "reclaimed", any(r.end_reason == "reclaimed" for r in incident.replicas.values())),
    ):
        if there:
            handles.append(Line2D([], [], marker=marker, color="black", ls="", label=label))
    ax.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.05), fontsize=8, handlelength=1.2
    )


def _draw_gauge(ax: Axes, incident: Incident, colors: Mapping[str, str], name: str) -> None:
    for log in incident.replicas.values():
        series: TimeSeries | None = log.metrics.get(name)
        if series is not None:
            own = log.name == incident.request.replica
            ax.plot(
                series.times_s, series.values, drawstyle="steps-post", color=colors[log.name],
                linewidth=2.2 if own else 1.0, label=log.name,
            )  # fmt: skip
    if ax.get_legend_handles_labels()[0]:  # beside the panel, where it covers no data
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), fontsize=8, handlelength=1.2)
