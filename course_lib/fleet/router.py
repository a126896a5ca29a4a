"""Which replica a request goes to.

A router has `choose(request, replicas) -> replica`. It is called once a request, with the replicas
that are in rotation, and knows no more of a replica than `ReplicaView` says; so the same router
serves simulated replicas and real ones. A router of your own may derive from `RouterBase`, whose
other methods do nothing.
"""

import random
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

from course_lib.fleet.prefix_history import PrefixHistory, RecentPrompts, cut
from course_lib.validation import number, whole_number

# Defaults of SGLang's router (and of vLLM's, which came out of it): --cache-threshold,
# --balance-abs-threshold and --balance-rel-threshold.
CACHE_THRESHOLD = 0.3
BALANCE_ABS_THRESHOLD = 64  # requests
BALANCE_REL_THRESHOLD = 1.5

#: Coarse enough to be quick, fine enough for system prompts of hundreds of tokens. Our choice.
CHUNK_TOKENS = 64

#: Prompts among which `PrefixAwareRouter` looks for hot prefixes: minutes of traffic. Our choice.
RECENT_PROMPTS = 256


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


class PowerOfTwoChoices(RouterBase):
    """The less loaded of two replicas drawn at random; of equal ones the first drawn.

    Nearly as even as the least loaded of all, without everyone running to the same replica when
    loads are known late (Mitzenmacher, 2001).

    Args:
        seed: of the draws.

    Raises:
        ValueError: the seed is negative or not a whole number.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(whole_number("seed", seed, at_least=0)).random

    def choose(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> ReplicaView:
        """The less loaded of a pair."""
        if len(replicas) == 1:
            return replicas[0]
        first = int(self._random() * len(replicas))
        second = int(self._random() * (len(replicas) - 1))
        second += second >= first
        return min(replicas[first], replicas[second], key=outstanding)


class KvAware(RouterBase):
    """The replica for which the request means least work, as NVIDIA Dynamo's KV router counts.

        cost = overlap_weight * prefill blocks + active blocks

    Prefill blocks are those of the prompt that are not in the replica's prefix cache; it is asked,
    so this is exact. Active blocks are those that its requests own. Requests in its queue own none
    yet. Dynamo keeps a book of them; here each counts as the mean of all requests so far, for both
    terms.

    Args:
        overlap_weight: what a block to prefill costs beside one to decode with. More for a better
            TTFT, less for a better TPOT; 1 is Dynamo's default.

    Raises:
        ValueError: the weight is negative or not a number.
    """

    def __init__(self, overlap_weight: float = 1.0) -> None:
        self.overlap_weight = number("overlap_weight", overlap_weight, at_least=0)
        self._num_requests = 0
        self._prompt_tokens = 0
        self._prefill_tokens = 0

    def choose(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> ReplicaView:
        """The one with the lowest cost; of equal ones the one with the fewest requests."""
        prompt_tokens = len(request.prompt_token_ids)
        waiting_cost = 0.0  # tokens that each waiting request counts for
        if self._num_requests:
            total = self.overlap_weight * self._prefill_tokens + self._prompt_tokens
            waiting_cost = total / self._num_requests
        best, least, best_prefill_tokens = replicas[0], (float("inf"), 0), 0
        for replica in replicas:
            prefill_tokens = prompt_tokens - replica.cached_tokens(request)
            tokens = self.overlap_weight * prefill_tokens + waiting_cost * replica.num_waiting
            cost = tokens / replica.block_size + replica.kv_cache_usage * replica.num_blocks
            key = (cost, outstanding(replica))
            if key < least:
                best, least, best_prefill_tokens = replica, key, prefill_tokens
        self._num_requests += 1
        self._prompt_tokens += prompt_tokens
        self._prefill_tokens += best_prefill_tokens
        return best


class PrefixAwareRouter(RouterBase):
    """The replica that was sent the longest beginning of the prompt, unless it is overloaded.

    It remembers which prompts it sent where, so it needs nothing from the engines, but it does not
    see what they evict. The idea and the thresholds are those of SGLang's cache-aware router:

    1. A replica counts as matching if it was sent more than `cache_threshold` of the prompt; of
       those with the longest match the least loaded is taken, of equally loaded ones the one that
       was sent the least: so a new replica that is warmed up gets its share.
    2. It is overloaded if it has more than `balance_abs_threshold` requests above the least loaded
       replica, and more than `balance_rel_threshold` times as many.
    3. Without a match, or if the match is overloaded, the least loaded of all replicas takes the
       request, again by what they were sent. So a prefix in demand spreads.

    Args:
        cache_threshold: share of the prompt.
        balance_abs_threshold: requests.
        balance_rel_threshold: a factor of at least 1.
        chunk_tokens: prompts are compared in chunks of this many tokens.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        cache_threshold: float = CACHE_THRESHOLD,
        balance_abs_threshold: int = BALANCE_ABS_THRESHOLD,
        balance_rel_threshold: float = BALANCE_REL_THRESHOLD,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.cache_threshold = number("cache_threshold", cache_threshold, at_least=0, at_most=1)
        self.balance_abs_threshold = whole_number(
            "balance_abs_threshold", balance_abs_threshold, at_least=0
        )
        self.balance_rel_threshold = number(
            "balance_rel_threshold", balance_rel_threshold, at_least=1
        )
        self.chunk_tokens = whole_number("chunk_tokens", chunk_tokens)
        self._history = PrefixHistory()
        self._recent = RecentPrompts(RECENT_PROMPTS)

    def choose(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> ReplicaView:
        """By the longest match and the load."""
        chunks = cut(request.prompt_token_ids, self.chunk_tokens)
        chosen = self._least_loaded(replicas)
        match, names = self._history.longest_match(chunks, {replica.name for replica in replicas})
        if match * self.chunk_tokens > self.cache_threshold * len(request.prompt_token_ids):
            best = self._least_loaded([replica for replica in replicas if replica.name in names])
            if not self._overloaded(outstanding(best), outstanding(chosen)):
                chosen = best
        self._recent.add(chunks)
        self._add(chunks, chosen)
        return chosen

    def remember(self, prompt_token_ids: Sequence[int], replica: ReplicaView) -> None:
        """The replica counts as having been sent this prompt."""
        self._add(cut(prompt_token_ids, self.chunk_tokens), replica)

    def forget(self, name: str) -> None:
        """Nothing matches this replica any more."""
        self._history.forget(name)

    def hot_prefixes(self, count: int, region: str | None = None) -> list[list[int]]:
        """What most of the latest prompts begin with, in whole chunks."""
        return self._recent.most_common(count)

    def _least_loaded(self, replicas: Sequence[ReplicaView]) -> ReplicaView:
        num_chunks = self._history.num_chunks
        return min(replicas, key=lambda replica: (outstanding(replica), num_chunks(replica.name)))

    def _overloaded(self, load: int, least: int) -> bool:
        return (
            load - least > self.balance_abs_threshold and load > self.balance_rel_threshold * least
        )

    def _add(self, chunks: list[bytes], replica: ReplicaView) -> None:
        max_chunks = replica.num_blocks * replica.block_size // self.chunk_tokens
        self._history.add(chunks, replica.name, max_chunks)


class SessionAffinity(RouterBase):
    """All requests of a session go to the same replica, whatever its load.

    By rendezvous hashing (Thaler and Ravishankar, 1998): of all replicas the session takes the one
    with the highest hash of both names. So a new replica takes over only the sessions that it
    gets, and of one that leaves only its own sessions move. A request without a session goes to
    the replica with the fewest unfinished requests.
    """

    def choose(self, request: RoutedRequest, replicas: Sequence[ReplicaView]) -> ReplicaView:
        """The session's own replica."""
        session = request.session
        if session is None:
            return min(replicas, key=outstanding)
        key = blake2b(session.encode()).digest()  # of a fixed length, so no two pairs look alike
        return max(replicas, key=lambda r: blake2b(r.name.encode(), key=key).digest())
