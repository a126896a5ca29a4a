"""The course as a student's process may see it: without what is asked, and without the oracles.

`copy_course` writes `course_lib` and `kernels` to a folder, and of the classroom only what answers
and their stands need. `copy_without` is for one exercise: in the modules of the references named,
the reference and the functions beside it keep their names and lose their bodies.
"""

import ast
import compileall
import shutil
from collections.abc import Iterable
from pathlib import Path

from course_lib.data import DATA_DIR

REFUSAL = "the course's own version is not there while it is graded; write it without"

#: Of `course_lib/classroom`, under which name and from where: the rest stays out of the student's
#: process, the oracles above all.
CLASSROOM = {
    "__init__.py": "__init__.py",
    "checks.py": "grading/checks_while_graded.py",
    "parts.py": "parts.py",
    "source.py": "source.py",
    "stands.py": "stands.py",
    "grading/__init__.py": "grading/__init__.py",
    "grading/answering.py": "grading/answering.py",
    "incidents/__init__.py": "incidents/__init__.py",
    "incidents/records.py": "incidents/records.py",
}

#: Of `data/`: incidents with their causes are what C1 asks for.
HIDDEN_DATA = ("incidents",)

_ROOT = DATA_DIR.parent


def visible_data() -> list[Path]:
    """Folders of `data/` that answers may read."""
    return sorted(path for path in DATA_DIR.iterdir() if path.name not in HIDDEN_DATA)


def copy_course(folder: Path) -> Path:
    """Write the course without its oracles, and its bytecode: where it is used it is read-only.

    Without the C++ sources too: they would be compiled for each exercise anew, and they hold an
    attention that is no answer. PyTorch's operations take their place.
    """
    classroom = _ROOT / "course_lib" / "classroom"

    def left_out(at: str, names: list[str]) -> list[str]:
        paths = [Path(at, name) for name in names]
        return [
            path.name
            for path in paths
            if path.name == "__pycache__" or path.suffix == ".cpp" or path == classroom
        ]

    for package in ("course_lib", "kernels"):
        shutil.copytree(_ROOT / package, folder / package, ignore=left_out)
    for name, source in CLASSROOM.items():
        target = folder / "course_lib" / "classroom" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(classroom / source, target)
    (folder / "data").mkdir()
    for data in visible_data():
        (folder / "data" / data.name).symlink_to(data)
    compileall.compile_dir(folder, quiet=2)
    return folder


def copy_without(references: Iterable[str], copy: Path, folder: Path) -> Path:
    """Write what `copy_course` wrote without the references, each "module:name"."""
    shutil.copytree(copy, folder, symlinks=True)
    for reference in references:
        module, name = reference.split(":")
        path = folder / (module.replace(".", "/") + ".py")
        if path.exists():  # those of the classroom are not there at all
            path.write_text(without_bodies(path.read_text(encoding="utf-8"), name), "utf-8")
            for bytecode in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
                bytecode.unlink()
            compileall.compile_file(path, quiet=2)
    return folder


def without_bodies(source: str, name: str) -> str:
    """A module whose functions refuse, and so do the methods of the class `name`, if it is one."""
    tree = ast.parse(source)
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            _empty(statement)
        elif isinstance(statement, ast.ClassDef) and statement.name == name:
            for inner in statement.body:
                if isinstance(inner, ast.FunctionDef):
                    _empty(inner)
    return ast.unparse(tree) + "\n"


def _empty(function: ast.FunctionDef) -> None:
    function.body = ast.parse(f"raise RuntimeError({REFUSAL!r})").body
