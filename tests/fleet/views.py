"""Requests and replicas as a router sees them, for tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class FakeRequest:
    prompt_token_ids: Sequence[int] = (1, 2, 3)
    session: str | None = None
    region: str | None = None
    request_id: str = "request"
    tenant: str = "default"


@dataclass
class FakeReplica:
    name: str
    num_running: int = 0
    num_waiting: int = 0
    region: str = ""
    kv_cache_usage: float = 0.0
    num_blocks: int = 1000
    block_size: int = 16
    cached: Mapping[tuple[int, ...], int] = field(default_factory=dict)

    def cached_tokens(self, request):
        return self.cached.get(tuple(request.prompt_token_ids), 0)


def fleet(*loads, **attributes):
    """Replicas r0, r1, ... with so many requests."""
    return [FakeReplica(f"r{i}", load, **attributes) for i, load in enumerate(loads)]
