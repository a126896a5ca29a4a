"""The oracle of B4.3: logs that were made up, so that what is in them is known."""

import random
from collections.abc import Callable, Mapping
from typing import Any

from course_lib.classroom.checks import Mismatch
from course_lib.classroom.startup_logs import StartUpLog, make_log
from course_lib.engine.startup import StartUp


def verify_startup_log(answer: Callable[..., Any], rng: random.Random) -> None:
    """One start alone, then several at once, then those of containers; and an empty log."""
    for number in range(40):
        log = make_log(rng, starts=1 + number % 6, same_pid=number % 3 == 2)
        _compare_starts(answer(log.text), log)
    if (got := answer("")) != []:
        raise Mismatch(f"parse_startup_log of an empty log: expected [], got {got!r}")


def _compare_starts(got: Any, log: StartUpLog) -> None:
    where = f"parse_startup_log of this log:\n{log.text}"
    try:
        found = list(got)
        pids = [start.pid for start in found]
    except (TypeError, AttributeError):
        raise Mismatch(
            f"expected a list of StartUp, got {got!r}", "Return [StartUp(pid, phases, ready_s)]."
        ) from None
    expected = [start.pid for start in log.starts]
    if pids != expected:
        raise Mismatch(
            f"{where}expected the starts of the processes {expected}, got {pids}",
            _hint_for_pids(pids, expected),
        )
    for have, want in zip(found, log.starts, strict=True):
        _compare_start(have, want, log, where)


def _hint_for_pids(pids: list[Any], expected: list[int]) -> str | None:
    if [str(pid) for pid in pids] == [str(pid) for pid in expected]:
        return "The pid is a number: int(found[1])."
    if not pids:
        return "A start ends with its line `ready seconds=...`, which makes one StartUp."
    if sorted(pids, key=str) == sorted(expected, key=str):
        return "They come in the order in which they became ready."
    if len(pids) > len(expected):
        return "A start that never became ready is none, and other lines are to be skipped."
    return "Each start that became ready counts, also a later one with the same pid."


def _compare_start(got: Any, want: StartUp, log: StartUpLog, where: str) -> None:
    phases = getattr(got, "phases", None)
    at = f"{where}process {want.pid}: "
    if not isinstance(phases, Mapping):
        raise Mismatch(f"{at}expected phases as a dict, got {phases!r}")
    if set(phases) != set(want.phases):
        missing, superfluous = set(want.phases) - set(phases), set(phases) - set(want.phases)
        hint = None
        if superfluous:
            hint = "Only lines `INFO startup pid=... phase=...` with nothing behind the seconds."
        if superfluous and want.pid == 1:
            hint = "`imports` begins a start: what the same pid logged before has failed."
        if missing:
            hint = "Phases have any name without spaces; take all that the process logged."
        raise Mismatch(f"{at}expected the phases {list(want.phases)}, got {list(phases)}", hint)
    for name, seconds in want.phases.items():
        if not _equal(phases[name], seconds):
            raise Mismatch(
                f"{at}expected {name} to take {seconds:.3f} s, got {phases[name]!r}",
                _hint_for_seconds(phases[name], seconds, want.pid),
            )
    if list(phases) != list(want.phases):
        raise Mismatch(
            f"{at}expected the phases in the order {list(want.phases)}, got {list(phases)}",
            "In the order of the log, which a dict keeps.",
        )
    if not _equal(getattr(got, "ready_s", None), want.ready_s):
        raise Mismatch(
            f"{at}expected ready_s {want.ready_s:.3f}, got {getattr(got, 'ready_s', None)!r}",
            "ready_s is the number in the line `ready seconds=...`.",
        )


def _hint_for_seconds(got: Any, want: float, pid: int) -> str | None:
    if isinstance(got, str):
        return "Seconds are numbers: float(found[3])."
    if pid == 1 and isinstance(got, int | float) and got > want:
        return "`imports` begins a start: what the same pid logged before has failed."
    if isinstance(got, int | float) and got < want:
        return "A phase may have several lines: add them up. And the part behind the point counts."
    return "Keep what each pid logs apart, and skip lines that are no phases."


def _equal(got: Any, want: float) -> bool:
    return isinstance(got, int | float) and abs(got - want) < 1e-6
