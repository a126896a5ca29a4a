"""Plots of the serving edge: a token bucket, the queue, latency under load, who was refused why."""

from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from course_lib.classroom.plots.style import COLORS, REPLY_COLORS, STYLE, caption, stacked_figure
from course_lib.serving.admission_base import TokenBucket
from course_lib.serving.load_report import LoadReport, RequestRecord
from course_lib.serving.scrape import QueueSample

_RUN_COLORS = (COLORS["accent"], COLORS["prefill"], COLORS["decode"])
_REASON_COLORS = (COLORS["accent"], REPLY_COLORS[3], REPLY_COLORS[1], REPLY_COLORS[5])


def plot_token_bucket(
    rate_per_s: float, size: float, costs: Sequence[tuple[float, float]]
) -> Figure:
    """Draw the level of a bucket while requests come.

    Args:
        rate_per_s: tokens that flow in.
        size: tokens that it holds.
        costs: (seconds, cost) of each request, in order.
    """
    now = 0.0
    bucket = TokenBucket(rate_per_s, size, lambda: now)
    levels, served, refused = [(0.0, size)], [], []
    end_s = 1.1 * costs[-1][0] + 1
    for now, cost in costs:
        levels += _filling(bucket, levels[-1][0], now)
        if bucket.wait_s(cost) == 0:
            bucket.take(cost)
            served.append((now, bucket.level))
            levels.append((now, bucket.level))
        else:
            refused.append((now, bucket.level))
    levels += _filling(bucket, levels[-1][0], end_s)
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8.4, 3.4))
        times, tokens = zip(*levels, strict=True)
        ax.fill_between(times, tokens, color=COLORS["prefill"], alpha=0.15, linewidth=0)
        ax.plot(times, tokens, color=COLORS["prefill"])
        ax.axhline(size, color=COLORS["queue"], linewidth=1, linestyle="--")
        if served:
            ax.plot(*zip(*served, strict=True), "o", color=COLORS["prefill"], label="served")
        if refused:
            ax.plot(*zip(*refused, strict=True), "x", color=COLORS["accent"], label="refused")
        ax.set_title(
            f"A bucket of {size:g}, filled at {rate_per_s:g}/s: {len(served)} served, "
            f"{len(refused)} refused"
        )
        ax.set_xlabel("time (s)")
        ax.set_ylabel("tokens in the bucket")
        ax.set_ylim(top=1.25 * size)
        ax.legend(ncols=2, loc="upper right")
        caption(figure, "Dashed: full. What comes in beyond that is lost.")
        plt.close(figure)
    return figure


def _filling(bucket: TokenBucket, start_s: float, end_s: float) -> list[tuple[float, float]]:
    """The level between two requests, with the bend where the bucket is full."""
    full_s = bucket.updated_s + (bucket.size - bucket.level) / bucket.rate_per_s
    level = bucket.level + (end_s - bucket.updated_s) * bucket.rate_per_s
    bend = [(full_s, bucket.size)] if start_s < full_s < end_s else []
    return [*bend, (end_s, min(bucket.size, level))]


def plot_queue(runs: Mapping[str, Sequence[QueueSample]], max_age_s: float | None = None) -> Figure:
    """Draw how many requests waited over time, and how long the oldest one had.

    Args:
        runs: samples of each run, by its name.
        max_age_s: draw this limit of the queue age.

    Raises:
        ValueError: a run has no samples.
    """
    if any(not samples for samples in runs.values()):
        raise ValueError("a run has no samples; watch the server while the load runs")
    with stacked_figure(2, height_ratios=[1, 1]) as (figure, (depths, ages)):
        for color, (name, samples) in zip(_RUN_COLORS, runs.items(), strict=False):
            times = [sample.time_s for sample in samples]
            most = max(sample.num_waiting for sample in samples)
            depths.plot(
                times, [s.num_waiting for s in samples], color=color, label=f"{name}: up to {most}"
            )
            known = [
                (s.time_s, s.oldest_waiting_s) for s in samples if s.oldest_waiting_s is not None
            ]
            if known:
                oldest = max(age for _, age in known)
                label = f"{name}: up to {oldest:.1f} s"
                ages.plot(*zip(*known, strict=True), color=color, label=label)
        depths.set_title("Queue depth")
        depths.set_ylabel("requests")
        ages.set_title("Queue age: how long the oldest one has waited")
        ages.set_ylabel("s")
        ages.set_xlabel("time since the load began (s)")
        if max_age_s is not None:
            ages.axhline(max_age_s, color=COLORS["queue"], linewidth=1, linestyle="--")
        for ax in (depths, ages):
            ax.set_ylim(bottom=0)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(loc="upper left")
        dashed = "" if max_age_s is None else " Dashed: the limit of the policy."
        caption(figure, f"Read from /metrics while the load ran.{dashed}")
    return figure


