"""How far a student is: the points so far, and which parts of the engine are their own.

`dashboard()` shows in a notebook what `course parts` prints in a terminal, with the points of each
exercise and the source of the student's parts.
"""

import html
import importlib
import pkgutil
import re

from course_lib.classroom import exercises
from course_lib.classroom.checks import Exercise
from course_lib.classroom.explorer import Control, Explorer, View
from course_lib.classroom.parts import PARTS, find_part, is_own, parts_dir
from course_lib.classroom.points import points_so_far

#: Before a part is chosen.
NONE = "(choose a part)"

_CELL = "style='text-align:left; padding:0 1.2em 0 0'"


def exercises_of_notebooks() -> dict[str, tuple[Exercise, ...]]:
    """The exercises of each notebook that has some, by its short name, such as "A1"."""
    names = [module.name for module in pkgutil.iter_modules(exercises.__path__)]
    return {
        name.upper(): tuple(importlib.import_module(f"{exercises.__name__}.{name}").EXERCISES)
        for name in sorted(names)
        if re.fullmatch(r"[abc]\d", name)
    }


def dashboard() -> Explorer:
    """Points and parts as they are now; run the cell again after a check."""
    tables = _points_table() + _parts_table()

    def draw(name: str) -> View:
        return View(text=tables + (_source(name) if name != NONE else ""))

    names = [NONE, *(part.name for part in PARTS)]
    return Explorer({"name": Control("look into a part", names, NONE, "menu")}, draw)


def _source(name: str) -> str:
    """The student's part; of the course's own no more than where it is."""
    if is_own(name):
        text = (parts_dir() / f"{name}.py").read_text(encoding="utf-8")
        return f"<pre>{html.escape(text)}</pre>"
    found = find_part(name)
    home = found.home.replace(":", ", ")
    return f"This is the course's own, {home}. You build yours in {found.built_in}."


def _points_table() -> str:
    earned = points_so_far()
    rows, total, possible = [], 0.0, 0
    for notebook, found in exercises_of_notebooks().items():
        marks = " &ensp; ".join(f"{e.id} {'✓' if e.id in earned else '–'}" for e in found)
        points = sum(e.points for e in found if e.id in earned)
        of = sum(e.points for e in found)
        rows.append([notebook, marks, f"{points:g} of {of}"])
        total, possible = total + points, possible + of
    return f"<b>Points so far: {total:g} of {possible}</b>{_table(rows)}"


def _parts_table() -> str:
    own = [part.name for part in PARTS if is_own(part.name)]
    rows = [
        [part.name, part.built_in, "<b>your own</b>" if part.name in own else "the course's own"]
        for part in PARTS
    ]
    heading = f"<b>Parts of your own: {len(own)} of {len(PARTS)}</b>"
    return heading + _table([["part", "built in", "the engine runs on"], *rows])


def _table(rows: list[list[str]]) -> str:
    lines = ("".join(f"<td {_CELL}>{cell}</td>" for cell in row) for row in rows)
    return (
        "<table style='margin: 4px 0 12px'>"
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + "</table>"
    )
