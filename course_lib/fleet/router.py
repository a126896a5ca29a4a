"""Which replica a request goes to.

A router has `choose(request, replicas) -> replica`. It is called once a request, with the replicas
that are in rotation, and knows no more of a replica than `ReplicaView` says; so the same router
serves simulated replicas and real ones. A router of your own may derive from `RouterBase`, whose
other methods do nothing.
"""

from collections.abc import Sequence
from typing import Protocol


class RoutedRequest(Protocol):
    """What a router may know of a request. `session` and `region` are None where not known."""

    @property
    def request_id(self) -> str: ...  # noqa: D102
    @property
    def prompt_token_ids(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def session(self) -> str | None: ...  # noqa: D102
    @property
    def tenant(self) -> str: ...  # noqa: D102
    @property
    def region(self) -> str | None: ...  # noqa: D102


class ReplicaView(Protocol):
    """What a router may know of a replica: its load, as metrics tell it, and its prefix cache."""

    @property
    def name(self) -> str:
        """No other replica has had it."""
        ...

    @property
    def region(self) -> str:
        """Where it runs."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests in its queue."""
        ...

    @property
    def num_running(self) -> int:
        """Requests that own blocks of its KV cache."""
        ...

    @property
    def kv_cache_usage(self) -> float:
        """Share of its blocks that requests own, 0 to 1."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks of its KV cache."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        ...

    def cached_tokens(self, request: RoutedRequest) -> int:
        """How much of the prompt its prefix cache holds now."""
        ...


class Router(Protocol):
    """Decides for each request."""

    def choose(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> ReplicaView:
        """The replica that the request is sent to.

        Args:
            request: to be sent now, for the first time or again.
            replicas: those in rotation; at least one.
        """
        ...

    def remember(self, prompt_token_ids: Sequence[int], replica: ReplicaView) -> None:
        """A warm-up request has put this prompt into the replica's prefix cache."""
        ...

    def forget(self, name: str) -> None:
        """The replica of this name has left, and its cache with it."""
        ...

    def hot_prefixes(self, count: int, region: str | None = None) -> list[list[int]]:
        """Beginnings of prompts that a new replica should have in its cache, hottest first.

        Args:
            count: at most so many.
            region: where the new replica runs, which matters only to a router of regions.
        """
        ...


class RouterBase:
    """A router that remembers nothing about replicas."""

    def choose(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> ReplicaView:
        """The replica that the request is sent to."""
        raise NotImplementedError

    def remember(self, prompt_token_ids: Sequence[int], replica: ReplicaView) -> None:
        """Do nothing."""

    def forget(self, name: str) -> None:
        """Do nothing."""

    def hot_prefixes(self, count: int, region: str | None = None) -> list[list[int]]:
        """None are known."""
        return []


def outstanding(replica: ReplicaView) -> int:
    """Requests that a replica has not finished."""
    return replica.num_waiting + replica.num_running


class RoundRobin(RouterBase):
    """One after the other, whatever their load."""

    def __init__(self) -> None:
        self._count = 0

    def choose(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> ReplicaView:
        """The next one in order."""
        self._count += 1
        return replicas[(self._count - 1) % len(replicas)]


class LeastOutstanding(RouterBase):
    """The replica with the fewest unfinished requests, the first one of several."""

    def choose(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> ReplicaView:
        """The least loaded."""
        return min(replicas, key=outstanding)
