"""Our router behind Ray's interface, with replicas that are none; no Ray is started."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[fleet]'")

from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve.request_router import PendingRequest

from course_lib.fleet.ray_router import PrefixRequestRouter, RayReplicaView

DEPLOYMENT = DeploymentID("Engine", "course")
SHOP, BANK = list(range(300)), list(range(1000, 1300))


class FakeReplica:
    """What the router sees of a replica with 8 seats."""

    max_ongoing_requests = 14
    availability_zone = None
    routing_stats: dict[str, float] = {}  # noqa: RUF012
    replica_metadata = {"num_blocks": 1000, "block_size": 16, "max_num_seqs": 8}  # noqa: RUF012

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.orders: list[str] = []

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0

    def try_send_request(self, request: PendingRequest, with_rejection: bool) -> None:
        assert not with_rejection
        self.orders.append(request.metadata.call_method)


A, B, C = (FakeReplica(name) for name in "abc")


def in_a_loop(scenario: Any) -> None:
    """Ray's routers belong to an event loop."""

    async def run() -> None:
        router = PrefixRequestRouter(
            DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
        )
        router.initialize_state(room=10, balance_abs_threshold=4)
        await scenario(router)

    asyncio.run(run())


async def choose(router: PrefixRequestRouter, prompt: list[int], *replicas: FakeReplica) -> Any:
    """The names of the ranks, and the request."""
    call = SimpleNamespace(prompt_token_ids=prompt)
    request = PendingRequest([call], {}, RequestMetadata("r", "r"))
    ranks = await router.choose_replicas(list(replicas), request)  # type: ignore[arg-type]
    return [[r.replica_id.unique_id for r in rank] for rank in ranks], request


def load(router: PrefixRequestRouter, replica: FakeReplica, count: int) -> None:
    router.on_new_queue_len_info(replica.replica_id, count)


def test_the_same_prefix_goes_to_the_same_replica_and_others_come_after_it() -> None:
    async def scenario(router: PrefixRequestRouter) -> None:
        assert (await choose(router, SHOP, A, B))[0] == [["a"], ["b"]]
        assert (await choose(router, BANK, A, B))[0] == [["b"], ["a"]]
        assert (await choose(router, [*SHOP, 7, 8], B, A))[0] == [["a"], ["b"]]
        assert (await choose(router, [*BANK, 9], A, B))[0] == [["b"], ["a"]]

    in_a_loop(scenario)


def test_a_prefix_in_demand_spreads() -> None:
    async def scenario(router: PrefixRequestRouter) -> None:
        assert (await choose(router, SHOP, A, B))[0][0] == ["a"]
        load(router, A, 4)
        assert (await choose(router, SHOP, A, B))[0][0] == ["a"]
        load(router, A, 5)  # more than 4 above the other
        assert (await choose(router, SHOP, A, B))[0][0] == ["b"]

    in_a_loop(scenario)


def test_a_full_replica_is_not_asked_and_ray_waits_where_all_are() -> None:
    async def scenario(router: PrefixRequestRouter) -> None:
        assert (await choose(router, SHOP, A, B))[0][0] == ["a"]
        load(router, A, 10)
        ranks, _ = await choose(router, SHOP, A, B)
        assert ranks == [["b"], []]
        load(router, B, 10)
        ranks, request = await choose(router, SHOP, A, B)
        assert ranks == []
        assert request.routing_context.should_backoff

    in_a_loop(scenario)


def test_a_replica_that_leaves_is_told_to_drain_and_forgotten() -> None:
    async def scenario(router: PrefixRequestRouter) -> None:
        router.update_replicas([A, B, C])  # type: ignore[list-item]
        assert (await choose(router, SHOP, A, B, C))[0][0] == ["a"]
        router.update_replicas([B, C])  # type: ignore[list-item]
        assert (A.orders, B.orders, C.orders) == (["drain"], [], [])
        assert (await choose(router, SHOP, B, A, C))[0][0] == ["b"]  # "a" no longer matches

    in_a_loop(scenario)


def test_a_replica_that_has_died_is_forgotten_before_ray_tells() -> None:
    async def scenario(router: PrefixRequestRouter) -> None:
        router.update_replicas([A, B])  # type: ignore[list-item]
        assert (await choose(router, SHOP, A, B))[0][0] == ["a"]
        router.on_replica_actor_died(A.replica_id)
        assert (await choose(router, SHOP, B, A))[0][0] == ["b"]

    in_a_loop(scenario)


def test_a_view_tells_running_from_waiting_by_the_seats() -> None:
    view = RayReplicaView(A, 11)  # type: ignore[arg-type]
    assert (view.name, view.region, view.num_running, view.num_waiting) == ("a", "", 8, 3)
    assert (view.num_blocks, view.block_size, view.kv_cache_usage) == (1000, 16, 0.0)
