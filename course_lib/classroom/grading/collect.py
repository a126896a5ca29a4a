"""Reads submissions: `submitted/{student}/{assignment}/{notebook}.ipynb`, nbgrader's layout.

Of a student's notebook only the sources of the answer cells are taken, by their `grade_id`.
Everything else is looked at for one purpose: to tell the instructor what was changed that should
not have been. A notebook may hold anything, so nothing in it is taken for granted.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from course_lib.classroom.grading.graft import NBVAL_TAGS, Assignment, markers_in

#: Beyond this it is no notebook of this course; one with all its pictures has a few MB.
MAX_NOTEBOOK_BYTES = 25 << 20

#: Characters. The longest answer of the course has some five thousand.
MAX_ANSWER_LENGTH = 100_000


@dataclass(frozen=True)
class Submission:
    """One notebook that a student handed in."""

    student: str
    assignment: str
    notebook: str
    path: Path

    @property
    def key(self) -> str:
        """Names it in the results."""
        return f"{self.student}/{self.assignment}/{self.notebook}"


@dataclass
class Sheet:
    """What is taken from a submission.

    Args:
        answers: sources of the answer cells by `grade_id`.
        flags: for the instructor to look at, a sentence each.
        unreadable: why there is nothing to take, if so.
    """

    answers: dict[str, str] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    unreadable: str | None = None


def find_submissions(folder: Path) -> Iterator[Submission]:
    """All notebooks in nbgrader's layout, in order."""
    for path in sorted(folder.glob("*/*/*.ipynb")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            student, assignment = path.relative_to(folder).parts[:2]
            yield Submission(student, assignment, path.stem, path)


def read_sheet(path: Path, assignment: Assignment) -> Sheet:
    """The answers in a notebook, and what is odd about it."""
    try:
        if any(part.is_symlink() for part in (path, *path.parents[:2])):
            return Sheet(unreadable="the notebook is a link to another file")
        size = path.stat().st_size
        if size > MAX_NOTEBOOK_BYTES:
            return Sheet(
                unreadable=f"the notebook has {size >> 20} MB; at most {MAX_NOTEBOOK_BYTES >> 20} "
                "MB are read"
            )
        notebook = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return Sheet(unreadable=f"the notebook cannot be read: {str(error)[:200]}")
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        return Sheet(unreadable="the file is no notebook of format 4: it has no list of cells")
    sheet, found = Sheet(), _by_grade_id(notebook["cells"])
    _flag_tags(notebook["cells"], sheet)
    for task in assignment.tasks:
        sources = [source for source, kind in found.get(task.answer_id, []) if kind == "code"]
        if not sources:
            sheet.flags.append(f"the answer cell {task.answer_id} is missing")
        elif len(sources) > 1:
            sheet.flags.append(
                f"the answer cell {task.answer_id} is there {len(sources)} times; all of them are "
                "run in their order, as the notebook would"
            )
        source = "\n".join(sources)
        if len(source) > MAX_ANSWER_LENGTH:
            sheet.flags.append(f"the answer cell {task.answer_id} is too long to be run")
            source = ""
        sheet.answers[task.answer_id] = source
        checks = [source.strip() for source, _ in found.get(task.check_id, [])]
        if not checks:
            sheet.flags.append(f"the check cell {task.check_id} is missing; it is not needed")
        elif checks != [task.check.strip()]:
            sheet.flags.append(f"the check cell {task.check_id} was changed; ours is used")
    return sheet


def _by_grade_id(cells: list[Any]) -> dict[str, list[tuple[str, Any]]]:
    """Source and type of the cells of each `grade_id`, in order."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for cell in cells:
        if not isinstance(cell, dict):
            continue
        grading = _dict(_dict(cell.get("metadata")).get("nbgrader"))
        grade_id = grading.get("grade_id")
        if isinstance(grade_id, str):
            found.setdefault(grade_id, []).append((source_of(cell), cell.get("cell_type")))
    return found


def source_of(cell: dict[str, Any]) -> str:
    """The source of a cell, which the format allows to be a string or a list of lines."""
    source = cell.get("source", "")
    if isinstance(source, list):
        source = "".join(line for line in source if isinstance(line, str))
    return source if isinstance(source, str) else ""


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _flag_tags(cells: list[Any], sheet: Sheet) -> None:
    tags: set[str] = set()
    for cell in cells:
        metadata = _dict(cell.get("metadata")) if isinstance(cell, dict) else {}
        if "nbgrader" in metadata:
            found = metadata.get("tags")
            tags |= set(filter(_is_string, found if isinstance(found, list) else ()))
            tags |= set(markers_in(source_of(cell)))
    if tags & NBVAL_TAGS:
        names = ", ".join(sorted(tags & NBVAL_TAGS))
        sheet.flags.append(f"cells have marks that tell nbval to look away ({names}); not kept")


def _is_string(value: Any) -> bool:
    return isinstance(value, str)
