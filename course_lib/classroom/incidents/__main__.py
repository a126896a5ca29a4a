"""Record the incidents that ship, into `data/incidents`:

python -m course_lib.classroom.incidents practice engine --count 2

The simulator's are the same each time. The engine's depend on how fast this machine is.
"""

import argparse
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from course_lib.classroom.incidents.bank import INCIDENTS_DIR, SOURCES, SPLITS, record, save
from course_lib.classroom.incidents.records import CAUSES, Case


def main() -> None:
    """Read the arguments, record, write."""
    parser = argparse.ArgumentParser(description="Record the incidents of one split and source.")
    parser.add_argument("split", choices=SPLITS)
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("--count", type=int, default=2, help="incidents of each cause")
    parser.add_argument("--each", type=int, default=1, help="at most so many of one run")
    parser.add_argument("--directory", type=Path, default=INCIDENTS_DIR)
    args = parser.parse_args()
    cases: list[Case] = []
    for cause in tqdm(CAUSES, unit="cause"):
        cases += record(args.source, cause, args.split == "held_out", args.count, args.each)
    origin = {
        "command": " ".join(["python -m course_lib.classroom.incidents", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
    }
    print(save(args.split, args.source, cases, origin, args.directory))


if __name__ == "__main__":
    main()
