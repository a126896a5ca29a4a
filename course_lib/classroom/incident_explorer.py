"""The incidents of the bank on a slider: guess the cause, then uncover it."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets

from course_lib.classroom.incidents.records import CAUSES, Case, ReplicaLog, RequestLog
from course_lib.classroom.plots.incidents import plot_incident


def incident_explorer(
    cases: Sequence[Case], split: Callable[[RequestLog, ReplicaLog], Mapping[str, float]]
) -> ipywidgets.Widget:
    """One incident at a time, its cause hidden until it is asked for.

    Args:
        cases: to choose from.
        split: `split_timeline`.
    """
    slider = ipywidgets.IntSlider(
        description="incident", min=1, max=len(cases), value=1, continuous_update=False
    )
    uncover = ipywidgets.ToggleButton(description="show the cause", value=False)
    told = ipywidgets.HTML()
    picture = ipywidgets.Image(format="png")

    def tell(_: Any = None) -> None:
        case = cases[slider.value - 1]
        cause = f"<b>{case.cause}</b>: {CAUSES[case.cause]} ({case.source})"
        told.value = cause if uncover.value else "What is the cause?"

    def draw(_: Any = None) -> None:
        incident = cases[slider.value - 1].incident
        figure = plot_incident(incident, split(incident.request, incident.replica))
        file = io.BytesIO()
        figure.savefig(file, format="png")
        picture.value = file.getvalue()
        uncover.value = False
        tell()

    slider.observe(draw, names="value")
    uncover.observe(tell, names="value")
    draw()
    return ipywidgets.VBox([ipywidgets.HBox([slider, uncover, told]), picture])
