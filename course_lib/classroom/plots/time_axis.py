"""A time axis that counts in what a reader would: seconds, minutes, the time of day, or days.

Data stays in seconds; only ticks and labels change.
"""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MultipleLocator

MINUTE_S, HOUR_S, DAY_S = 60.0, 3600.0, 86_400.0

# Distances between ticks that read well, in seconds.
_STEPS_S = (
    *(step * power for power in (0.001, 0.01, 0.1, 1.0) for step in (1, 2, 5)),
    *(10.0, 15.0, 30.0),
    *(step * MINUTE_S for step in (1, 2, 5, 10, 15, 30)),
    *(step * HOUR_S for step in (1, 2, 3, 4, 6, 12)),
    *(step * DAY_S for step in (1, 2, 5, 7, 14, 30, 365)),
)
_MOST_TICKS = 9


def label_time_axis(ax: Axes, start_s: float, end_s: float, label: str = "time") -> None:
    """Set limits, ticks and label of an x axis whose data are seconds.

    Args:
        ax: the axes; others may share the x axis.
        start_s: where it begins.
        end_s: where it ends.
        label: `time` for that of a trace, whose days begin at midnight; in other words, what
            began at 0.
    """
    unit, write = _unit(end_s, is_clock=label == "time")
    length_s = end_s - start_s
    step_s = next((s for s in _STEPS_S if length_s / s <= _MOST_TICKS), _STEPS_S[-1])
    ax.set_xlim(start_s, end_s)
    ax.xaxis.set_major_locator(MultipleLocator(step_s))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda at_s, _: write(at_s)))
    ax.set_xlabel(unit if unit == "time of day" else f"{label} ({unit})")


def _unit(end_s: float, is_clock: bool) -> tuple[str, Callable[[float], str]]:
    if end_s <= 3 * MINUTE_S:
        return "s", lambda at_s: f"{at_s:g}"
    if end_s <= 3 * HOUR_S:
        return "min", lambda at_s: f"{at_s / MINUTE_S:g}"
    if is_clock and end_s <= 2 * DAY_S:
        return "time of day", clock_time
    if end_s <= 2 * DAY_S:
        return "h", lambda at_s: f"{at_s / HOUR_S:g}"
    return "days", lambda at_s: f"{at_s / DAY_S:g}"


def clock_time(at_s: float) -> str:
    """The hour and minute of the day at so many seconds after midnight."""
    minutes = round(at_s / MINUTE_S)
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def duration(seconds: float) -> str:
    """A time in words short enough for a bar: 35 ms, 4.2 s, 3:05 min."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms" if seconds >= 0.00995 else f"{1000 * seconds:.2g} ms"
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min"
