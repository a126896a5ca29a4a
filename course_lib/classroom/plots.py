"""The plots of the notebooks, in one style.

Each function takes what the engine measured and returns a finished figure with title, units and a
caption, which a notebook shows by naming it in the last line of a cell. Colours mean the same in
every plot, and can be told apart by colour-blind readers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course_lib.engine.request import RequestMetrics

# Of the palette by Okabe and Ito, https://jfly.uni-koeln.de/color/
COLORS = {"queue": "#999999", "prefill": "#0072B2", "decode": "#E69F00", "accent": "#D55E00"}

STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
}


def plot_request_timeline(metrics: RequestMetrics, title: str = "One request") -> Figure:
    """Draw where the time of a finished request went: queue, prefill, each decoded token.

    Above, the phases on an axis of milliseconds since the request arrived; below, on the same
    axis, how long each token after the first took.

    Raises:
        ValueError: the request has no tokens yet.
    """
    if metrics.first_scheduled_time is None or not metrics.token_times:
        raise ValueError("the request has no tokens yet; draw its timeline when it has finished")
    scheduled, *tokens = (
        1000 * (time - metrics.arrival_time)
        for time in [metrics.first_scheduled_time, *metrics.token_times]
    )
    phases = {
        "queue": (0.0, scheduled),
        "prefill": (scheduled, tokens[0]),
        "decode": (tokens[0], tokens[-1]),
    }
    with _figure(2, height_ratios=[1.2, 1]) as (figure, (lanes, latencies)):
        _draw_phases(lanes, phases, tokens)
        lanes.set_title(f"{title}: where the time went")
        _draw_token_latencies(latencies, tokens)
        latencies.set_xlabel("time since the request arrived (ms)")
        latencies.set_xlim(-0.01 * tokens[-1], 1.01 * tokens[-1])
        _caption(
            figure,
            "Each white line is a token. TTFT, the time to first token, is queue and prefill;\n"
            "TPOT, the time per output token, is the mean of the bars. "
            "Prefill computes all tokens of the prompt, a decode step one.",
        )
    return figure


def _draw_phases(ax: Axes, phases: dict[str, tuple[float, float]], tokens: list[float]) -> None:
    for lane, (name, (start, end)) in enumerate(phases.items()):
        ax.barh(lane, end - start, left=start, height=0.6, color=COLORS[name])
    ax.vlines(tokens[:-1], len(phases) - 1.3, len(phases) - 0.7, color="white", linewidth=0.8)
    ax.axvline(tokens[0], color=COLORS["accent"], linewidth=1.2)
    ax.text(tokens[0], 0, f"  TTFT {_ms(tokens[0])}", color=COLORS["accent"], va="center")
    ax.set_yticks(
        range(len(phases)),
        labels=[f"{name}  {_ms(end - start)}" for name, (start, end) in phases.items()],
    )
    ax.set_ylim(len(phases) - 0.5, -0.5)  # the first phase on top
    ax.grid(axis="y", visible=False)


def _draw_token_latencies(ax: Axes, tokens: list[float]) -> None:
    ax.set_title("Time of each token after the first")
    ax.set_ylabel("ms")
    ax.grid(axis="x", visible=False)
    gaps = [later - earlier for earlier, later in pairwise(tokens)]
    if gaps:
        tpot = sum(gaps) / len(gaps)
        ax.bar(tokens[:-1], gaps, width=gaps, align="edge", color=COLORS["decode"], edgecolor="w")
        ax.axhline(tpot, color=COLORS["accent"], linewidth=1.2)
        ax.set_title(f"TPOT {_ms(tpot)}", loc="right", color=COLORS["accent"], weight="normal")


def _ms(value: float) -> str:
    """A time in milliseconds with two significant digits, or all of them from 10 on."""
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2g} ms"


@contextmanager
def _figure(rows: int, height_ratios: list[float]) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of panels under each other on one x axis, closed so that it is shown once."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, 1, sharex=True, figsize=(8.4, 4.4), height_ratios=height_ratios
        )
        yield figure, list(axes)
        plt.close(figure)


def _caption(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=9, color="#555555", x=0.01, ha="left")