def plot_back_pressure(reports: Mapping[str, LoadReport]) -> Figure:
    """Draw the time to first token of each request of several runs, side by side on one scale.

    Args:
        reports: by the name of the run.

    Raises:
        ValueError: a report has no requests.
    """
    if any(not report.records for report in reports.values()):
        raise ValueError("a report has no requests; there is nothing to draw")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(reports), sharey=True, figsize=(8.4, 3.8), squeeze=False)
        some_refused = False
        for ax, (name, report) in zip(axes[0], reports.items(), strict=True):
            served = [(r.start_s, r.ttft_s) for r in report.served]
            refused = [r.start_s for r in report.records if r.outcome == "refused"]
            if served:
                times, ttfts = zip(*served, strict=True)
                label = f"served ({len(served)})"
                ax.scatter(times, ttfts, s=14, color=COLORS["prefill"], linewidths=0, label=label)
            if refused:
                some_refused = True
                ax.plot(
                    refused,
                    [-0.03] * len(refused),
                    "x",
                    color=COLORS["accent"],
                    markersize=5,
                    clip_on=False,
                    transform=ax.get_xaxis_transform(),
                    label=f"refused ({len(refused)})",
                )
            slo_s = report.slo.ttft_s
            ax.axhline(slo_s, color=COLORS["queue"], linewidth=1, linestyle="--")
            found = report.latency["ttft"]
            p95 = "" if found is None else f": TTFT p95 {found.p95:.2g} s"
            ax.set_title(f"{name}{p95}")
            ax.set_xlabel("time at which it was sent (s)")
            ax.legend(loc="upper left")
        axes[0][0].set_ylim(bottom=0)
        axes[0][0].set_ylabel("time to first token (s)")
        caption(
            figure,
            f"Dashed: the objective, {slo_s:g} s."
            + (" Crosses below the axis: refused at once." if some_refused else ""),
        )
        plt.close(figure)
    return figure


def plot_outcomes(reports: Mapping[str, LoadReport]) -> Figure:
    """Draw what became of each class of requests: served in time, served late, refused and why.

    Args:
        reports: by the name of the run.
    """
    rows = [
        (f"{name}: {kind}", report.of_class(kind))
        for name, report in reports.items()
        for kind in report.class_names
    ]
    counts = [Counter(_fate(record, report) for record in report.records) for _, report in rows]
    reasons = sorted({fate for count in counts for fate in count} - {_IN_TIME, _LATE})
    colors = {_IN_TIME: REPLY_COLORS[2], _LATE: COLORS["queue"]}
    colors |= {reason: _REASON_COLORS[i % 4] for i, reason in enumerate(reasons)}
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8.4, 1.6 + 0.45 * len(rows)))
        for fate, color in colors.items():
            shown = [count[fate] for count in counts]
            if any(shown):
                lefts = [
                    sum(count[other] for other in list(colors)[: list(colors).index(fate)])
                    for count in counts
                ]
                ax.barh(range(len(rows)), shown, left=lefts, height=0.65, color=color, label=fate)
                for row, (left, width) in enumerate(zip(lefts, shown, strict=True)):
                    if width >= 0.02 * max(map(Counter.total, counts)):  # else no room
                        ax.text(left + width / 2, row, str(width), ha="center", va="center")
        ax.set_yticks(range(len(rows)), labels=[label for label, _ in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("requests")
        ax.set_title("What became of the requests")
        ax.legend(ncols=3, fontsize=9, loc="upper left", bbox_to_anchor=(-0.02, -0.16))
        slo = rows[0][1].slo
        caption(
            figure,
            f"In time: first token within {slo.ttft_s:g} s and {slo.tpot_s:g} s for each token "
            "after it, on average.",
        )
        plt.close(figure)
    return figure


_IN_TIME, _LATE = "served in time", "served late"


def _fate(record: RequestRecord, report: LoadReport) -> str:
    if record.ok:
        return _IN_TIME if record.met(report.slo) else _LATE
    return f"{record.outcome}: {record.reason}"
