"""Plots of a cold start: its phases as a waterfall, and what it costs through a night."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from course_lib.classroom.plots.style import COLORS, REPLY_COLORS, STYLE, caption
from course_lib.classroom.plots.time_axis import duration, label_time_axis

# Phases and starts that can still be read.
_MOST_ROWS = 24

# A phase has the same colour in every picture; those without one of their own take others in turn.
_PHASE_COLORS = dict(
    zip(("disk_read", "host_copy", "device_copy", "warm_up"), REPLY_COLORS, strict=False)
)
_OTHER_COLORS = (*REPLY_COLORS[4:], COLORS["accent"], COLORS["queue"], "#BBBBBB", "#666666")


def plot_waterfall(
    starts: Mapping[str, Mapping[str, float]], title: str = "Where a cold start spends its time"
) -> Figure:
    """Draw each phase on a line of its own, beginning where the one before it ends.

    Args:
        starts: seconds of each phase in their order, by the name of the start; one panel each, all
            on the same scale.
        title: what is drawn.

    Raises:
        ValueError: there are none, too many for a picture, or all of them take no time.
    """
    num_rows = sum(len(phases) for phases in starts.values())
    end_s = max((sum(phases.values()) for phases in starts.values()), default=0.0)
    if not 1 <= num_rows <= _MOST_ROWS or end_s <= 0:
        raise ValueError(
            f"draw 1 to {_MOST_ROWS} phases at once, of which one takes time; got {num_rows}"
        )
    names = list(dict.fromkeys(name for phases in starts.values() for name in phases))
    others = [name for name in names if name not in _PHASE_COLORS]
    colors = _PHASE_COLORS | dict(zip(others, cycle(_OTHER_COLORS), strict=False))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(starts), 1, sharex=True, squeeze=False,
            figsize=(8.4, 1.3 + 0.45 * len(starts) + 0.3 * num_rows),
            height_ratios=[len(phases) + 0.6 for phases in starts.values()],
        )  # fmt: skip
        for ax, (name, phases) in zip(axes[:, 0], starts.items(), strict=True):
            _draw_waterfall(ax, phases, colors, 1.22 * end_s)
            ax.set_title(f"{name}: {duration(sum(phases.values()))}", fontsize=10)
        label_time_axis(axes[-1, 0], 0.0, 1.22 * end_s, "time since it began")
        for ax in axes[:-1, 0]:
            ax.set_xlabel("")
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        caption(
            figure, "Each bar begins where the one above it ends. Behind it: its time, its share."
        )
        plt.close(figure)
    return figure


def _draw_waterfall(
    ax: Axes, phases: Mapping[str, float], colors: Mapping[str, str], end_s: float
) -> None:
    total_s, begin_s = sum(phases.values()), 0.0
    for row, (name, seconds) in enumerate(phases.items()):
        ax.barh(row, seconds, left=begin_s, height=0.7, color=colors[name])
        if row:
            ax.plot([begin_s] * 2, [row - 1.35, row + 0.35], color="#999999", linewidth=0.8)
        begin_s += seconds
        share = f", {seconds / total_s:.0%}" if total_s else ""
        ax.text(
            begin_s + 0.008 * end_s, row, f"{duration(seconds)}{share}", va="center", fontsize=9
        )
    ax.set_yticks(range(len(phases)), labels=[name.replace("_", " ") for name in phases])
    ax.set_ylim(len(phases) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def plot_night_cost(
    requests: Sequence[int],
    shares: Mapping[str, Sequence[float]],
    title: str = "Coming when called, against staying all night",
) -> Figure:
    """Draw what a night on call costs by how many requests come, and where staying is cheaper.

    Args:
        requests: requests a night, ascending.
        shares: for each kind of replica, the price of such nights over that of one that stays.
        title: what is drawn.

    Raises:
        ValueError: there are fewer than two numbers of requests, or a curve has other lengths.
    """
    if len(requests) < 2 or any(len(curve) != len(requests) for curve in shares.values()):
        raise ValueError("give two or more numbers of requests, and a share for each of them")
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8.4, 4.2))
        for color, (name, curve) in zip(REPLY_COLORS, shares.items(), strict=False):
            ax.plot(requests, curve, color=color, linewidth=2, marker="o", markersize=4, label=name)
        ax.axhline(1, color=COLORS["accent"], linewidth=1.5, linestyle="--")
        ax.text(requests[0], 1.01, "staying", va="bottom", fontsize=9, color=COLORS["accent"])
        ax.set_xscale("log")
        ax.set_xticks(requests, labels=[f"{count:g}" for count in requests])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.set_xlabel("requests a night, at random times")
        ax.set_ylabel("price of the night,\nstaying is 100 %")
        ax.set_title(title)
        ax.legend(loc="upper left", bbox_to_anchor=(0, 0.9))
        caption(
            figure,
            "The horizontal axis is logarithmic. Below the dashed line coming when called is "
            "cheaper, above it staying.",
        )
        plt.close(figure)
    return figure
