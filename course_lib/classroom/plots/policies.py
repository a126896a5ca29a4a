"""Plots that compare runs of a fleet: replicas and queues, what was paid, the price of latency."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from course_lib.classroom.plots.fleet import (
    STATE_COLORS,
    draw_arrivals,
    draw_queue,
    draw_replicas,
    fleet_timeline,
    shade_misses,
)
from course_lib.classroom.plots.style import COLORS, STYLE, caption
from course_lib.classroom.plots.time_axis import label_time_axis
from course_lib.fleet.results import SimulationResult
from course_lib.fleet.search import SearchResult

# Dark enough for a line on white, and told apart by colour-blind readers.
POLICY_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

#: Of paid GPU-hours: what serves is dark green, what could and does not a lighter one.
COST_COLORS = {
    "serving": STATE_COLORS["ready"],
    "idle": "#9fdcc6",
    "loading": STATE_COLORS["loading"],
    "standby": STATE_COLORS["standby"],
}

#: What `plot_policies` counts, with the key of the summary and how it is written.
COUNTS = {
    "replicas started": ("starts", "{:,.0f}"),
    "reversals": ("reversals", "{:,.0f}"),
    "queue-seconds": ("queue_s", "{:,.0f}"),
    "USD": ("usd", "{:,.2f}"),
}


def plot_policies(
    results: Mapping[str, SimulationResult],
    title: str = "The same trace under different policies",
    window_s: tuple[float, float] | None = None,
) -> Figure:
    """Draw replicas and queue of several runs over time, and count what each run cost.

    Args:
        results: by the name of the policy, of one trace; at most 6.
        title: what was compared.
        window_s: draw only this part of the trace, as (start, end). The counts are of all of it.

    Raises:
        ValueError: there are none, or more than can be told apart.
    """
    if not 1 <= len(results) <= len(POLICY_COLORS):
        raise ValueError(f"draw 1 to {len(POLICY_COLORS)} policies at once, got {len(results)}")
    colors = dict(zip(results, POLICY_COLORS, strict=False))
    timelines = {name: fleet_timeline(result) for name, result in results.items()}
    end_s = max(float(timeline.time_s.iloc[-1]) for timeline in timelines.values())
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(8.4, 5.6 + 0.22 * len(results)))
        grid = figure.add_gridspec(3, len(COUNTS), height_ratios=[1, 1, 0.3 + 0.14 * len(results)])
        replicas = figure.add_subplot(grid[0, :])
        queue = figure.add_subplot(grid[1, :], sharex=replicas)
        for name, timeline in timelines.items():
            paid = timeline.replicas_ready + timeline.replicas_loading
            color, waiting = colors[name], timeline.num_requests_waiting
            replicas.plot(timeline.time_s, paid, drawstyle="steps-post", color=color, label=name)
            queue.plot(timeline.time_s, waiting, color=color, label=name)
        replicas.set_title("Replicas, ready and loading")
        replicas.set_ylabel("replicas")
        replicas.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        replicas.tick_params(labelbottom=False)
        replicas.set_ylim(bottom=0)
        queue.set_title("Queue")
        queue.set_ylabel("requests waiting")
        queue.set_ylim(bottom=0)
        label_time_axis(queue, *(window_s or (0.0, end_s)))
        _draw_counts(
            [figure.add_subplot(grid[2, column]) for column in range(len(COUNTS))], results, colors
        )
        figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=13)
        caption(
            figure,
            "A reversal is a change up after one down, or down after one up. Queue-seconds are\n"
            "the seconds that all requests waited, added up. Bars have the colours of the lines.",
        )
        plt.close(figure)
    return figure


def _draw_counts(
    panels: list[Axes], results: Mapping[str, SimulationResult], colors: Mapping[str, str]
) -> None:
    """A row of bars for each count, which are the legend of the lines as well."""
    for ax, (title, (key, form)) in zip(panels, COUNTS.items(), strict=True):
        counts = [float(result.summary()[key]) for result in results.values()]
        rows = range(len(counts))
        ax.barh(rows, counts, height=0.7, color=list(colors.values()))
        for row, count in enumerate(counts):
            ax.text(count, row, f" {form.format(count)}", va="center", fontsize=9)
        ax.set_title(title, fontsize=10)
        ax.set_xlim(0, 1.6 * max(*counts, 1e-9))
        ax.set_xticks([])
        ax.set_yticks(rows, labels=list(results) if ax is panels[0] else [])
        ax.set_ylim(len(counts) - 0.5, -0.5)
        ax.grid(visible=False)
        ax.spines["bottom"].set_visible(False)
        ax.tick_params(length=0)


def plot_autoscaling(result: SimulationResult, slo_ttft_s: float, title: str) -> Figure:
    """Draw what came, the replicas that it was met with, who waited, and what was paid.

    Args:
        result: of a simulation in one region.
        slo_ttft_s: objective of the time to first token; where it is missed is shaded.
        title: what was simulated.

    Raises:
        ValueError: the result has no samples.
    """
    timeline = fleet_timeline(result)
    end_s = float(timeline.time_s.iloc[-1])
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(8.4, 6.2))
        grid = figure.add_gridspec(4, 1, height_ratios=[1, 1.2, 1, 0.32])
        arrivals = figure.add_subplot(grid[0])
        replicas, queue = (figure.add_subplot(grid[row], sharex=arrivals) for row in (1, 2))
        draw_arrivals(arrivals, result.requests, 0.0, end_s)
        draw_replicas(replicas, timeline)
        draw_queue(queue, timeline)
        for ax in (arrivals, replicas):
            ax.tick_params(labelbottom=False)
        for ax in (replicas, queue):
            shade_misses(ax, timeline, slo_ttft_s)
        label_time_axis(queue, 0.0, end_s)
        paid = figure.add_subplot(grid[3])
        _draw_gpu_hours(paid, {"": result})
        paid.set_title("What was paid")
        figure.legend(
            *replicas.get_legend_handles_labels(), loc="outside upper right", fontsize=9, ncols=6,
            handlelength=1.2,
        )  # fmt: skip
        paid.legend(
            loc="lower right", bbox_to_anchor=(1.0, 0.9), fontsize=9, ncols=4, handlelength=1.2
        )
        figure.align_ylabels([arrivals, replicas, queue])
        figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=13)
        caption(
            figure,
            f"Shaded: the p95 TTFT of the last minute is above {slo_ttft_s:g} s.",
        )
        plt.close(figure)
    return figure


def plot_cost(
    results: SimulationResult | Mapping[str, SimulationResult], title: str = "What was paid"
) -> Figure:
    """Draw the GPU-hours of each run by what the replicas did, with the dollars beside.

    Args:
        results: of one run, or of several by name.
        title: what was compared.
    """
    runs = results if isinstance(results, Mapping) else {"": results}
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8.4, 1.7 + 0.42 * len(runs)))
        _draw_gpu_hours(ax, runs)
        ax.set_title(title)
        figure.legend(loc="outside right center", fontsize=9, handlelength=1.2)
        caption(figure, "Serving: a batch was computed. Idle: ready, and nothing to compute.")
        plt.close(figure)
    return figure


def _draw_gpu_hours(ax: Axes, runs: Mapping[str, SimulationResult]) -> None:
    """A bar for each run: its GPU-hours by what the replicas did, and its dollars at the end."""
    totals = [sum(result.gpu_hours.values()) for result in runs.values()]
    lefts = [0.0] * len(runs)
    for state, color in COST_COLORS.items():
        hours = [result.gpu_hours[state] for result in runs.values()]
        if any(hours):
            ax.barh(
                range(len(runs)), hours, left=lefts, height=0.65, color=color, label=state,
                edgecolor="white", linewidth=0.5,
            )  # fmt: skip
        for row, (left, width) in enumerate(zip(lefts, hours, strict=True)):
            if width >= 0.07 * max(totals):  # else no room
                ink = "white" if state == "serving" else "black"
                middle = left + width / 2
                ax.text(middle, row, f"{width:.3g}", ha="center", va="center", color=ink)
        lefts = [left + width for left, width in zip(lefts, hours, strict=True)]
    for row, (left, result) in enumerate(zip(lefts, runs.values(), strict=True)):
        ax.text(left, row, f"  \\${result.usd:,.2f}", va="center", weight="bold")
    ax.set_xlim(0, 1.15 * max(*totals, 1e-9))
    ax.set_yticks(range(len(runs)), labels=list(runs))
    ax.set_ylim(len(runs) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("GPU-hours")


def plot_frontier(found: SearchResult, title: str = "The price of latency") -> Figure:
    """Draw each policy's dollars against its p95 TTFT, and the frontier of those worth a thought.

    Args:
        found: of a search.
        title: what was searched.
    """
    slo_ttft_s = found.objective.ttft_p95_s
    table = found.table.dropna(subset=["ttft_p95_s"])  # without those that served nobody
    best = found.frontier
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8.4, 4.6))
        ax.axhspan(1e-9, slo_ttft_s, color=STATE_COLORS["ready"], alpha=0.1, linewidth=0)
        ax.axhline(slo_ttft_s, color="black", linewidth=1, linestyle="--", label="objective")
        ax.step(best.usd, best.ttft_p95_s, where="post", color=COLORS["prefill"], label="frontier")
        for met, marker, label in ((True, "o", "objectives met"), (False, "x", "missed")):
            shown = table[table.met == met]
            if len(shown):
                color = STATE_COLORS["ready"] if met else COLORS["accent"]
                ax.plot(
                    shown.usd, shown.ttft_p95_s, marker, color=color, linestyle="none", label=label
                )
        ax.set_yscale("log")
        ax.set_ylim(
            0.6 * min(table.ttft_p95_s.min(), slo_ttft_s),
            1.6 * max(table.ttft_p95_s.max(), slo_ttft_s),
        )
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("dollars")
        ax.set_ylabel("time to first token, p95 (s)")
        ax.set_title(title)
        _name_points(ax, best)
        figure.legend(loc="outside right upper", fontsize=9, handlelength=1.4)
        caption(
            figure,
            "Shaded: within the objective. Numbers: policies than which none is both "
            "cheaper and faster.",
        )
        plt.close(figure)
    return figure


def _name_points(ax: Axes, best: pd.DataFrame) -> None:
    """A number at each point of the frontier, and its policy in the legend."""
    for number, policy in enumerate(best.itertuples(), 1):
        ax.annotate(
            f"{number}", (policy.usd, policy.ttft_p95_s), xytext=(5, 5),
            textcoords="offset points", fontsize=9,
        )  # fmt: skip
        ax.plot(
            [], [], linestyle="none", marker=f"${number}$", color="black", label=str(policy.policy)
        )
