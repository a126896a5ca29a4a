"""Our router as Ray Serve's: requests go to the replica that was sent the same beginning.

`PrefixRequestRouter` asks `PrefixAwareRouter`, the simulator's, and shows it Ray's replicas. It
runs in each gateway, which knows only what it has sent itself. Ray keeps count of unfinished
requests, holds those for which no replica has room, and sends again what a replica has not taken.

A router that asks the replicas what they hold, as `KvAware` does, cannot be had so: Ray tells
routers of its replicas once in a while, and what a cache holds changes with each request.
"""

from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray.exceptions import ActorDiedError
from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from course_lib.fleet.router import PrefixAwareRouter, RoutedRequest


@dataclass(frozen=True)
class RayReplicaView:
    """One of Ray's replicas, as our routers see replicas.

    Args:
        replica: Ray's.
        num_unfinished: requests that this gateway has sent there.
    """

    replica: RunningReplica
    num_unfinished: int

    @property
    def name(self) -> str:
        """Unique."""
        return self.replica.replica_id.unique_id

    @property
    def region(self) -> str:
        """The availability zone of its node."""
        return self.replica.availability_zone or ""

    @property
    def num_running(self) -> int:
        """As many as it has seats for."""
        return min(self.num_unfinished, self._metadata["max_num_seqs"])

    @property
    def num_waiting(self) -> int:
        """The others."""
        return self.num_unfinished - self.num_running

    @property
    def kv_cache_usage(self) -> float:
        """As it was when the replica told last."""
        return self.replica.routing_stats.get("kv_cache_usage", 0.0)

    @property
    def num_blocks(self) -> int:
        """Of its KV cache."""
        return self._metadata["num_blocks"]

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._metadata["block_size"]

    @property
    def _metadata(self) -> dict[str, int]:
        return self.replica.replica_metadata

    def cached_tokens(self, request: RoutedRequest) -> int:
        """Not to be known; the module says why."""
        raise NotImplementedError("Ray does not tell a router what a replica's cache holds")


class PrefixRequestRouter(RequestRouter):
    """Chooses by the prompt in the `Call` that is sent; its fields are in `gateway`."""

    def initialize_state(self, **settings: Any) -> None:
        """Ray calls it once, before all else.

        Args:
            settings: `room`, the unfinished requests that a replica may have, and those of
                `PrefixAwareRouter`.
        """
        self.room = settings.pop("room")
        self.router = PrefixAwareRouter(**settings)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The best one first, then the others that have room; none if all are full.

        Ray asks again after a while, as often as it takes.
        """
        views = [
            RayReplicaView(r, self.replica_queue_len_cache.get(r.replica_id) or 0)
            for r in candidate_replicas
        ]
        views = [view for view in views if view.num_unfinished < self.room]
        free = [view.replica for view in views]
        if pending_request is None:
            return [free]
        pending_request.routing_context.should_backoff = True  # otherwise Ray asks without a pause
        if not free:
            return []
        call = pending_request.args[0]
        request = SimpleNamespace(
            request_id=pending_request.metadata.internal_request_id,
            prompt_token_ids=call.prompt_token_ids,
            session=None,
            tenant="default",
            region=None,
        )
        name = self.router.choose(request, views).name
        best = [r for r in free if r.replica_id.unique_id == name]
        return [best, [r for r in free if r not in best]]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Others are in rotation now. Those that have left drain, each by its own policy.

        Ray only waits for what such a replica still has to do, and ends it when the time is up.
        The replica's policy hands back at once what cannot be done by then.
        """
        left = {
            replica_id: replica
            for replica_id, replica in self.curr_replicas.items()
            if replica_id not in {each.replica_id for each in replicas}
        }
        super().update_replicas(replicas)
        for replica_id, replica in left.items():
            self.router.forget(replica_id.unique_id)
            order = RequestMetadata(f"drain-{replica_id.unique_id}", "", call_method="drain")
            with suppress(ActorDiedError):
                replica.try_send_request(PendingRequest([], {}, order), with_rejection=False)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """One is gone before Ray's controller has noticed."""
        super().on_replica_actor_died(replica_id)
        self.router.forget(replica_id.unique_id)
