"""What a student gets: stubs for solutions, no hidden tests, no outputs, the same bytes always."""

import json
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course_lib.classroom import colab
from course_lib.classroom.release import ReleaseError, release, write_setup_cells

ROOT = Path(__file__).resolve().parents[2]
ANSWER = {"nbgrader": {"schema_version": 3, "solution": True, "grade": False, "grade_id": "a"}}
TEST = {"nbgrader": {"schema_version": 3, "solution": False, "grade": True, "grade_id": "t"}}


def released(tmp_path: Path, *cells) -> nbformat.NotebookNode:
    write_solution(tmp_path / "solutions" / "n.ipynb", *cells)
    release(tmp_path / "solutions", tmp_path / "labs")
    return nbformat.read(tmp_path / "labs" / "n.ipynb", as_version=4)


def write_solution(path: Path, *cells) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for index, cell in enumerate(cells):
        cell.id = f"cell-{index}"
    nbformat.write(new_notebook(cells=list(cells)), path)


def test_a_solution_becomes_nbgraders_stub_at_its_own_indentation(tmp_path):
    source = (
        "def add(a, b):\n"
        "    'Sum.'\n"
        "    ### BEGIN SOLUTION\n"
        "    total = a + b\n"
        "    return total\n"
        "    ### END SOLUTION\n"
        "after = 1"
    )
    cell = released(tmp_path, new_code_cell(source, metadata=ANSWER)).cells[0]
    assert cell.source == (
        "def add(a, b):\n"
        "    'Sum.'\n"
        "    # YOUR CODE HERE\n"
        "    raise NotImplementedError()\n"
        "after = 1"
    )
    assert cell.metadata == ANSWER


def test_every_region_of_a_cell_is_replaced(tmp_path):
    region = "### BEGIN SOLUTION\nx = 1\n### END SOLUTION"
    cell = released(tmp_path, new_code_cell(f"{region}\nkeep = 2\n{region}", metadata=ANSWER))
    stub = "# YOUR CODE HERE\nraise NotImplementedError()"
    assert cell.cells[0].source == f"{stub}\nkeep = 2\n{stub}"


def test_an_answer_without_a_region_is_replaced_whole(tmp_path):
    notebook = released(
        tmp_path,
        new_code_cell("x = 1", metadata=ANSWER),
        new_markdown_cell("Because memory is the bound.", metadata=ANSWER),
    )
    assert notebook.cells[0].source == "# YOUR CODE HERE\nraise NotImplementedError()"
    assert notebook.cells[1].source == "YOUR ANSWER HERE"


def test_hidden_tests_are_removed_and_visible_ones_stay(tmp_path):
    source = (
        "assert add(1, 1) == 2\n"
        "### BEGIN HIDDEN TESTS\n"
        "assert add(2, 3) == 5\n"
        "### END HIDDEN TESTS\n"
        "print('done')"
    )
    cell = released(tmp_path, new_code_cell(source, metadata=TEST)).cells[0]
    assert cell.source == "assert add(1, 1) == 2\nprint('done')"


def test_outputs_counts_and_what_tools_noted_are_cleared_and_ids_stay(tmp_path):
    cell = new_code_cell(
        "print(1)",
        metadata={"execution": {"iopub.status.busy": "now"}, "tags": ["setup"]},
        outputs=[new_output("stream", text="1\n")],
        execution_count=3,
    )
    out = released(tmp_path, cell).cells[0]
    assert (out.id, out.outputs, out.execution_count) == ("cell-0", [], None)
    assert out.metadata == {"tags": ["setup"]}


def test_the_same_solution_gives_the_same_bytes_and_nothing_is_rewritten(tmp_path):
    cells = [new_markdown_cell("# Größe — 1 ≤ n"), new_code_cell("print(1)")]
    write_solution(tmp_path / "solutions" / "deep" / "n.ipynb", *cells)
    assert release(tmp_path / "solutions", tmp_path / "a") == [tmp_path / "a" / "deep" / "n.ipynb"]
    assert release(tmp_path / "solutions", tmp_path / "a") == []
    # Another version of Python ran the solution: nothing a student gets depends on that.
    path = tmp_path / "solutions" / "deep" / "n.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.language_info = {"name": "python", "version": "3.99"}
    nbformat.write(notebook, path)
    release(tmp_path / "solutions", tmp_path / "b")
    a, b = ((tmp_path / d / "deep" / "n.ipynb").read_bytes() for d in "ab")
    assert a == b
    assert a.endswith(b"}\n") and not a.endswith(b"\n\n")


