"""The points of the checks that have passed, noted beside the student's parts.

They are for the student's eyes: an instructor grades the notebooks afresh.
"""

import json
import os
from collections.abc import Mapping

from course_lib.classroom.parts import parts_dir

FILE = "points.json"


def points_so_far() -> Mapping[str, float]:
    """Points by exercise; nothing of a file that cannot be read."""
    try:
        noted = json.loads((parts_dir() / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def note_points(exercise_id: str, points: float) -> None:
    """Note that an exercise has passed. A place that cannot be written to costs no points."""
    noted = {**points_so_far(), exercise_id: points}
    path = parts_dir() / FILE
    draft = path.with_suffix(f".{os.getpid()}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        print(f"The points so far could not be noted: {error}")
