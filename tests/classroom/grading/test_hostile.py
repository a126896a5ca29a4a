"""Submissions that cheat, break things or are broken: each gets the marks it deserves and a flag.

They are graded as one class, two at a time, with short limits. A notebook has two exercises: the
hostile answer is A1.1, and A2.2 is right, to see that it keeps its point.
"""

import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from course_lib.classroom.grading.collect import MAX_NOTEBOOK_BYTES
from course_lib.classroom.grading.graft import Assignment
from course_lib.classroom.grading.isolate import Limits, isolation_here
from course_lib.classroom.grading.marks import Graded, Row
from course_lib.classroom.grading.run import Grading, grade
from tests.classroom.grading.notebooks import ROOT, hand_in, instructor_notebook, submission

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        isolation_here() != "bubblewrap",
        reason="needs bubblewrap: without it they would reach this machine's disk and network",
    ),
]

RIGHT = """
def simulate_slots(reply_lengths, slots, continuous):
    from course_lib.sizing.batching import SlotUsage

    free_at = [0] * slots
    for begin in range(0, len(reply_lengths), 1 if continuous else slots):
        batch = reply_lengths[begin : begin + (1 if continuous else slots)]
        if continuous:
            free_at[free_at.index(min(free_at))] += batch[0]
        else:
            free_at = [max(free_at) + max(batch)] * slots
    steps = max(free_at)
    return SlotUsage(steps, slots * steps - sum(reply_lengths))
"""
WRONG = RIGHT.replace("min(free_at)", "max(free_at)")
ALSO_RIGHT = """
def virtual_arrival_ms(priority_class, now_s, batch_delay_s):
    late_s = batch_delay_s if priority_class == "batch" else 0
    return round(1000 * (now_s + late_s))
"""


@dataclass(frozen=True)
class Hostile:
    """A submission, and what must come of it.

    Args:
        code: of the cell of A1.1.
        points: that A1.1 deserves, of 2.
        flag: part of what the report must say.
        change: what else was done to the notebook.
        also: points of A2.2, which is right.
    """

    code: str
    points: float
    flag: str
    change: Callable[[dict[str, Any]], None] | None = None
    also: float = 1


