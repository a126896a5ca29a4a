"""Startup logs made up from a seed, in the words of `course serve`, with what is in them.

    log = make_log(random.Random(7), starts=5)
    log.text, log.starts

They have what real logs have: several replicas that write at once, starts that fail, a phase in
several lines, and other lines between. The recorded logs of real starts are in `data/startup_logs`.
"""

import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from course_lib.data import DATA_DIR
from course_lib.engine.startup import StartUp

STARTUP_LOGS = DATA_DIR / "startup_logs"

#: Phases in their order, with milliseconds that they take at least and at most: from a small model
#: on a CPU to a large one on GPUs. The weights come in up to four lines.
_PHASES_MS = {
    "imports": (1500, 9000),
    "checkpoint": (1, 900),
    "tokenizer": (5, 2000),
    "weights": (400, 80_000),
    "kv_cache": (20, 6000),
    "cuda_graphs": (2000, 30_000),
    "warm_up": (100, 15_000),
}

_OTHERS = (
    "WARNING a request failed with TimeoutError",
    "INFO scaled 1 -> 2",
    'INFO request 7 of tenant "phase=weights seconds=99.000" was admitted',
    "ERROR startup pid={pid} phase=weights seconds=12.000 was not enough, giving up",
    "INFO shutdown pid={pid} phase=drain seconds=3.000",
    "merchant-chat in float32 on cpu, attention by TORCH_SDPA",
    "",
)


@dataclass(frozen=True)
class StartUpLog:
    """A log, and the starts in it that became ready."""

    text: str
    starts: list[StartUp]


def make_log(rng: random.Random, starts: int, *, same_pid: bool = False) -> StartUpLog:
    """A log of so many starts that became ready, and of a few that did not.

    Args:
        rng: of all that is drawn.
        starts: how many.
        same_pid: every process has the number 1, as in containers; then they start one by one.
    """
    began = datetime(2026, 11, 25, 23, rng.randrange(60), rng.randrange(60))
    lines: list[tuple[datetime, str]] = []
    found: list[tuple[datetime, StartUp]] = []
    fails = [rng.random() < 0.3 for _ in range(starts)]
    pids = rng.sample(range(10, 9999), 2 * starts)
    mentioned = [1, *pids]
    for number in range(starts):
        for failed in ([True] if fails[number] else []) + [False]:
            pid = 1 if same_pid else pids.pop()
            end, start = _write_start(rng, lines, began, pid, failed)
            if start is not None:
                found.append((end, start))
            # The next one begins while this one is under way, if their numbers tell them apart.
            span_ms = int((end - began) / timedelta(milliseconds=1))
            began += timedelta(milliseconds=span_ms + 1000 if same_pid else rng.randrange(span_ms))
    first, last = min(lines)[0], max(lines)[0]
    for other in rng.choices(_OTHERS, k=3 * starts):
        at = first + (last - first) * rng.random()
        lines.append((at, f"{_time(at)} {other.format(pid=rng.choice(mentioned))}"))
    lines.sort(key=lambda line: line[0])
    found.sort(key=lambda one: one[0])
    return StartUpLog("".join(f"{line}\n" for _, line in lines), [start for _, start in found])


def _write_start(
    rng: random.Random, lines: list[tuple[datetime, str]], at: datetime, pid: int, failed: bool
) -> tuple[datetime, StartUp | None]:
    """Add the lines of one start; returns its end, and the start if it became ready."""
    began, phases_ms = at, dict[str, int]()
    on_gpu = rng.random() < 0.5
    names = [name for name in _PHASES_MS if on_gpu or name != "cuda_graphs"]
    if failed:
        names = names[: rng.randint(1, len(names) - 1)]
    for name in names:
        for _ in range(rng.randint(1, 4) if name == "weights" else 1):
            spent_ms = rng.randint(*_PHASES_MS[name])
            phases_ms[name] = phases_ms.get(name, 0) + spent_ms
            at += timedelta(milliseconds=spent_ms)
            seconds = f"{spent_ms // 1000}.{spent_ms % 1000:03}"
            lines.append((at, f"{_time(at)} INFO startup pid={pid} phase={name} seconds={seconds}"))
        at += timedelta(milliseconds=rng.randint(1, 400))  # that no phase covers
    if failed:
        return at, None
    ready_ms = round((at - began) / timedelta(milliseconds=1))
    seconds = f"{ready_ms // 1000}.{ready_ms % 1000:03}"
    lines.append((at, f"{_time(at)} INFO startup pid={pid} ready seconds={seconds}"))
    phases = {name: spent_ms / 1000 for name, spent_ms in phases_ms.items()}
    return at, StartUp(pid, phases, ready_ms / 1000)


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03}"


def recorded_log(name: str) -> str:
    """The text of a log of `data/startup_logs`.

    Raises:
        ValueError: there is none of that name; the message lists them.
    """
    path = STARTUP_LOGS / Path(name).name
    if not path.is_file():
        known = ", ".join(sorted(found.name for found in STARTUP_LOGS.glob("*.log")))
        raise ValueError(f"there is no startup log {name!r}; there are {known}")
    return path.read_text(encoding="utf-8")
