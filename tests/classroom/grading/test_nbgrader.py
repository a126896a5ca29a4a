"""nbgrader itself reads, releases and autogrades the notebooks."""

import json
import shutil
from pathlib import Path

import nbformat
import pytest

from benchmarks.nbgrader_course import NbgraderCourse, find_nbgrader
from course_lib.classroom.release import student_version
from tests.classroom.grading.notebooks import ROOT, hand_in, instructor_notebook, submission
from tests.classroom.grading.test_hostile import ALSO_RIGHT, RIGHT, WRONG

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_nbgrader() is None, reason="nbgrader is not here"),
]


@pytest.fixture
def course(tmp_path: Path) -> NbgraderCourse:
    program = find_nbgrader()
    assert program is not None
    return NbgraderCourse(tmp_path, program)


@pytest.mark.parametrize("lab", ["lab_a_architect", "lab_b_optimizer", "lab_c_interviewer"])
def test_it_releases_the_same_cells_as_we_do(lab: str, course: NbgraderCourse) -> None:
    shutil.copytree(ROOT / "solutions" / lab, course.folder / "source" / lab)
    course.release(lab)
    released = sorted((course.folder / "release" / lab).glob("*.ipynb"))
    assert released
    for path in released:
        theirs = nbformat.read(path, as_version=4).cells
        ours = json.loads(student_version(ROOT / "solutions" / lab / path.name))["cells"]
        for their_cell, our_cell in zip(theirs, ours, strict=True):
            assert their_cell.source.strip() == "".join(our_cell["source"]).strip()


def test_it_autogrades_submissions_with_partial_credit(course: NbgraderCourse) -> None:
    assignment = instructor_notebook(course.folder / "source" / "lab" / "two.ipynb", "A1.1", "A2.2")
    course.release("lab")
    for student, answers in {
        "ada": {"A1.1": RIGHT, "A2.2": ALSO_RIGHT},
        "bo": {"A1.1": WRONG, "A2.2": ALSO_RIGHT},
        "cy": {},
    }.items():
        hand_in(course.folder / "submitted", student, assignment, submission(assignment, answers))
    course.autograde("lab")
    assert course.scores() == {"ada": 3, "bo": 1, "cy": 0}