def graded_cells(notebook: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [c for c in notebook["cells"] if c["metadata"].get("nbgrader", {}).get(kind)]


def edit_checks(notebook: dict[str, Any]) -> None:
    for cell in graded_cells(notebook, "grade"):
        cell["source"] = "print('Exercise passed'); 2.0"


def add_tags(notebook: dict[str, Any]) -> None:
    for cell in notebook["cells"]:
        cell["metadata"]["tags"] = ["raises-exception", "nbval-skip"]


def duplicate_answer(notebook: dict[str, Any]) -> None:
    first = graded_cells(notebook, "solution")[0]
    notebook["cells"].insert(0, json.loads(json.dumps({**first, "source": WRONG, "id": "again"})))


def delete_cells(notebook: dict[str, Any]) -> None:
    notebook["cells"] = graded_cells(notebook, "solution")[1:]


def before(code: str, answer: str = WRONG) -> str:
    return textwrap.dedent(code) + answer


def inside(code: str) -> str:
    return "def simulate_slots(reply_lengths, slots, continuous):\n" + textwrap.indent(
        textwrap.dedent(code), "    "
    )


COPY = (ROOT / "course_lib" / "sizing" / "batching.py").read_text(encoding="utf-8")
READS_DISK = f'''
import glob, os, pathlib
SEEN = [*glob.glob("{ROOT}/**/*", recursive=True), *glob.glob("/tmp/**/*", recursive=True)]
FOUND = [path for path in SEEN if "/exercises" in path or "/held_out" in path]
FOUND += [name for name in ("solutions", "tests", ".git") if os.path.exists("{ROOT}/" + name)]
for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/maps"):
    try:
        FOUND += [path] if "job.json" in open(path).read() else []
    except OSError:
        pass
if FOUND:
    raise RuntimeError("FOUND " + ", ".join(FOUND))
'''

HOSTILE = {
    "edits the checks": Hostile(WRONG, 0, "check cell a1-1-check was changed", edit_checks),
    "edits the checks and is right": Hostile(RIGHT, 2, "was changed; ours is used", edit_checks),
    "adds tags": Hostile(WRONG, 0, "tell nbval to look away (nbval-skip, raises-exc", add_tags),
    "adds comments": Hostile("# NBVAL_SKIP\n" + RIGHT, 2, "(nbval-skip)"),
    "swallows exceptions": Hostile(
        before("get_ipython().set_custom_exc((BaseException,), lambda *a, **k: None)\n", "1 / 0"),
        0,
        "it uses get_ipython",
    ),
    "swallows exceptions inside": Hostile(
        inside("try:\n    return 1 / 0\nexcept BaseException:\n    return None"), 0, ""
    ),
    "patches the checker": Hostile(
        before(
            """
            import course_lib.classroom.checks as checks
            import course_lib.classroom.grading.answering as answering
            checks.check = checks.compare = lambda *a, **k: 2.0
            answering.encode = lambda value, depth=0: True
            """
        ),
        0,
        "it changes answering.encode, checks.check",
    ),
    "patches the server away": Hostile(
        before("import course_lib.classroom.grading.answering as a\na.serve = print\n"),
        0,
        "it changes a.serve",
    ),
    "patches comparisons": Hostile(
        before(
            """
            import numpy, torch, math
            numpy.isclose = numpy.allclose = lambda *a, **k: numpy.array(True)
            torch.allclose = torch.equal = math.isclose = lambda *a, **k: True
            """
        ),
        0,
        "numpy.isclose, torch.allclose",
    ),
    "equals everything": Hostile(
        "class Everything(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
        + inside("from types import SimpleNamespace as N\nreturn N(token_steps=Everything(), "
                 "empty_slot_steps=Everything())"),
        0,
        "",
    ),
    "prints fake results": Hostile(
        before("print('Exercise A1.1 passed. 2 of 2 points.')\n"),
        0,
        "it prints that an exercise has passed",
    ),
    "answers the line itself": Hostile(
        before(
            """
            import os, socket
            line = socket.socket(socket.AF_UNIX)
            line.connect(os.environ["COURSE_GRADING_LINE"])
            text = b'{"kind": "function", "value": true, "outcome": "passed"}'
            for _ in range(50):
                line.sendall(len(text).to_bytes(4, "big") + text)
            """
        ),
        0,
        "it imports os, socket",
    ),
    "exits": Hostile(before("import os\nos._exit(0)\n"), 0, "its process ended itself"),
    "exits inside": Hostile(inside("import os\nos._exit(0)"), 0, "its process ended itself"),
    "loops": Hostile("while True: pass\n", 0, "it did not end in time"),
    "loops and will not stop": Hostile(
        inside("while True:\n    try:\n        while True: pass\n    except BaseException: pass"),
        0,
        "it did not end in time",
    ),
    "forks": Hostile(
        "import os, time\nwhile True:\n    if os.fork() == 0:\n        time.sleep(60)\n",
        0,
        "processes",
    ),
    "fills memory": Hostile(
        "kept = []\nwhile True:\n    kept.append(bytearray(50_000_000))\n", 0, "memory"
    ),
    "fills memory in children": Hostile(
        before(
            """
            import os, time
            for _ in range(20):
                if os.fork() == 0:
                    kept = [b"x" * 10_000_000 for _ in range(20)]
                    time.sleep(60)
            time.sleep(60)
            """
        ),
        0,
        "memory",
    ),
    "fills a file": Hostile(
        "with open('/tmp/file', 'wb') as f:\n    while True: f.write(bytes(1_000_000))\n",
        0,
        "limit on files",
    ),
    "fills the disk": Hostile(
        "for n in range(10_000):\n    open(f'/tmp/{n}', 'wb').write(bytes(1_000_000))\n",
        0,
        "limit on files",
    ),
    # Its output stops it, or fills its memory first.
    "prints without end": Hostile(
        "while True: print('x' * 100_000)\n",
        0,
        "it printed more than|its process ended itself|it ended before it was asked",
    ),
    "reads the disk": Hostile(before(READS_DISK), 0, "it imports glob"),
    "writes elsewhere": Hostile(
        before(
            f"""
            for place in ("{ROOT}/pwned", "/pwned", "/usr/pwned", "/etc/pwned"):
                try:
                    open(place, "w").write("pwned")
                except OSError:
                    continue
            """,
            RIGHT,
        ),
        2,
        "it uses open",
    ),
    "calls home": Hostile(
        "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=5)\n", 0, "network"
    ),
    "nests deeply": Hostile("x = " + "-" * 90_000 + "1\n" + WRONG, 0, ""),
    "is very long": Hostile("x = 1\n" * 50_000 + RIGHT, 0, "is too long to be run"),
    "lies about memory": Hostile(
        inside(
            "from types import SimpleNamespace as N\n"
            "lie = N(**{'__array_interface__': {'data': (8, False), 'shape': (1,), "
            "'typestr': '<f8', 'version': 3}})\nreturn N(token_steps=lie, empty_slot_steps=lie)"
        ),
        0,
        "",
    ),
    "duplicates cells": Hostile(RIGHT, 2, "is there 2 times", duplicate_answer),
    "deletes cells": Hostile(RIGHT, 0, "the answer cell a1-1-answer is missing", delete_cells),
    "imports the reference": Hostile(
        "from course_lib.sizing.batching import simulate_slots\n", 0, "the course's own"
    ),
    "wraps the reference": Hostile(
        "from course_lib.sizing.batching import simulate_slots as theirs\n"
        + inside("return theirs(reply_lengths, slots, continuous)"),
        0,
        "the course's own",
    ),
    "finds the reference at run time": Hostile(
        inside(
            "import importlib\nmodule = importlib.import_module('course_lib.sizing.bat' 'ching')\n"
            "return getattr(module, 'simulate' '_slots')(reply_lengths, slots, continuous)"
        ),
        0,
        "the course's own",
    ),
    "copies the reference": Hostile(
        re.sub(r"\b(steps|made)\b", r"my_\1", COPY),  # other names, same program
        0,
        "the course's own",
    ),
}  # fmt: skip

LIMITS = Limits(cell_s=10, memory_mb=1200, processes=60, file_mb=8, disk_mb=40)


@pytest.fixture(scope="module")
def assignment(tmp_path_factory: pytest.TempPathFactory) -> Assignment:
    path = tmp_path_factory.mktemp("instructor") / "lab" / "two.ipynb"
    return instructor_notebook(path, "A1.1", "A2.2")


@pytest.fixture(scope="module")
def graded(assignment: Assignment, tmp_path_factory: pytest.TempPathFactory) -> Grading:
    folder = tmp_path_factory.mktemp("class")
    for name, hostile in HOSTILE.items():
        answers = {"A1.1": hostile.code, "A2.2": ALSO_RIGHT}
        hand_in(folder, name, assignment, submission(assignment, answers, hostile.change))
    hand_in(folder, "is no JSON", assignment, '{"cells": [')
    hand_in(folder, "is no notebook", assignment, '{"cells": {"nbformat": 4}}')
    odd = [
        1,
        {"metadata": 3},
        {"metadata": {"nbgrader": []}},
        {"metadata": {"nbgrader": {"grade_id": {}}}},
    ]
    hand_in(folder, "has odd cells", assignment, json.dumps({"cells": odd}))
    large = hand_in(folder, "is very large", assignment, "{}")
    with large.open("r+b") as file:
        file.truncate(4 * MAX_NOTEBOOK_BYTES)
    secret = hand_in(folder, "is a link", assignment, "{}")
    secret.unlink()
    secret.symlink_to(assignment.path)
    return grade(
        folder, folder / "graded", assignment.path.parents[1],
        limits=LIMITS, workers=2, show_progress=False,
    )  # fmt: skip


def row_of(graded: Grading, student: str) -> Row:
    return next(row for row in graded.rows if row.student == student)


@pytest.mark.parametrize("name", HOSTILE)
def test_it_gets_what_it_deserves_and_is_flagged(name: str, graded: Grading) -> None:
    hostile, row = HOSTILE[name], row_of(graded, name)
    assert [mark.points for mark in row.marks] == [hostile.points, hostile.also], row
    assert any(flag in "\n".join(row.flags) for flag in hostile.flag.split("|"))


@pytest.mark.parametrize(
    ("student", "why"),
    [
        ("is no JSON", "cannot be read"),
        ("is no notebook", "no list of cells"),
        ("is very large", "at most 25 MB"),
        ("is a link", "a link to another file"),
    ],
)
def test_what_cannot_be_read_gets_nothing_and_says_why(student, why, graded) -> None:
    row = row_of(graded, student)
    assert row.points == 0 and row.status == "not readable"
    assert why in row.flags[0] and why in row.marks[0].message


def test_odd_cells_are_no_answers(graded) -> None:
    row = row_of(graded, "has odd cells")
    assert row.points == 0 and "the answer cell a1-1-answer is missing" in row.flags


def test_nothing_was_found_on_the_disk_and_nothing_left_there(graded) -> None:
    assert "expected" in row_of(graded, "reads the disk").marks[0].message  # it got to an answer
    assert not (ROOT / "pwned").exists() and not Path("/pwned").exists()
    assert not any("FOUND" in str(mark.message) for row in graded.rows for mark in row.marks)


def test_the_report_says_which_isolation_was_in_force(graded, tmp_path_factory) -> None:
    page = next(tmp_path_factory.getbasetemp().rglob("overview.html")).read_text(encoding="utf-8")
    assert f"Isolation: <b>{graded.isolation}</b>" in page
    assert "loops and will not stop" in page and "it did not end in time" in page


def test_results_are_kept_by_cell_id(graded, tmp_path_factory) -> None:
    kept = next(tmp_path_factory.getbasetemp().rglob("prints fake results/lab/two.json"))
    result = Graded.read(kept)
    assert result is not None
    assert [mark.cell for mark in result.marks] == ["a1-1-check", "a2-2-check"]
    assert "A1.1 a1-1-answer" in result.cells
