"""What happens next in a simulation: one queue of events in the order of time.

Events of the same moment happen in the order of their `Rank`, then in that of their number: those
of replicas by the replica's number, others as they were planned. So the order does not depend on
how many events there were in between, and jumping over steps does not change it.
"""

import heapq
import itertools
import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any


class Rank(IntEnum):
    """What comes first in one moment."""

    STEP = 0  # a replica ends a step
    CAPACITY = 1  # a replica is ready, is taken away, a region goes down or comes back
    REQUEST = 2  # a request moves on its way to a replica
    ARRIVAL = 3  # a request comes in
    BEGIN = 4  # an idle replica begins a step, with all that have arrived
    SCRAPE = 5  # metrics are read, autoscalers decide


class EventQueue:
    """Calls to be made, each at its time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = itertools.count()

    def plan(self, time_s: float, rank: Rank, act: Callable[..., None], *args: Any) -> None:
        """Call `act(*args)` at that time; never if it is infinite."""
        if time_s < math.inf:
            number = next(self._count)
            heapq.heappush(self._heap, (time_s, rank, number, 0, act, args))

    def plan_step(
        self, time_s: float, replica: int, version: int, act: Callable[..., None], *args: Any
    ) -> None:
        """The same for the end of a step of the n-th replica; no two have the same version."""
        if time_s < math.inf:
            heapq.heappush(self._heap, (time_s, Rank.STEP, replica, version, act, args))

    def next_before(self, time_s: float, rank: Rank) -> bool:
        """Whether an event comes before one of that time and rank would."""
        return bool(self._heap) and self._heap[0][:2] < (time_s, rank)

    @property
    def next_s(self) -> float:
        """When the next event is; infinite if there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def pop(self) -> tuple[float, Callable[..., None], tuple[Any, ...]]:
        """Take the next event: its time, and what to call."""
        time_s, _, _, _, act, args = heapq.heappop(self._heap)
        return time_s, act, args
