"""The incidents that ship: some with their causes for practice, others held out for the check.

    cases = load("practice")

They were recorded once by `python -m course_lib.classroom.incidents`; `data/incidents/README.md`
says when and where. `fresh` makes new ones with the simulator, quickly.
"""

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from course_lib.classroom.incidents.conditions import choose, make_condition
from course_lib.classroom.incidents.records import CAUSES, Case, cut, from_json, to_json
from course_lib.classroom.incidents.simulated import draw_gpu, run_simulated
from course_lib.data import DATA_DIR
from course_lib.validation import known_name

INCIDENTS_DIR = DATA_DIR / "incidents"
SPLITS = ("practice", "held_out")
SOURCES = ("simulator", "engine")

#: A condition in which no request turned out slow is drawn anew, at most so often.
ATTEMPTS = 20


def load(split: str, directory: Path = INCIDENTS_DIR) -> list[Case]:
    """The recorded incidents, those of the real engine among them.

    Args:
        split: "practice" or "held_out".
        directory: where they are.

    Raises:
        ValueError: there is no such split.
    """
    known_name("split", split, SPLITS)
    cases = []
    for source in SOURCES:
        stored = json.loads(gzip.decompress(_path(split, source, directory).read_bytes()))
        cases += [
            Case(from_json(case["incident"]), case["cause"], source) for case in stored["cases"]
        ]
    random.Random(split).shuffle(cases)
    name = split.replace("_", "-")
    return [
        replace(case, incident=replace(case.incident, name=f"{name} incident {number}"))
        for number, case in enumerate(cases, start=1)
    ]


def save(
    split: str, source: str, cases: Sequence[Case], origin: dict[str, Any], directory: Path
) -> Path:
    """Write the incidents of one split and source; `origin` says how they came to be."""
    path = _path(split, source, directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = [{"cause": case.cause, "incident": to_json(case.incident)} for case in cases]
    text = json.dumps({**origin, "cases": stored}, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


def _path(split: str, source: str, directory: Path) -> Path:
    return directory / f"{split}-{source}.json.gz"


def fresh(
    rng: random.Random, *, held_out: bool, causes: Sequence[str] = tuple(CAUSES)
) -> Iterator[Case]:
    """A new incident of each cause, simulated."""
    for cause in causes:
        (case,) = _cases("simulator", cause, rng, held_out, 1)
        yield case


def record(source: str, cause: str, held_out: bool, count: int, each: int = 1) -> Iterator[Case]:
    """Make incidents of one cause; the same arguments give the same conditions.

    Those of the engine are sized by its speed on this machine, so they are similar, not the same.

    Args:
        source: "simulator" or "engine".
        cause: one of `CAUSES`.
        held_out: draw from the ranges that are not for practice.
        count: how many incidents.
        each: at most so many requests of one run.
    """
    rng = random.Random(f"{source}/{cause}/{held_out}")
    made = 0
    while made < count:
        for case in _cases(source, cause, rng, held_out, min(each, count - made)):
            made += 1
            yield case


def _cases(source: str, cause: str, rng: random.Random, held_out: bool, count: int) -> list[Case]:
    for _ in range(ATTEMPTS):
        if source == "simulator":
            gpu = draw_gpu(rng, held_out)
            condition = make_condition(cause, rng, gpu.pace, held_out)
            run = run_simulated(condition, gpu.step_time, rng.getrandbits(32))
        else:
            # These need PyTorch.
            from course_lib.classroom.incidents.engine_pace import engine_pace
            from course_lib.classroom.incidents.real import run_real

            condition = make_condition(cause, rng, engine_pace(), held_out)
            run = run_real(condition, rng.getrandbits(32))
        chosen = choose(condition, run, rng, count)
        if chosen:
            return [Case(cut(run, request, "new incident"), cause, source) for request in chosen]
    raise RuntimeError(f"{ATTEMPTS} conditions of {cause!r} in a row made no request slow")
