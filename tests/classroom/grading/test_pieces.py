"""What grading is made of: reading notebooks, portraits of answers, the course without answers."""

import importlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from course_lib.classroom.checks import find_exercise
from course_lib.classroom.grading.collect import find_submissions, read_sheet
from course_lib.classroom.grading.course_copy import (
    REFUSAL,
    copy_course,
    copy_without,
    without_bodies,
)
from course_lib.classroom.grading.graft import (
    NotAnAssignment,
    cells_for,
    notebook_for,
    read_assignment,
)
from course_lib.classroom.grading.portrait import portrait
from course_lib.classroom.grading.suspicions import suspicions
from course_lib.classroom.ownership import NotYourOwn, check_is_own
from course_lib.classroom.parts import load_object, standalone_source
from course_lib.classroom.source import kernels_of, plain, source_of
from course_lib.engine.scheduler import Scheduler
from course_lib.engine.scheduler_base import SchedulerBase
from tests.classroom.grading.notebooks import ROOT, hand_in, instructor_notebook, submission

LABS = sorted((ROOT / "solutions").glob("lab_*/*.ipynb"))


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_every_notebook_can_be_graded(path: Path) -> None:
    assignment = read_assignment(path)
    exercises = importlib.import_module(f"course_lib.classroom.exercises.{path.stem[:2]}").EXERCISES
    assert [task.exercise for task in assignment.tasks] == list(exercises)
    assert sum(task.points for task in assignment.tasks) == sum(e.points for e in exercises)


def test_a_notebook_with_another_check_cannot(tmp_path: Path) -> None:
    path = tmp_path / "lab" / "n.ipynb"
    instructor_notebook(path, "A1.1")
    path.write_text(path.read_text().replace("simulate_slots)", "simulate_slots, seed=1)"))
    with pytest.raises(NotAnAssignment, match="a1-1-check: expected its last line to be check"):
        read_assignment(path)


def test_an_answer_is_run_with_those_it_builds_on_and_no_others() -> None:
    assignment = read_assignment(next((ROOT / "solutions").rglob("a2_*.ipynb")))
    task = assignment.tasks[2]
    answers = {
        "a2-1-answer": "import math\nclass MyTokenBucket: pass",
        "a2-2-answer": "def virtual_arrival_ms(): return helper()",
        "a2-3-answer": "class MyAdmission:\n    def decide(self): return MyTokenBucket(math.pi)",
    }
    assert [t.exercise.id for t in cells_for(task, assignment, answers)] == ["A2.1", "A2.3"]
    notebook = notebook_for(task, assignment, answers)
    roles = [cell.metadata["course"]["role"] for cell in notebook.cells]
    assert roles == ["imports", "answer", "course", "answer", "serve"]
    # The course's own bucket stands by, for a student whose bucket is wrong.
    namespace: dict[str, object] = {}
    exec(notebook.cells[2].source, namespace)
    assert "wait_s" in dir(namespace["MyTokenBucket"])


def test_submissions_are_found_in_nbgraders_layout(tmp_path: Path) -> None:
    assignment = instructor_notebook(tmp_path / "solutions" / "lab" / "n.ipynb", "A1.1")
    hand_in(tmp_path / "in", "bo", assignment, "{}")
    hand_in(tmp_path / "in", "ada", assignment, "{}")
    (tmp_path / "in" / "ada" / "lab" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "in" / "ada" / "lab" / ".ipynb_checkpoints" / "n.ipynb").write_text("{}")
    (tmp_path / "in" / "stray.ipynb").write_text("{}")
    assert [s.key for s in find_submissions(tmp_path / "in")] == ["ada/lab/n", "bo/lab/n"]


def test_a_source_may_be_a_list_of_lines(tmp_path: Path) -> None:
    assignment = instructor_notebook(tmp_path / "lab" / "n.ipynb", "A1.1")
    notebook = json.loads(submission(assignment, {"A1.1": "a = 1\nb = 2"}))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"]).splitlines(keepends=True)
    path = hand_in(tmp_path, "ada", assignment, json.dumps(notebook))
    sheet = read_sheet(path, assignment)
    assert sheet.answers == {"a1-1-answer": "a = 1\nb = 2"} and not sheet.flags


def test_an_untouched_notebook_has_no_flags(tmp_path: Path) -> None:
    for path in LABS:
        assignment = read_assignment(path)
        handed_in = hand_in(tmp_path, "ada", assignment, submission(assignment, {}))
        assert read_sheet(handed_in, assignment).flags == []


def test_a_portrait_shows_what_an_answer_is_without_running_it() -> None:
    cells = [
        "from course_lib.engine.scheduler_base import SchedulerBase as Base\nimport os",
        "%timeit 1\nos.abort()\n\nclass Mine(Base):\n    x = os.abort()\n\n"
        "    def schedule(self, budget=os.abort()):\n        return helper()\n",
        "def helper():\n    return 1",
        "this is not Python",
    ]
    mine = portrait(cells, "Mine")
    assert issubclass(mine, SchedulerBase) and "class Mine(Base)" in source_of(mine)
    assert isinstance(portrait(cells, "helper"), types.FunctionType)
    assert portrait(cells, "nothing") is None
    check_is_own(mine, "course_lib.engine.scheduler:Scheduler")


