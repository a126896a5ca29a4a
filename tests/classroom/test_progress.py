"""Points so far, and the table of points and parts in a notebook."""

import pytest

from course_lib.classroom import progress
from course_lib.classroom.checks import CheckFailed, check
from course_lib.classroom.parts import PARTS
from course_lib.classroom.points import FILE, note_points, points_so_far
from course_lib.classroom.progress import dashboard, exercises_of_notebooks
from tests.classroom import answers_a1


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    return tmp_path


def test_a_check_that_passes_notes_its_points_and_others_do_not(folder):
    with pytest.raises(CheckFailed):
        check("A1.1", answers_a1.WRONG["A1.1"][0])
    assert points_so_far() == {} and not list(folder.iterdir())
    check("A1.1", answers_a1.RIGHT["A1.1"][0])
    assert points_so_far() == {"A1.1": 2}


def test_points_are_kept_beside_each_other(folder):
    note_points("A1.1", 2)
    note_points("B2.1", 3)
    assert points_so_far() == {"A1.1": 2, "B2.1": 3}
    assert [path.name for path in folder.iterdir()] == [FILE]


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_damaged_file_counts_as_none(folder, text):
    (folder / FILE).write_text(text)
    assert points_so_far() == {}
    note_points("A1.1", 2)
    assert points_so_far() == {"A1.1": 2}


def test_a_place_that_cannot_be_written_to_costs_no_points(folder, monkeypatch, capsys):
    (folder / "file").write_text("")
    monkeypatch.setenv("COURSE_PARTS_DIR", str(folder / "file" / "parts"))
    assert check("A1.1", answers_a1.RIGHT["A1.1"][0]) == 2
    assert "could not be noted" in capsys.readouterr().out


def test_the_dashboard_shows_points_and_parts_and_the_source_of_ones_own(folder):
    possible = sum(e.points for found in exercises_of_notebooks().values() for e in found)
    note_points("A1.1", 2)
    (folder / "scheduler.py").write_text("def mine(): ...\n\nPART = mine\n")
    table = dashboard()
    assert f"Points so far: 2 of {possible}" in table.text
    assert "A1.1 ✓" in table.text and "A1.2 –" in table.text
    assert f"Parts of your own: 1 of {len(PARTS)}" in table.text
    assert table.text.count("<b>your own</b>") == 1
    table.widgets["name"].value = "scheduler"
    assert "def mine(): ..." in table.text
    table.widgets["name"].value = "diagnose"
    assert "You build yours in C1" in table.text and "def diagnose(" not in table.text
    assert table._repr_mimebundle_()["text/html"].count("<table ") == 2


def test_every_notebook_with_exercises_is_in_it():
    found = exercises_of_notebooks()
    assert list(found) == sorted(found) and {"A1", "A2", "B1", "C1"} <= set(found)
    assert all(e.id.startswith(f"{name}.") for name, rows in found.items() for e in rows)
    assert progress.NONE not in [part.name for part in PARTS]
