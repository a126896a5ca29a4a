"""The plot of a forecast: what is expected, what came, and how far ahead a cold start looks."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from course_lib.classroom.plots.fleet import STATE_COLORS
from course_lib.classroom.plots.style import COLORS, STYLE, caption
from course_lib.classroom.plots.time_axis import clock_time, label_time_axis


def plot_forecast(
    forecast: Sequence[float],
    step_s: float,
    ready_time_s: float,
    at_s: float,
    arrivals_s: Sequence[float] = (),
    window_s: tuple[float, float] | None = None,
    title: str = "The forecast",
) -> Figure:
    """Draw the load expected in each step, and what of it counts at one moment.

    Args:
        forecast: requests/s in each step, from time 0 on.
        step_s: length of a step.
        ready_time_s: of a replica that is started.
        at_s: the moment from which to look ahead so far.
        arrivals_s: of the requests that really came.
        window_s: draw only this part, as (start, end).
        title: what is drawn.

    Raises:
        ValueError: the forecast does not reach as far as one looks.
    """
    end_s = step_s * len(forecast)
    if not 0 <= at_s <= at_s + ready_time_s < end_s:
        raise ValueError(
            f"{at_s:g} s and {ready_time_s:g} s later must lie within the forecast of {end_s:g} s"
        )
    edges = step_s * np.arange(len(forecast) + 1)
    first, last = int(at_s // step_s), int((at_s + ready_time_s) // step_s)
    highest = max(forecast[first : last + 1])
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8.4, 3.6))
        if len(arrivals_s):
            counts, _ = np.histogram(arrivals_s, bins=edges)
            ax.stairs(
                counts / step_s, edges, fill=True, color=COLORS["queue"], alpha=0.4, label="came"
            )
        ax.stairs(forecast, edges, color=COLORS["prefill"], linewidth=1.6, label="expected")
        ax.axvspan(
            at_s, at_s + ready_time_s, color=STATE_COLORS["loading"], alpha=0.5, linewidth=0,
            label=f"a start at {clock_time(at_s)}\nloads for {ready_time_s:,.0f} s",
        )  # fmt: skip
        ax.hlines(
            highest, at_s, at_s + ready_time_s, color=COLORS["accent"], linewidth=2.5,
            label=f"most until then:\n{highest:.2f} requests/s",
        )  # fmt: skip
        ax.set_ylabel("requests/s")
        ax.set_ylim(bottom=0)
        ax.set_title(title)
        label_time_axis(ax, *(window_s or (0.0, end_s)))
        figure.legend(loc="outside right center", fontsize=9, handlelength=1.4)
        caption(
            figure,
            f"Yellow: a replica that is started at {clock_time(at_s)} loads. Red: the highest load "
            "expected until it is ready.",
        )
        plt.close(figure)
    return figure
