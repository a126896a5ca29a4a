"""nbgrader beside us: a course in its layout, released and graded by nbgrader itself.

It may live in an environment of its own, as in CI: its packages are none of the course's. Its
kernels run in ours.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def find_nbgrader() -> Path | None:
    """The program, on the path or in `.venv/nbgrader`; None if it is not there."""
    own = ROOT / ".venv" / "nbgrader" / "bin" / "nbgrader"
    found = shutil.which("nbgrader") or (str(own) if own.exists() else None)
    return Path(found) if found else None


@dataclass(frozen=True)
class NbgraderCourse:
    """A course folder: `source`, `release`, `submitted`, `autograded`.

    Args:
        folder: of the course.
        program: `nbgrader`.
    """

    folder: Path
    program: Path

    def release(self, assignment: str) -> None:
        """Make the student version of an assignment, and enter it into the gradebook."""
        self._run("generate_assignment", assignment, f"--course-dir={self.folder}")

    def autograde(self, assignment: str) -> None:
        """Grade all that was handed in."""
        self._run("autograde", assignment, f"--course-dir={self.folder}")

    def scores(self) -> dict[str, float]:
        """Points of each student, as nbgrader exports them."""
        path = self.folder / "scores.csv"
        self._run("export", "--to", str(path), f"--CourseDirectory.root={self.folder}")
        with path.open(newline="") as file:
            return {line["student_id"]: float(line["score"]) for line in csv.DictReader(file)}

    def _run(self, *arguments: str) -> None:
        kernel = self.folder / "jupyter" / "kernels" / "python3" / "kernel.json"
        kernel.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        kernel.write_text(json.dumps({"argv": command, "display_name": "Python 3"}))
        environment = {
            **os.environ,
            "PATH": f"{self.program.parent}:{os.environ['PATH']}",  # it calls programs beside it
            "JUPYTER_PATH": str(self.folder / "jupyter"),
            "COURSE_PARTS_DIR": str(self.folder / "my_engine"),
        }
        done = subprocess.run(
            [str(self.program), *arguments], cwd=self.folder, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"nbgrader {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
