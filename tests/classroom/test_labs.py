"""The student notebooks as they are handed out: they run through, and nothing counts as solved."""

import ast
import importlib
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from course_lib.classroom.checks import CheckFailed, find_exercise

ROOT = Path(__file__).parents[2]
LABS = sorted(
    p for p in (ROOT / "labs").rglob("lab_*/*.ipynb") if ".ipynb_checkpoints" not in str(p)
)


@pytest.mark.slow
@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_an_unsolved_lab_reports_every_exercise(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stubs and checks only; that it runs from top to bottom is what nbval shows."""
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    exercises = re.findall(r'^check\("([A-C]\d\.\d)"', "\n".join(_sources(notebook)), re.MULTILINE)
    assert exercises, "a lab has exercises"
    imports = nbformat.v4.new_code_cell("\n".join(map(_imports, _sources(notebook))))
    graded = [c for c in notebook.cells if c.cell_type == "code" and "nbgrader" in c.metadata]
    notebook.cells = [imports, *graded]
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    for exercise in exercises:
        assert f"Exercise {exercise} is not implemented yet. 0 of" in printed
    assert "passed" not in printed
    assert not list(tmp_path.iterdir())


def _imports(source: str) -> str:
    """What a cell imports; nothing of a cell that has shell commands."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return ""
    return "\n".join(ast.unparse(s) for s in body if isinstance(s, ast.Import | ast.ImportFrom))


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_points_in_the_notebook_are_those_of_the_exercise(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        grading = cell.metadata.get("nbgrader", {})
        if grading.get("grade") and cell.cell_type == "code":
            last_line = cell.source.rstrip().splitlines()[-1]
            (exercise,) = re.findall(r'^check\("([A-C]\d\.\d)"', last_line)
            assert grading["points"] == find_exercise(exercise).points
            assert grading["locked"] and not cell.metadata["editable"]


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_a_wrong_answer_loses_that_exercise_only_and_right_ones_keep_theirs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notebook's own check cells, with answers put in place of its answer cells."""
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    answers = importlib.import_module(f"tests.classroom.answers_{path.stem[:2]}")
    full = {e: find_exercise(e).points for e in answers.RIGHT}
    for style in (1, 0):
        right = {exercise: answers.RIGHT[exercise][style] for exercise in full}
        assert _credit(path, right) == full
    for exercise, (wrong, *_) in answers.WRONG.items():
        assert _credit(path, {**right, exercise: wrong}) == {**full, exercise: 0}, wrong
    for exercise, wrongs in answers.WRONG.items():
        for wrong in wrongs[1:5]:  # by itself, which is quicker; test_exercises has all of them
            assert _credit(path, {exercise: wrong}) == {exercise: 0}, wrong


def _credit(path: Path, answers: dict[str, object]) -> dict[str, float]:
    """Points of each exercise that has an answer, as the check cells of the notebook give them."""
    credit = {}
    for source in _sources(nbformat.read(path, as_version=4)):
        found = re.search(r'^check\("([A-C]\d\.\d)", (\w+)\)$', source, re.MULTILINE)
        if found and found.group(1) in answers:
            exercise, name = found.groups()
            try:
                namespace = {name: answers[exercise]}
                *imports, call = source.rstrip().splitlines()
                exec("\n".join(imports), namespace)
                credit[exercise] = eval(call, namespace)
            except CheckFailed:
                credit[exercise] = 0
    return credit


def _sources(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


SOLUTIONS = sorted((ROOT / "solutions").rglob("*.ipynb"))


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_the_recorded_dashboard_is_of_somebody_who_has_come_this_far(path: Path) -> None:
    """The exercises up to this notebook are solved, and none behind it."""
    marks: dict[str, str] = {}
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            html = str(output.get("data", {}).get("text/html", ""))
            if "Points so far" in html:
                marks = dict(re.findall(r"([A-C]\d\.\d) ([✓–])", html))
    assert marks, "the last cell shows the dashboard"
    solved = [exercise for exercise in marks if exercise[:2].lower() <= path.stem[:2]]
    if path.stem.startswith("00"):
        solved = []
    assert [exercise for exercise, mark in marks.items() if mark == "✓"] == solved
