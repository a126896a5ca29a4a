"""Submissions made from the course's own notebooks, with other answers in their answer cells."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nbformat

from course_lib.classroom.grading.graft import Assignment, read_assignment
from course_lib.classroom.parts import standalone_source
from course_lib.classroom.release import student_version

ROOT = Path(__file__).parents[3]


def instructor_notebook(path: Path, *exercises: str) -> Assignment:
    """Write a notebook with some of the course's exercises, and nothing else."""
    cells = []
    for exercise in exercises:
        found = next((ROOT / "solutions").rglob(f"{exercise[:2].lower()}_*.ipynb"))
        prefix = exercise.lower().replace(".", "-") + "-"
        for cell in nbformat.read(found, as_version=4).cells:
            if cell.metadata.get("nbgrader", {}).get("grade_id", "").startswith(prefix):
                cells.append(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return read_assignment(path)


def submission(
    assignment: Assignment,
    answers: Mapping[str, str],
    change: Callable[[dict[str, Any]], None] | None = None,
) -> str:
    """A student's notebook as text.

    Args:
        assignment: what was handed out.
        answers: sources by exercise; the others keep their stubs.
        change: what else the student did to the notebook.
    """
    notebook = json.loads(student_version(assignment.path))
    sources = {
        t.answer_id: answers[t.exercise.id] for t in assignment.tasks if t.exercise.id in answers
    }
    for cell in notebook["cells"]:
        grade_id = cell["metadata"].get("nbgrader", {}).get("grade_id")
        if grade_id in sources:
            cell["source"] = sources[grade_id]
    if change is not None:
        change(notebook)
    return json.dumps(notebook)


def hand_in(folder: Path, student: str, assignment: Assignment, text: str) -> Path:
    """Put a notebook where nbgrader collects it."""
    path = folder / student / assignment.path.parent.name / assignment.path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def as_cell(answer: Any, name: str) -> str:
    """An answer cell that defines what is asked for under its name."""
    source = standalone_source(answer)
    begin, _, last = source.rstrip().rpartition("\n")
    assert last == f"PART = {answer.__name__}"
    return begin if answer.__name__ == name else f"{begin}\n{name} = {answer.__name__}"
