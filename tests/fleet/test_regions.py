import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.fleet.regions import DETECTION_S, Outage, Region, RegionFailover, Regions
from course_lib.fleet.router import LeastOutstanding, PrefixAwareRouter, RoundRobin
from tests.fleet.views import FakeReplica, FakeRequest

# From west: east is near, asia is far.
WEST = Region("west", round_trip_s={"east": 0.06, "asia": 0.15})
EAST = Region("east", round_trip_s={"asia": 0.2})
ASIA = Region("asia")
ALL = (WEST, EAST, ASIA)


def replicas(*regions):
    return [FakeReplica(f"{region}-{i}", region=region) for i, region in enumerate(regions)]


# How regions fit together.


def test_a_round_trip_holds_in_both_directions():
    regions = Regions(ALL)
    assert regions.round_trip_s("west", "asia") == regions.round_trip_s("asia", "west") == 0.15
    assert regions.round_trip_s("east", "east") == 0


def test_the_nearest_region_is_home_then_the_others_by_round_trip():
    regions = Regions(ALL)
    assert regions.nearest("west") == ("west", "east", "asia")
    assert regions.nearest("asia") == ("asia", "west", "east")


def test_a_request_of_no_region_comes_from_the_first():
    assert Regions(ALL).nearest(None) == ("west", "east", "asia")


@given(st.permutations(["b", "c", "d"]), st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_equally_near_regions_keep_their_order(names, seconds):
    # All pairs that are not asked about are far apart.
    others = [
        Region(name, round_trip_s=dict.fromkeys(names[place + 1 :], 9))
        for place, name in enumerate(names)
    ]
    home = Region("home", round_trip_s=dict(zip(names, seconds, strict=True)))
    nearest = Regions([home, *others]).nearest("home")
    assert nearest[0] == "home"
    keys = [(home.round_trip_s[name], names.index(name)) for name in nearest[1:]]
    assert keys == sorted(keys)
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ((), "at least one region"),
        ((ASIA, ASIA), "name of its own, got asia, asia"),
        ((WEST, ASIA), "round_trip_s of region 'west' names region 'east'; known are west, asia"),
        ((Region("a"), Region("b")), "between 'a' and 'b' is missing"),
        (
            (Region("a", round_trip_s={"b": 1}), Region("b", round_trip_s={"a": 2})),
            "between 'b' and 'a' is given as 1 s and 2 s; give it once",
        ),
    ],
)
def test_regions_that_do_not_fit_together_are_refused(regions, message):
    with pytest.raises(ValueError, match=message):
        Regions(regions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "needs a name"),
        ({"name": "a", "replicas": -1}, "replicas"),
        ({"name": "a", "usd_per_hour_factor": -0.1}, "usd_per_hour_factor"),
        ({"name": "a", "round_trip_s": {"b": -1}}, r"round_trip_s\['b'\] of region 'a'"),
        ({"name": "a", "round_trip_s": {"a": 0}}, "round trip to itself"),
    ],
)
def test_a_region_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Region(**arguments)


# Outages.


def test_an_outage_is_known_after_the_health_checks():
    assert Outage("west", 100, 200).known_s == 100 + DETECTION_S
    assert Outage("west", 100, 200, detection_s=0).known_s == 100


@pytest.mark.parametrize(
    ("start_s", "end_s", "message"), [(-1, 5, "start_s"), (5, 5, "end_s"), (5, 4, "end_s")]
)
def test_an_outage_ends_after_its_start(start_s, end_s, message):
    with pytest.raises(ValueError, match=message):
        Outage("west", start_s, end_s)


def test_outages_are_of_known_regions_one_after_another():
    with pytest.raises(ValueError, match="an outage names region 'moon'"):
        Regions(ALL, [Outage("moon", 0, 1)])
    with pytest.raises(ValueError, match="outages of region 'west' overlap: one begins at 5 s"):
        Regions(ALL, [Outage("west", 5, 20), Outage("west", 0, 10)])
    Regions(ALL, [Outage("west", 10, 20), Outage("west", 0, 10), Outage("east", 5, 15)])


# Failover.


def test_requests_stay_in_their_region_while_it_has_replicas():
    router = RegionFailover(LeastOutstanding, ALL)
    everywhere = replicas("west", "east", "asia")
    everywhere[1].num_running = 100
    for name in ("west", "east", "asia"):
        assert router.choose(FakeRequest(region=name), everywhere).region == name
    assert router.choose(FakeRequest(), everywhere).region == "west"


def test_requests_go_to_the_nearest_region_that_has_replicas():
    router = RegionFailover(LeastOutstanding, ALL)
    assert router.choose(FakeRequest(region="asia"), replicas("east", "west")).region == "west"
    assert router.choose(FakeRequest(region="asia"), replicas("east")).region == "east"


def test_each_region_has_a_router_of_its_own():
    router = RegionFailover(RoundRobin, (WEST, EAST, ASIA))
    everywhere = replicas("west", "west", "east", "east")
    order = [
        router.choose(FakeRequest(region=name), everywhere).name
        for name in ("west", "east", "west", "east", "west")
    ]
    assert order == ["west-0", "east-2", "west-1", "east-3", "west-0"]


def test_what_is_remembered_and_forgotten_reaches_the_router_of_the_region():
    router = RegionFailover(lambda: PrefixAwareRouter(chunk_tokens=2), ALL)
    first, second = replicas("east", "east")
    first.num_running = 5
    request = FakeRequest((1, 2, 3, 4), region="east")
    router.remember([1, 2, 3, 4], first)
    assert router.choose(request, [first, second]) is first
    router.forget(first.name)
    assert router.choose(request, [first, second]) is second


def test_a_region_is_warmed_up_with_its_own_prefixes_or_those_of_the_nearest_that_has_any():
    router = RegionFailover(lambda: PrefixAwareRouter(chunk_tokens=2), ALL)
    for name, token in (("east", 1), ("asia", 2)):
        for _ in range(2):
            request = FakeRequest((token, token), region=name)
            router.choose(request, replicas("west", "east", "asia"))
    assert router.hot_prefixes(1, "asia") == [[2, 2]]
    assert router.hot_prefixes(1, "west") == [[1, 1]]  # east is nearer than asia
    assert RegionFailover(RoundRobin, ALL).hot_prefixes(1, "west") == []


def test_unknown_regions_are_named():
    router = RegionFailover(RoundRobin, ALL)
    with pytest.raises(ValueError, match="a request names region 'moon'; known are west, east"):
        router.choose(FakeRequest(region="moon"), replicas("west"))
    with pytest.raises(ValueError, match="must be in west, east, asia, got replicas in moon"):
        router.choose(FakeRequest(region="west"), replicas("moon"))
