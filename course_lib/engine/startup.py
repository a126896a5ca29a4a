"""What a start spends its time on: a log line for each phase, and how to read them again.

    2026-11-25 09:00:12.250 INFO startup pid=4711 phase=weights seconds=12.310
    2026-11-25 09:00:15.020 INFO startup pid=4711 ready seconds=18.402

`course serve` writes them. In a program of your own they go wherever `logging` sends the level INFO
of `course_lib`. `ready` counts from the start of the process, so it is more than the phases' sum by
what no phase covers.
"""

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

logger = logging.getLogger(__name__)

_IMPORTED_S = time.monotonic()

_LINE = re.compile(r"^\S+ \S+ INFO startup pid=(\d+) (?:phase=(\S+)|ready) seconds=([\d.]+)$")


@dataclass(frozen=True)
class StartUp:
    """One start of a server that became ready.

    Args:
        pid: of its process.
        phases: seconds of each, in the order of the log; one that is logged twice is added up.
        ready_s: from the start of the process until it was ready.
    """

    pid: int
    phases: Mapping[str, float]
    ready_s: float

    @property
    def other_s(self) -> float:
        """Seconds that no phase covers."""
        return self.ready_s - sum(self.phases.values())


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Log how long the block took, if it ends without an error."""
    start = time.perf_counter()
    yield
    log_phase(name, time.perf_counter() - start)


def log_phase(name: str, seconds: float) -> None:
    """Log a phase that was timed elsewhere."""
    logger.info("startup pid=%d phase=%s seconds=%.3f", os.getpid(), name, seconds)


def log_ready() -> None:
    """Log that requests are served from now on."""
    logger.info("startup pid=%d ready seconds=%.3f", os.getpid(), process_age_s())


def process_age_s() -> float:
    """Seconds since this process began; on systems that do not say, since this was imported.

    Linux says it in the 22nd field of /proc/self/stat, in clock ticks since the machine's start.
    """
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            after_name = file.read().rpartition(")")[2].split()  # begins with the third field
        began_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began_s
    except (OSError, AttributeError):
        return time.monotonic() - _IMPORTED_S


def log_to_stderr() -> None:
    """Send the course's log lines of level INFO and above to stderr, with time and level."""
    logging.basicConfig(
        format="%(asctime)s.%(msecs)03d %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
    )
    logging.getLogger("course_lib").setLevel(logging.INFO)


def parse_startup_log(text: str) -> list[StartUp]:
    """The starts that became ready, in that order.

    Several processes may write into one log; whatever else is in it is skipped.
    """
    phases: dict[int, dict[str, float]] = {}
    starts = []
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        pid, name, seconds = int(found[1]), found[2], float(found[3])
        if name == "imports":  # the first phase: what this process number began before has failed
            phases.pop(pid, None)
        of_process = phases.setdefault(pid, {})
        if name is None:
            starts.append(StartUp(pid, phases.pop(pid), seconds))
        else:
            of_process[name] = of_process.get(name, 0.0) + seconds
    return starts