@pytest.mark.parametrize(
    "cell",
    [
        "from course_lib.engine.scheduler import Scheduler\n\nclass Mine(Scheduler):\n    pass",
        "import course_lib.engine.scheduler as s\n\nclass Mine(s.Scheduler):\n    pass",
        "import course_lib.engine.scheduler as s\nMine = s.Scheduler",
        "if True:\n    from course_lib.engine.scheduler import Scheduler as Mine",
        "from course_lib.engine.scheduler import Scheduler as Theirs\n\nclass Mine:\n"
        "    def __init__(self, *a, **k):\n        self.own = Theirs(*a, **k)",
        (ROOT / "course_lib" / "engine" / "scheduler.py")
        .read_text(encoding="utf-8")
        .replace("class Scheduler(", "class Mine("),
    ],
    ids=["derives", "derives by module", "is", "is, inside an if", "wraps", "copies"],
)
def test_a_portrait_betrays_the_reference(cell: str) -> None:
    with pytest.raises(NotYourOwn):
        check_is_own(portrait([cell], "Mine"), "course_lib.engine.scheduler:Scheduler")


def test_a_portrait_shows_the_kernels_that_a_function_launches() -> None:
    cell = (
        "from kernels.runtime import tl, triton\n\n@triton.jit\ndef _kernel(x):\n"
        "    tl.store(x, 1)\n\ndef launch(x):\n    _kernel[(1,)](x)\n"
    )
    (kernel,) = kernels_of(plain(portrait([cell], "launch")))
    assert "tl.store" in source_of(kernel)


def test_a_module_without_bodies_keeps_its_names_and_refuses() -> None:
    source = without_bodies(
        "SIZE = 3\n\ndef helper():\n    return SIZE\n\nclass Part:\n    'Doc.'\n"
        "    def run(self): return helper()\n\nclass Other:\n    def run(self): return 1\n",
        "Part",
    )
    namespace: dict[str, object] = {}
    exec(source, namespace)
    for call in (namespace["helper"], namespace["Part"]().run):
        with pytest.raises(RuntimeError, match=REFUSAL[:20]):
            call()
    assert namespace["Other"]().run() == 1 and namespace["SIZE"] == 3


def test_the_copy_of_the_course_has_neither_oracles_nor_what_is_asked(tmp_path: Path) -> None:
    plain_copy = copy_course(tmp_path / "course")
    exercise = find_exercise("A1.2")
    folder = copy_without([exercise.reference], plain_copy, tmp_path / "a1-2")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    assert not any("/exercises" in name or "diagnosis" in name for name in there)
    assert not (folder / "data" / "incidents").exists()
    code = (
        "import inspect\n"
        "from course_lib.engine.scheduler import Scheduler\n"
        "from course_lib.engine.block_pool import BlockPool\n"
        "from course_lib.classroom.checks import check, hint\n"
        "assert 'while it is graded' in inspect.getsource(Scheduler.schedule)\n"
        "assert 'while it is graded' not in inspect.getsource(BlockPool.allocate)\n"
        "import course_lib.classroom.stands, course_lib.engine.llm\n"
        "from course_lib.sizing.catalog import gpus\n"
        "print(len(gpus()), Scheduler.__module__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(folder)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Scheduler.__module__ in done.stdout
    # Not in the bytecode either.
    bytecode = (folder / "course_lib" / "engine" / "__pycache__").glob("scheduler.*")
    assert all(
        b"_admit_waiting" not in path.read_bytes() or b"while it is graded" in path.read_bytes()
        for path in bytecode
    )


def test_suspicions_name_what_is_reached_for() -> None:
    assert suspicions("import math\nimport torch\n\ndef f(x):\n    return math.ceil(x)") == []
    assert suspicions("import os, numpy as np\nnp.isclose = print\nopen('x')") == [
        "it imports os",
        "it uses open",
        "it changes np.isclose",
    ]
    assert suspicions("def f(:") == ["its cell is not valid Python"]


_NUMBER = re.compile(r"\d+", re.ASCII)


def numbers_in(text):
    return _NUMBER.findall(text)


def test_an_answer_written_on_its_own_takes_its_patterns_along() -> None:
    namespace: dict[str, object] = {}
    exec(standalone_source(numbers_in), namespace)
    assert namespace["PART"]("a1b22") == ["1", "22"]


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_the_course_can_stand_in_for_every_earlier_answer(path: Path) -> None:
    assignment = read_assignment(path)
    for task in assignment.tasks[:-1]:
        if not task.exercise.reference.startswith("course_lib.classroom.exercises.b3"):
            namespace: dict[str, object] = {}
            exec(standalone_source(load_object(task.exercise.reference)), namespace)
            assert callable(namespace["PART"])