@pytest.mark.parametrize(
    ("source", "metadata", "complaint"),
    [
        ("### BEGIN SOLUTION\nx = 1", ANSWER, "without '### END SOLUTION' after it"),
        ("### END SOLUTION", ANSWER, "without '### BEGIN SOLUTION' before it"),
        ("### BEGIN SOLUTION\n### BEGIN SOLUTION", ANSWER, "twice"),
        ("### BEGIN HIDDEN TESTS\nassert 1", TEST, "without '### END HIDDEN TESTS' after it"),
        ("### BEGIN SOLUTION\nx = 1\n### END SOLUTION", {}, "solution=true"),
    ],
)
def test_a_malformed_exercise_is_named_and_nothing_is_written(
    tmp_path, source, metadata, complaint
):
    write_solution(tmp_path / "solutions" / "a.ipynb", new_code_cell("fine = 1"))
    write_solution(tmp_path / "solutions" / "z.ipynb", new_code_cell(source, metadata=metadata))
    with pytest.raises(ReleaseError, match=r"z\.ipynb, cell 0 \(id cell-0\)") as error:
        release(tmp_path / "solutions", tmp_path / "labs")
    assert complaint in str(error.value)
    assert not (tmp_path / "labs").exists()


def test_a_notebook_without_cell_ids_is_refused(tmp_path):
    old = {"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": []}
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / "n.ipynb").write_text(json.dumps(old))
    with pytest.raises(ReleaseError, match=r"4\.5"):
        release(tmp_path / "solutions", tmp_path / "labs")


def test_the_set_up_cell_is_brought_up_to_date_and_nothing_else(tmp_path):
    old = new_code_cell('if "COLAB_RELEASE_TAG" in os.environ: ...', execution_count=1)
    rest = new_code_cell("1 + 1", outputs=[new_output("stream", text="2")], execution_count=2)
    write_solution(tmp_path / "n.ipynb", new_markdown_cell("# Title"), old, rest)
    assert write_setup_cells(tmp_path) == [tmp_path / "n.ipynb"]
    _, setup, after = nbformat.read(tmp_path / "n.ipynb", as_version=4).cells
    assert (setup.source, setup.execution_count) == (colab.setup_cell(), 1)
    assert after.outputs[0].text == "2"
    assert write_setup_cells(tmp_path) == []


def test_a_notebook_without_a_set_up_cell_is_named(tmp_path):
    write_solution(tmp_path / "n.ipynb", new_code_cell("1 + 1"))
    with pytest.raises(
        ReleaseError, match=r"n\.ipynb: its first code cell \(id cell-0\) is no set-up"
    ):
        write_setup_cells(tmp_path)


def test_a_title_gets_a_badge_and_another_address_another_badge(tmp_path, monkeypatch):
    monkeypatch.setattr(colab, "repository", lambda: "https://github.com/me/mine")
    first = released(tmp_path, new_markdown_cell("# Title\n\nText.")).cells[0].source
    title, _, badge, *text = first.split("\n")
    assert (title, text) == ("# Title", ["", "Text."])
    assert f"/github/me/mine/blob/{colab.tag()}/labs/n.ipynb" in badge
    assert "https://github.com/me/mine" in colab.setup_cell()


def test_labs_are_what_solutions_generate(tmp_path):
    generated = release(ROOT / "solutions", tmp_path)
    assert generated, "no notebooks in solutions/"
    for path in generated:
        name = path.relative_to(tmp_path)
        lab = ROOT / "labs" / name
        # A student who worked in labs/ has changed the file, not what is committed.
        versions = [lab.exists() and lab.read_bytes(), committed(f"labs/{name.as_posix()}")]
        assert path.read_bytes() in versions, f"labs/{name} is out of date: run `course release`"


def committed(path: str) -> bytes | None:
    git = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True)
    return git.stdout if git.returncode == 0 else None


def test_every_committed_lab_has_a_solution():
    listing = subprocess.run(
        ["git", "ls-files", "labs"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    labs = {Path(p).relative_to("labs") for p in listing if p.endswith(".ipynb")}
    solutions = {p.relative_to(ROOT / "solutions") for p in (ROOT / "solutions").rglob("*.ipynb")}
    assert labs <= solutions


def test_every_code_cell_of_a_solution_has_been_run():
    # nbval compares no outputs of a cell that was never run, so an unrun one would test nothing.
    for path in (ROOT / "solutions").rglob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                assert cell.execution_count is not None, f"{path.name}: cell {cell.id} was not run"
