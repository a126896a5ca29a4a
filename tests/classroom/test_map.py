"""The map in `00_start_here` names all seventeen notebooks and says truly which are there."""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = nbformat.read(ROOT / "solutions" / "00_start_here.ipynb", as_version=4)
MAP = next(cell.source for cell in NOTEBOOK.cells if cell.id == "map")
ROWS = [row for row in MAP.splitlines() if re.match(r"\| \[?[ABC]\d ", row)]


def test_all_seventeen_notebooks_are_named_in_order():
    labs = {"A": 5, "B": 6, "C": 6}
    names = [f"{lab}{number}" for lab, count in labs.items() for number in range(1, count + 1)]
    assert [re.search(r"[ABC]\d", row).group() for row in ROWS] == names


def test_a_notebook_is_linked_if_it_is_there_and_coming_if_not():
    solutions = ROOT / "solutions"
    found = {path.relative_to(solutions).as_posix() for path in solutions.rglob("*.ipynb")}
    there = {name for name in found if "checkpoint" not in name} - {"00_start_here.ipynb"}
    linked = set(re.findall(r"\(([\w./-]+\.ipynb)\)", MAP))
    assert linked == there, "link the notebook in the map of solutions/00_start_here.ipynb"
    assert sum("*coming*" in row for row in ROWS) == 17 - len(there)
