"""Saving a part from a notebook, in the ways in which students write them, in a real kernel."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

SOLUTION = """
class MyScheduler(SchedulerBase):
    def schedule(self):
        global steps
        steps += 1
        needs, results = [], self.max_num_batched_tokens  # names that the notebook has, too
        evicted = []
        for request in self.running.copy():
            if results == 0 or request in evicted:
                break
            count = smaller(left_to_do(request), results)
            while request not in evicted and not self.block_pool.allocate(request, count):
                evicted.append(self.preempt_last())
            if request not in evicted:
                needs.append(ScheduledRequest(request, request.num_computed_tokens, count))
                results -= count
        while self.waiting and results and not evicted and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            prefix = self.match_prefix(request)
            if not self.block_pool.can_admit(request, prefix):
                break
            start = len(prefix) * self.block_pool.block_size
            count = smaller(request.num_tokens - start, results)
            self.block_pool.allocate(request, count, prefix)
            self.admit(request, start)
            needs.append(ScheduledRequest(request, start, count))
            results -= count
        return self.make_batch(needs, evicted)
"""
IMPORTS = """
from functools import lru_cache
from course_lib.classroom.checks import check
from course_lib.engine.batch import ScheduledRequest
from course_lib.engine.scheduler_base import SchedulerBase
"""
HELPERS = """
steps = START
needs, results = object(), object()


@lru_cache
def smaller(a, b):
    return a - b  # replaced below


@lru_cache
def smaller(a, b):
    return min(a, b)


def left_to_do(request):
    return request.num_tokens_with_draft - request.num_computed_tokens
"""
USE = """
from course_lib.classroom.parts import part
print(part("scheduler").__module__)
"""


@pytest.mark.slow
def test_helpers_globals_and_syntax_errors_elsewhere_do_no_harm(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    outputs = _run([IMPORTS, "def broken(:", HELPERS.replace("START", "0"), SOLUTION, CHECK, USE])
    assert "5 of 5 points" in outputs[4] and "Saved in my_engine" in outputs[4]
    assert outputs[5].strip() == "my_engine_scheduler"


@pytest.mark.slow
def test_a_part_that_cannot_be_saved_keeps_its_points(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    helpers = HELPERS.replace("START", "__import__('fractions').Fraction(0)")
    outputs = _run([IMPORTS, helpers, SOLUTION, CHECK, USE])
    assert "5 of 5 points" in outputs[3] and outputs[3].rstrip().endswith("5.0")
    assert "not saved" in outputs[3] and "'steps'" in outputs[3]
    assert outputs[4].strip() == "course_lib.engine.scheduler"
    assert not list(tmp_path.iterdir())


CHECK = 'check("A1.2", MyScheduler)'


def _run(cells: list[str]) -> list[str]:
    """What each cell printed and returned, as text; a cell may fail."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=200, kernel_name="python3", allow_errors=True).execute()
    return [
        "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs)
        for cell in notebook.cells
    ]
