"""Folders of submissions: wrong answers lose their own points, and a second run keeps the first."""

import base64
import importlib
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from course_lib.classroom.grading.graft import read_assignment
from course_lib.classroom.grading.run import grade
from course_lib.cli import app
from tests.classroom.grading.notebooks import (
    ROOT,
    as_cell,
    hand_in,
    instructor_notebook,
    submission,
)
from tests.classroom.grading.test_hostile import ALSO_RIGHT, RIGHT, WRONG

pytestmark = pytest.mark.slow
LABS = sorted(
    path
    for path in (ROOT / "solutions").glob("lab_*/*.ipynb")
    if (ROOT / "tests" / "classroom" / f"answers_{path.stem[:2]}.py").exists()
)


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_a_wrong_answer_loses_its_own_points_only(path: Path, tmp_path: Path) -> None:
    """Every exercise is wrong for one of two students and right for the other."""
    assignment = read_assignment(path)
    answers = importlib.import_module(f"tests.classroom.answers_{path.stem[:2]}")
    for student in (0, 1):
        cells = {
            task.exercise.id: as_cell(
                (answers.RIGHT if number % 2 == student else answers.WRONG)[task.exercise.id][0],
                task.name,
            )
            for number, task in enumerate(assignment.tasks)
        }
        hand_in(tmp_path / "in", f"{student}", assignment, submission(assignment, cells))
    graded = grade(tmp_path / "in", tmp_path / "out", ROOT / "solutions", show_progress=False)
    for student, row in enumerate(graded.rows):
        for number, mark in enumerate(row.marks):
            expected = "passed" if number % 2 == student else "wrong"
            assert mark.outcome == expected, (mark.exercise, mark.message)
            assert mark.points == (mark.out_of if expected == "passed" else 0)
            drawn = mark.exercise in ("A1.2", "B2.3") and expected == "wrong"
            assert drawn == base64.b64decode(mark.picture).startswith(b"\x89PNG")
            page = (tmp_path / "out" / "feedback" / f"{student}.html").read_text()
            assert not drawn or mark.picture in page


def test_a_second_run_grades_what_changed_and_keeps_marks_by_hand(tmp_path: Path) -> None:
    assignment = instructor_notebook(tmp_path / "solutions" / "lab" / "two.ipynb", "A1.1", "A2.2")
    right = submission(assignment, {"A1.1": RIGHT, "A2.2": ALSO_RIGHT})
    wrong = submission(assignment, {"A1.1": WRONG, "A2.2": ALSO_RIGHT})
    hand_in(tmp_path / "in", "ada", assignment, right)
    hand_in(tmp_path / "in", "bo", assignment, wrong)
    arguments = [str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    arguments += ["--solutions", str(tmp_path / "solutions"), "--workers", "2"]

    first = CliRunner().invoke(app, ["grade", *arguments])
    assert first.exit_code == 0, first.output
    assert "2 graded now; isolation: " in first.output
    marks = (tmp_path / "out" / "grades.csv").read_text().splitlines()
    assert marks[1:] == ["ada,graded,3,3,2,1,", "bo,graded,1,3,0,1,"]

    with (tmp_path / "out" / "manual.csv").open("a") as file:
        file.write("bo,A1.1,1,nearly\n")
    hand_in(tmp_path / "in", "ada", assignment, wrong)
    # As if the first run had been cut off: one result is half written, and is made again.
    result = tmp_path / "out" / "results" / "bo" / "lab" / "two.json"
    result.write_text(result.read_text()[:100])
    second = CliRunner().invoke(app, ["grade", *arguments])
    assert "2 graded now" in second.output
    third = CliRunner().invoke(app, ["grade", *arguments])
    assert "0 graded now" in third.output
    marks = (tmp_path / "out" / "grades.csv").read_text().splitlines()
    assert marks[1:] == ["ada,graded,1,3,0,1,", "bo,graded,2,3,1,1,"]
    assert "nearly" in (tmp_path / "out" / "feedback" / "bo.html").read_text()


def test_without_walls_the_limits_hold_and_the_report_says_so(tmp_path: Path) -> None:
    assignment = instructor_notebook(tmp_path / "solutions" / "lab" / "one.ipynb", "A2.2")
    hand_in(tmp_path / "in", "ada", assignment, submission(assignment, {"A2.2": ALSO_RIGHT}))
    big = "kept = []\nwhile True: kept.append(bytearray(50_000_000))\n"
    hand_in(tmp_path / "in", "bo", assignment, submission(assignment, {"A2.2": big}))
    graded = grade(
        tmp_path / "in", tmp_path / "out", tmp_path / "solutions",
        isolation="limits only", show_progress=False,
    )  # fmt: skip
    assert [row.points for row in graded.rows] == [1, 0]
    assert "memory" in graded.rows[1].flags[0]
    page = (tmp_path / "out" / "overview.html").read_text()
    assert "Isolation: <b>limits only</b>" in page and "install bubblewrap" in page


def has_network_namespaces() -> bool:
    command = shutil.which("unshare")
    arguments = ["--map-root-user", "--net", "--", "true"]
    return command is not None and subprocess.run([command, *arguments]).returncode == 0


@pytest.mark.skipif(not has_network_namespaces(), reason="needs unshare with user namespaces")
def test_a_network_namespace_keeps_answers_from_the_network(tmp_path: Path) -> None:
    """A server of this machine, which every process here could reach, is not there."""
    assignment = instructor_notebook(tmp_path / "solutions" / "lab" / "one.ipynb", "A2.2")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        call = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)\n"
        for student, isolation in (("ada", "network namespace"), ("bo", "limits only")):
            answers = {"A2.2": call + ALSO_RIGHT}
            hand_in(tmp_path / student, student, assignment, submission(assignment, answers))
            graded = grade(
                tmp_path / student, tmp_path / f"out-{student}", tmp_path / "solutions",
                isolation=isolation, show_progress=False,
            )  # fmt: skip
            reached = isolation == "limits only"
            assert [row.points for row in graded.rows] == [1 if reached else 0]
            page = (tmp_path / f"out-{student}" / "overview.html").read_text()
            assert f"Isolation: <b>{isolation}</b>" in page


def test_nothing_to_grade_is_said(tmp_path: Path) -> None:
    (tmp_path / "in" / "ada" / "lab").mkdir(parents=True)
    (tmp_path / "in" / "ada" / "lab" / "other.ipynb").write_text("{}")
    done = CliRunner().invoke(app, ["grade", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "{student}/{assignment}/{notebook}.ipynb" in done.output
