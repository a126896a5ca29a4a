"""The instructor's notebook, and the notebooks that are run: one for each exercise.

An exercise is graded in a process of its own, since what it asks for is taken out of the course
there and nowhere else. Its notebook holds the imports that its cells use, earlier answers that it
builds on, the answer, and in place of the check a cell that serves the answer to the oracle.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from course_lib.classroom.checks import Exercise, find_exercise
from course_lib.classroom.grading.course_copy import CLASSROOM
from course_lib.classroom.grading.portrait import NOT_PYTHON, python_of
from course_lib.classroom.parts import load_object, standalone_source
from course_lib.classroom.release import student_version
from course_lib.classroom.source import global_names

#: What tells nbval to look away; as a tag of a cell, or as a comment in it.
NBVAL_TAGS = {
    "nbval-ignore-output",
    "nbval-check-output",
    "nbval-raises-exception",
    "nbval-skip",
    "raises-exception",
    "pytest-validate-ignore-output",
}


@dataclass(frozen=True)
class Task:
    """An exercise as the notebook poses it.

    Args:
        exercise: what is asked.
        name: of the answer, such as `MyScheduler`.
        answer_id: `grade_id` of the cell with the answer.
        check_id: of the cell with the check.
        check: source of that cell.
        points: for a right answer.
    """

    exercise: Exercise
    name: str
    answer_id: str
    check_id: str
    check: str
    points: float


@dataclass(frozen=True)
class Assignment:
    """An instructor's notebook.

    Args:
        path: of it.
        tasks: its exercises, in order.
        imports: what its cells import, a statement each.
    """

    path: Path
    tasks: tuple[Task, ...]
    imports: tuple[str, ...]


class NotAnAssignment(ValueError):
    """The instructor's notebook cannot be graded; the message says why."""


def read_assignment(path: Path) -> Assignment:
    """Read the complete notebook that submissions are graded by.

    Raises:
        NotAnAssignment: a graded cell does not end with `check("A1.2", Answer)`, or no answer cell
            stands before it.
    """
    # The student's version has the checks as students see them, without anything hidden.
    notebook = nbformat.reads(student_version(path), as_version=4)
    tasks: list[Task] = []
    imports: dict[str, None] = {}
    answer_id = None
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        grading = cell.metadata.get("nbgrader", {})
        if grading.get("solution"):
            answer_id = grading["grade_id"]
        elif grading.get("grade"):
            if answer_id is None:
                raise NotAnAssignment(f"{path}: no answer cell before {grading['grade_id']}")
            exercise_id, name = _checked(cell.source, f"{path}, cell {grading['grade_id']}")
            exercise = find_exercise(exercise_id)
            grade_id, points = grading["grade_id"], float(grading["points"])
            tasks.append(Task(exercise, name, answer_id, grade_id, cell.source, points))
        else:
            imports |= dict.fromkeys(_imports(cell.source))
    return Assignment(path, tuple(tasks), tuple(imports))


def _checked(source: str, where: str) -> tuple[str, str]:
    """Exercise and answer of the call that ends a check cell."""
    match ast.parse(python_of(source)).body[-1]:
        case ast.Expr(
            ast.Call(ast.Name("check"), [ast.Constant(str(exercise_id)), ast.Name(name)], [])
        ):
            return exercise_id, name
    raise NotAnAssignment(f'{where}: expected its last line to be check("A1.2", TheAnswer)')


def _imports(source: str) -> list[str]:
    """A cell's imports of what there is in the student's process, one name each."""
    there = {"course_lib.classroom." + name[:-3].replace("/", ".") for name in CLASSROOM}
    statements = []
    for node in ast.walk(ast.parse(python_of(source))):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            home = (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
            if home.startswith("course_lib.classroom") and home not in there:
                continue
            begin = f"from {home} " if isinstance(node, ast.ImportFrom) else ""
            bound = f" as {alias.asname}" if alias.asname else ""
            statements.append(f"{begin}import {alias.name}{bound}")
    return statements


def cells_for(task: Task, assignment: Assignment, answers: Mapping[str, str]) -> list[Task]:
    """The task, and before it the earlier ones whose cells define what its cell uses."""
    needed = [task]
    wanted = _used(answers.get(task.answer_id, ""))
    index = assignment.tasks.index(task)
    for earlier in reversed(assignment.tasks[:index]):
        source = answers.get(earlier.answer_id, "")
        if wanted & (_defined(source) | {earlier.name}):
            needed.insert(0, earlier)
            wanted |= _used(source)
    return needed


def notebook_for(task: Task, assignment: Assignment, answers: Mapping[str, str]) -> NotebookNode:
    """The notebook that is run to grade one exercise."""
    tasks = cells_for(task, assignment, answers)
    used = set[str]().union(*(_used(answers.get(t.answer_id, "")) for t in tasks))
    imports = [line for line in assignment.imports if _bound(line) in used]
    cells = [_cell("imports", "imports", "\n".join(imports))]
    for each in tasks:
        cells.append(_cell(each.answer_id, "answer", answers.get(each.answer_id, ""), each))
        if each is not task:
            cells.append(_cell(f"{each.answer_id}-course", "course", _courses_own(each), each))
    serve = "from course_lib.classroom.grading.answering import serve\n\n"
    serve += f"serve(globals().get({task.name!r}))"
    cells.append(_cell(task.check_id, "serve", serve, task))
    return nbformat.v4.new_notebook(cells=cells)


def _cell(cell_id: str, role: str, source: str, task: Task | None = None) -> NotebookNode:
    course = {"id": cell_id, "role": role, "exercise": task and task.exercise.id}
    course["name"] = task and task.name
    cell = nbformat.v4.new_code_cell(_without_markers(source), metadata={"course": course})
    cell.id = f"cell-{cell_id}"[:64]
    return cell


def markers_in(source: str) -> list[str]:
    """nbval's comments in a source, spelled as the tags are."""
    lines = (line.strip() for line in source.splitlines())
    names = [
        line.lstrip("#").strip().lower().replace("_", "-") for line in lines if line[:1] == "#"
    ]
    return [name for name in names if name in NBVAL_TAGS]


def _without_markers(source: str) -> str:
    """The source with nbval's comments made harmless, line for line."""
    lines = source.splitlines()
    return "\n".join("#" if markers_in(line) else line for line in lines)


def _courses_own(task: Task) -> str:
    """Puts the course's own version in place of an earlier answer, where that is not right."""
    source = standalone_source(load_object(task.exercise.reference))
    run = f'_course = {{"__name__": "_course"}}\nexec({source!r}, _course)\n'
    return f'{run}{task.name} = _course["PART"]'


def _used(source: str) -> set[str]:
    try:
        return global_names(python_of(source))
    except NOT_PYTHON:
        return set()


def _defined(source: str) -> set[str]:
    """Names that the top level of a cell binds."""
    try:
        code: Any = compile(python_of(source), "<cell>", "exec")
    except NOT_PYTHON:
        return set()
    import dis

    return {
        i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_NAME", "STORE_GLOBAL")
    }


def _bound(statement: str) -> str:
    return statement.split()[-1].split(".")[0]
