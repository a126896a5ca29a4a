"""Plots of what a load generator measured."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course_lib.classroom.plots.style import COLORS, caption, stacked_figure
from course_lib.serving.load_report import LoadReport, RequestRecord


def plot_latency_over_time(report: LoadReport, title: str | None = None) -> Figure:
    """Draw TTFT and end-to-end time of each request at the moment it was sent.

    Requests that were refused or failed stand as marks at the bottom, so that a quiet stretch of
    the curve cannot be mistaken for a good one.

    Args:
        report: of a run.
        title: instead of the model's name.

    Raises:
        ValueError: the report has no requests.
    """
    if not report.records:
        raise ValueError("the report has no requests; there is nothing to draw")
    latency = report.latency
    with stacked_figure(2, height_ratios=[1, 1]) as (figure, panels):
        for ax, name, label, color in zip(
            panels,
            ("ttft", "e2e"),
            ("Time to first token", "End to end"),
            (COLORS["prefill"], COLORS["decode"]),
            strict=True,
        ):
            served = report.served
            times_s = [r.ttft_s or 0.0 if name == "ttft" else r.e2e_s for r in served]
            ax.plot([r.start_s for r in served], times_s, "o", markersize=3.5, color=color)
            found = latency[name]
            if found is not None:
                ax.axhline(found.p95, color=color, linewidth=1.2, linestyle="--")
                ax.set_title(f"p95 {found.p95:.3g} s", loc="right", weight="normal")
            ax.set_ylim(0, 1.15 * max(times_s, default=1.0))
            ax.set_ylabel("s")
            ax.set_title(label)
            _mark(ax, [r for r in report.records if r.outcome == "refused"], "x", "refused")
            failed = [r for r in report.records if r.outcome not in ("ok", "refused")]
            _mark(ax, failed, "v", "failed")
        slo_s = report.slo.ttft_s
        if latency["ttft"] is not None and slo_s <= panels[0].get_ylim()[1]:
            panels[0].axhline(slo_s, color=COLORS["queue"], linewidth=1.2)
            panels[0].text(0, slo_s, " objective", color="#555555", va="bottom", fontsize=9)
        panels[1].set_xlabel("time since the run began (s)")
        served_count, count = len(report.served), len(report.records)
        figure.suptitle(
            f"{title or report.model}: {served_count} of {count} requests served, "
            f"{report.goodput().share:.0%} within the SLO",
            x=0.01, ha="left", weight="bold",
        )  # fmt: skip
        handles, labels = panels[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, ncols=2, loc="lower right")
        caption(
            figure,
            "Each dot is a request, at the time it was sent. Dashed: the 95th percentile.\n"
            "Marks at the bottom are requests that have no latency, as they were not served.",
        )
    return figure


def _mark(ax: Axes, records: list[RequestRecord], marker: str, label: str) -> None:
    if not records:
        return
    ax.plot(
        [record.start_s for record in records],
        [0.03] * len(records),
        marker,
        color=COLORS["accent"],
        label=f"{label} ({len(records)})",
        markersize=5,
        transform=ax.get_xaxis_transform(),
        clip_on=False,
    )
