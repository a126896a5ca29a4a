"""Plots of waiting: a cold start by its phases, and requests from arrival to the last token."""

from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from course_lib.classroom.plots.fleet import STATE_COLORS
from course_lib.classroom.plots.style import COLORS, STYLE, caption
from course_lib.classroom.plots.time_axis import HOUR_S, clock_time, duration, label_time_axis
from course_lib.fleet.results import SimulationResult

#: Phases of a cold start: shades of the colour that loading has, in their order.
COLD_START_COLORS = {
    "node_provisioning": "#fbf4b4",
    "container_pull": "#F0E442",
    "weight_loading": "#c9a800",
    "runtime_warm_up": "#7a6200",
}

#: What a request goes through, in order.
SPAN_COLORS = {
    "queue at the gateway": "#666666",
    "cold start": STATE_COLORS["loading"],
    "queue at the replica": "#bbbbbb",
    "prefill": COLORS["prefill"],
    "decode": COLORS["decode"],
}

# Rows that can still be read.
MOST_ROWS = 24


@dataclass(frozen=True)
class Span:
    """A part of a request's life, in seconds since its arrival."""

    phase: str
    start_s: float
    end_s: float


def request_spans(result: SimulationResult, index: int) -> list[Span]:
    """Where the time of a request went.

    Waiting at the gateway counts as cold start while the replica that served it was still starting.

    Args:
        result: of a simulation.
        index: of the request in `result.requests`.

    Raises:
        ValueError: the request got no token.
    """
    request = result.requests.loc[index]
    if pd.isna(request.first_token_s):
        raise ValueError(f"request {index} got no token: it was {request.status}, {request.reason}")
    replica = result.replicas.set_index("name").loc[request.replica]
    phases_s = sum(float(replica.get(f"{phase}_s", 0.0)) or 0.0 for phase in COLD_START_COLORS)
    loaded_s = replica.started_s + (0.0 if pd.isna(phases_s) else phases_s)
    arrival_s, dispatched_s = request.arrival_s, request.dispatched_s
    cold_s = min(max(replica.started_s, arrival_s), dispatched_s)
    warm_s = min(max(loaded_s, cold_s), dispatched_s)
    parts = [
        ("queue at the gateway", arrival_s, cold_s),
        ("cold start", cold_s, warm_s),
        ("queue at the gateway", warm_s, dispatched_s),
        ("queue at the replica", dispatched_s, request.scheduled_s),
        ("prefill", request.scheduled_s, request.first_token_s),
        ("decode", request.first_token_s, request.finished_s),
    ]
    return [Span(name, a - arrival_s, b - arrival_s) for name, a, b in parts if b > a]


def spans_of(phase_seconds: Mapping[str, float]) -> list[Span]:
    """Spans that follow one another, from their lengths."""
    spans, end_s = [], 0.0
    for phase, seconds in phase_seconds.items():
        spans.append(Span(phase, end_s, end_s + seconds))
        end_s += seconds
    return spans


def plot_request_spans(
    requests: Mapping[str, list[Span] | Mapping[str, float]], title: str = "Where the time went"
) -> Figure:
    """Draw what each request waited for, a row each, from its arrival to its last token.

    Args:
        requests: by name: spans, or the seconds of each of the phases of `SPAN_COLORS` in order.
        title: what is drawn.

    Raises:
        ValueError: there are none, too many for a picture, or a phase is unknown.
    """
    rows = {
        name: given if isinstance(given, list) else spans_of(given)
        for name, given in requests.items()
    }
    _check_rows(rows, "requests")
    unknown = {span.phase for spans in rows.values() for span in spans} - set(SPAN_COLORS)
    if unknown:
        raise ValueError(f"unknown phases {sorted(unknown)}; known are {', '.join(SPAN_COLORS)}")
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8.4, 1.7 + 0.45 * len(rows)))
        end_s = max(spans[-1].end_s for spans in rows.values())
        labels = []
        for row, (name, spans) in enumerate(rows.items()):
            _draw_bars(ax, row, spans, SPAN_COLORS, end_s)
            ttft_s = next((s.start_s for s in spans if s.phase == "decode"), spans[-1].end_s)
            ax.plot([ttft_s] * 2, [row - 0.42, row + 0.42], color=COLORS["accent"], linewidth=2)
            labels.append(f"{name}\nTTFT {duration(ttft_s)}")
        _finish(ax, labels, end_s, "time since the request arrived")
        ax.set_title(title)
        shown = {span.phase for spans in rows.values() for span in spans}
        _phase_legend(figure, {name: c for name, c in SPAN_COLORS.items() if name in shown})
        caption(figure, "Red mark: the first token. What is left of it is the TTFT.")
        plt.close(figure)
    return figure


