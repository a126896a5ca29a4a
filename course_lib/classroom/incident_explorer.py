"""The incidents of the bank on a slider: guess the cause, then uncover it."""

import html
from collections.abc import Callable, Mapping, Sequence

from course_lib.classroom.explorer import Control, Explorer, View
from course_lib.classroom.incidents.records import CAUSES, Case, ReplicaLog, RequestLog
from course_lib.classroom.plots.incidents import plot_incident


def incident_explorer(
    cases: Sequence[Case], split: Callable[[RequestLog, ReplicaLog], Mapping[str, float]]
) -> Explorer:
    """One incident at a time, its cause hidden until it is asked for.

    Args:
        cases: to choose from.
        split: `split_timeline`.
    """
    numbers = {f"{index + 1}": index for index in range(len(cases))}
    controls = {
        "index": Control("incident", numbers, 0),
        "uncovered": Control("show the cause", kind="switch"),
    }

    def draw(index: int, uncovered: bool) -> View:
        case = cases[index]
        cause = f"<b>{case.cause}</b>: {html.escape(CAUSES[case.cause])} ({case.source})"
        figure = plot_incident(case.incident, split(case.incident.request, case.incident.replica))
        return View([figure], cause if uncovered else "What is the cause?")

    return Explorer(controls, draw)
