"""Regions with replicas of their own, how far apart they are, and what happens when one is down.

Each request goes to its own region while that has replicas in rotation, otherwise to the nearest
other one: `RegionFailover` routes so, and within a region as the router that it is given.

Who knows what: at an outage's `start_s` all replicas of the region are gone, and with them what
they were serving. Health checks notice it `detection_s` later and take them out of rotation. In
between the gateway still sends requests there, and each comes back for another try when connecting
has timed out. A router knows only what is in rotation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from course_lib.fleet.router import ReplicaView, RoutedRequest, Router, RouterBase
from course_lib.validation import number, whole_number

#: Three failed health checks ten seconds apart: what Kubernetes' readiness probes do by default,
#: and the fast checks of Amazon Route 53.
DETECTION_S = 30.0


@dataclass(frozen=True)
class Region:
    """A place with replicas of its own.

    Args:
        name: as requests name it.
        replicas: warm there at the beginning.
        round_trip_s: over the network to each other region, by name. It is enough to name a pair
            at one of its ends.
        usd_per_hour_factor: prices there over the price of a replica.

    Raises:
        ValueError: a number is out of its range, or a region is at a distance from itself.
    """

    name: str
    replicas: int = 1
    round_trip_s: Mapping[str, float] = field(default_factory=dict)
    usd_per_hour_factor: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not self.name:
            raise ValueError("a region needs a name, got an empty one")
        whole_number("replicas", self.replicas, at_least=0)
        number("usd_per_hour_factor", self.usd_per_hour_factor, at_least=0)
        for other, seconds in self.round_trip_s.items():
            number(f"round_trip_s[{other!r}] of region {self.name!r}", seconds, at_least=0)
        if self.name in self.round_trip_s:
            raise ValueError(
                f"region {self.name!r} has a round trip to itself; name only other regions"
            )


@dataclass(frozen=True)
class Outage:
    """A region that is gone for a while.

    Args:
        region: its name.
        start_s: all its replicas are gone from here on.
        end_s: replicas can be started there again.
        detection_s: after `start_s`, until they leave rotation.

    Raises:
        ValueError: a time is negative or not a number, or it does not end after its start.
    """

    region: str
    start_s: float
    end_s: float
    detection_s: float = DETECTION_S

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        number("start_s", self.start_s, at_least=0)
        number("end_s", self.end_s, above=self.start_s)
        number("detection_s", self.detection_s, at_least=0)

    @property
    def known_s(self) -> float:
        """From when on the region's replicas of before are out of rotation."""
        return self.start_s + self.detection_s


class Regions:
    """Regions that fit together, and the distances between them.

    Args:
        regions: at least one; each pair has one round trip.
        outages: of these regions; those of one region follow one another.

    Raises:
        ValueError: a name comes twice or is unknown, a round trip is missing or differs between
            its ends, or outages of a region overlap.
    """

    def __init__(self, regions: Sequence[Region], outages: Sequence[Outage] = ()) -> None:
        if not regions:
            raise ValueError("there must be at least one region, got none")
        self.names = tuple(region.name for region in regions)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"each region needs a name of its own, got {', '.join(self.names)}")
        self._round_trips_s = {(name, name): 0.0 for name in self.names}
        for region in regions:
            for other, seconds in region.round_trip_s.items():
                self._check_known(other, f"round_trip_s of region {region.name!r}")
                for pair in ((region.name, other), (other, region.name)):
                    if self._round_trips_s.setdefault(pair, seconds) != seconds:
                        raise ValueError(
                            f"the round trip between {region.name!r} and {other!r} is given as "
                            f"{self._round_trips_s[pair]:g} s and {seconds:g} s; give it once"
                        )
        self._nearest = {name: self._sorted_from(name) for name in self.names}
        self._check_outages(outages)

    def round_trip_s(self, here: str, there: str) -> float:
        """Over the network and back; half of it delays a request, half of it each token."""
        return self._round_trips_s[here, there]

    def nearest(self, home: str | None) -> tuple[str, ...]:
        """All regions, `home` first and then the others by round trip, equal ones in order.

        Args:
            home: where a request comes from; None for the first region.

        Raises:
            ValueError: there is no such region.
        """
        if home is None:
            home = self.names[0]
        if home not in self._nearest:
            self._check_known(home, "a request")
        return self._nearest[home]

    def _sorted_from(self, home: str) -> tuple[str, ...]:
        for other in self.names:
            if (home, other) not in self._round_trips_s:
                raise ValueError(
                    f"the round trip between {home!r} and {other!r} is missing; give it in "
                    "round_trip_s of one of them"
                )
        others = [name for name in self.names if name != home]
        others.sort(key=lambda other: self._round_trips_s[home, other])
        return (home, *others)

    def _check_known(self, name: str, where: str) -> None:
        if name not in self.names:
            raise ValueError(f"{where} names region {name!r}; known are {', '.join(self.names)}")

    def _check_outages(self, outages: Sequence[Outage]) -> None:
        for outage in outages:
            self._check_known(outage.region, "an outage")
        for before, after in pairwise(sorted(outages, key=lambda o: (o.region, o.start_s))):
            if before.region == after.region and after.start_s < before.end_s:
                raise ValueError(
                    f"outages of region {after.region!r} overlap: one begins at "
                    f"{after.start_s:g} s, before the other ends at {before.end_s:g} s"
                )


class RegionFailover(RouterBase):
    """The request's own region if it has replicas in rotation, else the nearest that has.

    Args:
        inner: makes a router for each region, which chooses among its replicas.
        regions: where requests come from and replicas run.

    Raises:
        ValueError: the regions do not fit together; see `Regions`.
    """

    def __init__(self, inner: Callable[[], Router], regions: Sequence[Region]) -> None:
        self.regions = Regions(regions)
        self._inner = {name: inner() for name in self.regions.names}

    def choose(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> ReplicaView:
        """The choice of the region's own router.

        Raises:
            ValueError: the request comes from an unknown region, or all replicas are in such.
        """
        for name in self.regions.nearest(request.region):
            there = [replica for replica in replicas if replica.region == name]
            if there:
                return self._inner[name].choose(request, there)
        found = ", ".join(sorted({replica.region for replica in replicas})) or "none"
        raise ValueError(
            f"replicas must be in {', '.join(self.regions.names)}, got replicas in {found}"
        )

    def remember(self, prompt_token_ids: Sequence[int], replica: ReplicaView) -> None:
        """Tell the router of the replica's region."""
        self._inner[replica.region].remember(prompt_token_ids, replica)

    def forget(self, name: str) -> None:
        """Tell all routers."""
        for router in self._inner.values():
            router.forget(name)

    def hot_prefixes(self, count: int, region: str | None = None) -> list[list[int]]:
        """What is hot in the region, or if it has seen no requests, in the nearest that has."""
        for name in self.regions.nearest(region):
            prefixes = self._inner[name].hot_prefixes(count)
            if prefixes:
                return prefixes
        return []