def plot_cold_starts(
    starts: SimulationResult | Mapping[str, Mapping[str, float]], title: str = "Cold starts"
) -> Figure:
    """Draw the phases of each cold start, a row each, all beginning at the decision to start.

    Args:
        starts: a result, whose first cold starts are drawn; or the seconds of each phase by name.
        title: what is drawn.

    Raises:
        ValueError: there are none, or too many for a picture.
    """
    found = starts if isinstance(starts, Mapping) else _cold_starts(starts)
    rows = {name: spans_of(phases) for name, phases in list(found.items())[:MOST_ROWS]}
    _check_rows(rows, "cold starts")
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8.4, 1.7 + 0.34 * len(rows)))
        end_s = 1.18 * max(spans[-1].end_s for spans in rows.values())
        for row, spans in enumerate(rows.values()):
            _draw_bars(ax, row, spans, COLD_START_COLORS, end_s)
            ready_s = spans[-1].end_s
            ax.barh(row, end_s - ready_s, left=ready_s, height=0.7, color=STATE_COLORS["ready"])
            ax.text(ready_s, row, f" {duration(ready_s)}", va="center", color="white", fontsize=8)
        _finish(ax, list(rows), end_s, "time since the start was decided")
        ax.set_title(title)
        _phase_legend(figure, COLD_START_COLORS | {"ready": STATE_COLORS["ready"]})
        left_out = len(found) - len(rows)
        more = f" {left_out} later ones are not drawn." if left_out else ""
        caption(
            figure,
            "One row is one start, with the time at which it was decided. In white: the time until "
            f"the replica is ready.{more}",
        )
        plt.close(figure)
    return figure


def _cold_starts(result: SimulationResult) -> dict[str, dict[str, float]]:
    replicas = result.replicas
    columns = [f"{phase}_s" for phase in COLD_START_COLORS]
    if not set(columns) <= set(replicas.columns):
        return {}
    cold = replicas[replicas[columns].sum(axis=1) > 0].sort_values("started_s")
    write = clock_time if cold.started_s.max() > 3 * HOUR_S else duration
    return {
        f"{row['name']}, at {write(row.started_s)}": {
            phase: float(row[f"{phase}_s"]) for phase in COLD_START_COLORS
        }
        for _, row in cold.iterrows()
    }


def _check_rows(rows: Mapping[str, list[Span]], what: str) -> None:
    if not 1 <= len(rows) <= MOST_ROWS or not all(rows.values()):
        raise ValueError(f"draw 1 to {MOST_ROWS} {what} at once, none of them empty")


def _draw_bars(
    ax: Axes, row: int, spans: list[Span], colors: Mapping[str, str], end_s: float
) -> None:
    dark = {"queue at the gateway", "prefill", "runtime_warm_up"}
    for span in spans:
        length_s = span.end_s - span.start_s
        ax.barh(
            row, length_s, left=span.start_s, height=0.7, color=colors[span.phase],
            edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        if length_s >= 0.08 * end_s:  # else no room
            ax.text(
                span.start_s + length_s / 2, row, duration(length_s), ha="center", va="center",
                fontsize=8, color="white" if span.phase in dark else "black",
            )  # fmt: skip


def _finish(ax: Axes, labels: list[str], end_s: float, label: str) -> None:
    ax.set_yticks(range(len(labels)), labels=labels, fontsize=9)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    label_time_axis(ax, 0.0, end_s, label)


def _phase_legend(figure: Figure, colors: Mapping[str, str]) -> None:
    handles = [Patch(color=color, label=name.replace("_", " ")) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside right center", fontsize=9, handlelength=1.2)
