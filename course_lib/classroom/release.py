"""Makes the student notebooks in `labs/` from the complete ones in `solutions/`.

`release("solutions", "labs")` writes every notebook under the same relative path, with solutions
replaced by a stub, hidden tests removed, outputs cleared and a badge for Colab under the title. The
markers and the cell metadata are nbgrader's. The same solutions give the same bytes, whoever runs
it and with whichever Python. `write_setup_cells` before it keeps the first code cell of all
notebooks the same.
"""

from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course_lib.classroom.colab import BADGE_FILE, badge, setup_cell

CODE_STUB = "# YOUR CODE HERE\nraise NotImplementedError()"
TEXT_STUB = "YOUR ANSWER HERE"
SOLUTION = ("### BEGIN SOLUTION", "### END SOLUTION")
HIDDEN_TESTS = ("### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS")
# What tools note while a notebook runs (timings, scrolling, trust) stays behind.
KEPT_METADATA = {"nbgrader", "tags", "deletable", "editable", "jupyter", "cellView"}


class ReleaseError(ValueError):
    """A solution notebook cannot be released; the message names the notebook and the cell."""


def write_setup_cells(solutions_dir: str | Path) -> list[Path]:
    """Bring the set-up cell of every notebook up to date and return the paths that changed.

    Outputs stay: where the course is installed, the cell has none. Raises `ReleaseError` if the
    first code cell of a notebook is not a set-up cell.
    """
    changed = []
    for path in _notebooks(Path(solutions_dir)):
        notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
        if "COLAB_RELEASE_TAG" not in cell.source:
            raise ReleaseError(f"{path}: its first code cell (id {cell.id}) is no set-up cell")
        if cell.source != setup_cell():
            cell.source = setup_cell()
            path.write_text(_text(notebook), encoding="utf-8", newline="\n")
            changed.append(path)
    return changed


def release(solutions_dir: str | Path, labs_dir: str | Path) -> list[Path]:
    """Write the student version of every notebook and return the paths that changed.

    Notebooks in `labs_dir` without a counterpart in `solutions_dir` are left alone. Raises
    `ReleaseError` before anything is written if one of the notebooks cannot be released.
    """
    solutions_dir, labs_dir = Path(solutions_dir), Path(labs_dir)
    released = {
        labs_dir / path.relative_to(solutions_dir): student_version(
            path, path.relative_to(solutions_dir)
        )
        for path in _notebooks(solutions_dir)
    }
    if (solutions_dir / BADGE_FILE).exists():
        released[labs_dir / BADGE_FILE] = (solutions_dir / BADGE_FILE).read_text(encoding="utf-8")
    changed = [
        path
        for path, text in released.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(released[path], encoding="utf-8", newline="\n")
    return changed


def _notebooks(folder: Path) -> list[Path]:
    paths = sorted(folder.rglob("*.ipynb"))
    return [path for path in paths if ".ipynb_checkpoints" not in path.parts]


def student_version(path: Path, lab: Path | None = None) -> str:
    """The student version of one solution notebook, as the text of an `.ipynb` file.

    Args:
        path: of the solution.
        lab: path in `labs/` that the badge opens; without it there is no badge.
    """
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    if (notebook.nbformat, notebook.nbformat_minor) < (4, 5):
        raise ReleaseError(f"{path}: needs notebook format 4.5, whose cells have ids that last")
    for index, cell in enumerate(notebook.cells):
        try:
            _release_cell(cell)
        except ReleaseError as error:
            raise ReleaseError(f"{path}, cell {index} (id {cell.id}): {error}") from None
    title = notebook.cells[0] if notebook.cells else None
    if lab and title and title.cell_type == "markdown":
        first, *rest = title.source.split("\n")
        title.source = "\n".join([first, "", badge(lab), *rest])
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    return _text(notebook)


def _text(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def _release_cell(cell: NotebookNode) -> None:
    is_answer = cell.metadata.get("nbgrader", {}).get("solution", False)
    stub = CODE_STUB if cell.cell_type == "code" else TEXT_STUB
    source = _replace_regions(cell.source, HIDDEN_TESTS, None)
    without_solution = _replace_regions(source, SOLUTION, stub)
    if without_solution != source and not is_answer:
        raise ReleaseError("has a solution region, but its nbgrader metadata lack solution=true")
    if without_solution == source and is_answer:
        without_solution = stub  # as nbgrader does: without a region, all of it is the solution
    cell.source = without_solution

    cell.metadata = NotebookNode(
        {key: value for key, value in cell.metadata.items() if key in KEPT_METADATA}
    )
    if cell.cell_type == "code":
        cell.outputs = []
        cell.execution_count = None


def _replace_regions(source: str, markers: tuple[str, str], stub: str | None) -> str:
    """Replace each marked region, markers included, by the stub at the region's indentation."""
    begin, end = markers
    kept: list[str] = []
    inside = False
    for line in source.splitlines():
        marker = line.strip()
        if marker == begin:
            if inside:
                raise ReleaseError(f"'{begin}' twice without '{end}' between")
            inside = True
            indentation = line[: len(line) - len(line.lstrip())]
            if stub is not None:
                kept += [indentation + stub_line for stub_line in stub.splitlines()]
        elif marker == end:
            if not inside:
                raise ReleaseError(f"'{end}' without '{begin}' before it")
            inside = False
        elif not inside:
            kept.append(line)
    if inside:
        raise ReleaseError(f"'{begin}' without '{end}' after it")
    return "\n".join(kept).rstrip("\n") if stub is None else "\n".join(kept)
