"""What a load generator sends, and when: the same seed gives the same requests to every server.

    Workload(users=8, num_requests=200)                          # closed loop: 8 in flight
    Workload(rate_per_s=4, duration_s=60, prompt_tokens=(64, 512))   # open loop, Poisson
    Workload(trace=read_trace("AzureLLMInferenceTrace_conv.csv"))    # as it was in production

In a closed loop a slow server is asked less; in an open loop requests come whether the server keeps
up or not, as from the world outside. Only an open loop shows what overload does.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from course_lib.traces.lengths import Lengths, check_lengths
from course_lib.traces.trace import Trace
from course_lib.validation import number, whole_number

#: Common words: most tokenizers have each of them, with the space before it, as one token.
_TEXT = (
    "about after again air all also and are ask back been before being black book both bring "
    "but call can case city come could country day did different do down each early end even "
    "every eye face fact family far few find first for form found four from gave get give go "
    "good great group had hand hard has have head help her here high him his home house how "
    "idea into just keep kind know large last late left less life light like line list little "
    "live long look made main make man many may men might money month more most mother move "
    "much must name near need never new next night not now number of off office old one only "
    "open order other our out over own page paper part people place plan play point power "
    "public put question read real right room run said same saw say school see set she should "
    "show side small so some state still story such system take tell than that the their them "
    "then there these they thing think this three through time told too took top town two under "
    "until use very want war was water way week well went were what when where which while "
    "white who why will with word work world would year you young"
)
WORDS = _TEXT.split()


@dataclass(frozen=True)
class TrafficClass:
    """A kind of caller.

    Args:
        name: under which the report shows it.
        share: weight of these requests among all.
        tenant: sent as header `X-Tenant`.
        priority: sent as field `priority`; what it means is the server's matter. In vLLM, which
            takes it with `--scheduling-policy priority`, lower numbers are served first; in ours
            requests above 0 may wait behind the others.

    Raises:
        ValueError: the share is not above 0, or the priority is no whole number.
    """

    name: str = "default"
    share: float = 1.0
    tenant: str | None = None
    priority: int | None = None

    def __post_init__(self) -> None:
        number(f"share of class {self.name!r}", self.share, above=0)
        if self.priority is not None:
            whole_number(f"priority of class {self.name!r}", self.priority, at_least=-(2**31))


@dataclass(frozen=True)
class PlannedRequest:
    """A request before it is sent.

    Args:
        index: from 0, in the order of sending.
        arrival_s: when to send it, from the start; None where a user sends it when free.
        prompt: text of `prompt_tokens` words, or token ids.
        prompt_tokens: length that was asked for; with text the server may count differently.
        output_tokens: longest reply.
        traffic_class: whose it is.
    """

    index: int
    arrival_s: float | None
    prompt: str | list[int]
    prompt_tokens: int
    output_tokens: int
    traffic_class: TrafficClass


@dataclass(frozen=True)
class Workload:
    """Requests, their lengths and their arrivals.

    Prompts and lengths depend only on the seed and the place in the order, not on the way of
    arrival, so that closed and open loop can be compared.

    Args:
        users: closed loop, each sends its next request when the last one has ended.
        rate_per_s: open loop, Poisson arrivals of this mean rate.
        trace: lengths of the requests, and their arrivals if neither of the above is given.
        num_requests: stop after so many. A trace that gives the arrivals ends by itself.
        duration_s: send nothing after this time; what runs then is waited for.
        prompt_tokens: length of the prompts where there is no trace.
        output_tokens: length of the replies where there is no trace.
        shared_prefix: share of each prompt, from its start, that all have in common, 0 to 1.
        vocab_size: send prompts as random token ids below this instead of as text, so that their
            lengths are exact. Only `/v1/completions` takes them.
        classes: kinds of callers, mixed by their shares.
        seed: of all that is random.

    Raises:
        ValueError: an argument is out of range, or they contradict each other.
    """

    users: int | None = None
    rate_per_s: float | None = None
    trace: Trace | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    prompt_tokens: Lengths = 128
    output_tokens: Lengths = 64
    shared_prefix: float = 0.0
    vocab_size: int | None = None
    classes: tuple[TrafficClass, ...] = (TrafficClass(),)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.users is not None and self.rate_per_s is not None:
            raise ValueError(
                "users and rate_per_s contradict each other: a closed loop sends when a user is "
                "free, an open loop at a rate; give one of them"
            )
        if self.users is None and self.rate_per_s is None and self.trace is None:
            raise ValueError("say how requests arrive: users, rate_per_s or a trace")
        if self.num_requests is None and self.duration_s is None and not self.replays_arrivals:
            raise ValueError("say when to stop: num_requests or duration_s")
        for name in ("users", "num_requests", "vocab_size"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name))
        for name in ("rate_per_s", "duration_s"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), above=0)
        number("shared_prefix", self.shared_prefix, at_least=0, at_most=1)
        check_lengths("prompt_tokens", self.prompt_tokens)
        check_lengths("output_tokens", self.output_tokens)
        if not self.classes:
            raise ValueError("classes is empty; leave it out for one class of callers")
        names = [traffic_class.name for traffic_class in self.classes]
        if len(set(names)) < len(names):
            raise ValueError(f"two classes have the same name: {', '.join(names)}")

    @property
    def replays_arrivals(self) -> bool:
        """Whether requests arrive when those of the trace did."""
        return self.trace is not None and self.users is None and self.rate_per_s is None

    @property
    def expected_requests(self) -> int | None:
        """How many there will be, if that is known before."""
        if self.duration_s is not None and self.users is not None:
            return None
        if self.replays_arrivals and self.trace is not None:
            limit_s = self.duration_s or float("inf")
            inside = sum(row.arrival_s < limit_s for row in self.trace.requests)
            return min(inside, self.num_requests or inside)
        return self.num_requests if self.duration_s is None else None

    def requests(self) -> Iterator[PlannedRequest]:
        """The requests in order; without end where only `duration_s` ends a closed loop."""
        lengths, who = (random.Random(f"{self.seed}/{what}") for what in ("lengths", "classes"))
        common = _Common(random.Random(f"{self.seed}/common"), self.vocab_size)
        arrivals = self._arrivals()
        for index in itertools.count():
            arrival_s = next(arrivals, None)
            if index == self.num_requests or (arrival_s is None and self.users is None):
                return
            if self.trace is None:
                prompt_tokens = _draw(lengths, self.prompt_tokens)
                output_tokens = _draw(lengths, self.output_tokens)
            else:
                row = self.trace.requests[index % len(self.trace.requests)]
                prompt_tokens, output_tokens = row.prompt_tokens, row.output_tokens
            shared = common.first(round(self.shared_prefix * prompt_tokens))
            own = random.Random(f"{self.seed}/prompt/{index}")
            pieces = shared + _pieces(own, prompt_tokens - len(shared), self.vocab_size)
            yield PlannedRequest(
                index,
                arrival_s,
                pieces if self.vocab_size else " ".join(map(str, pieces)),
                prompt_tokens,
                output_tokens,
                who.choices(self.classes, [each.share for each in self.classes])[0],
            )

    def _arrivals(self) -> Iterator[float]:
        """Times of an open loop, up to `duration_s`; none for a closed loop."""
        if self.users is not None:
            return
        limit_s = self.duration_s or float("inf")
        for arrival_s in self._endless_arrivals():
            if arrival_s >= limit_s:
                return
            yield arrival_s

    def _endless_arrivals(self) -> Iterator[float]:
        if self.rate_per_s is None:
            assert self.trace is not None
            yield from (row.arrival_s for row in self.trace.requests)
            return
        rng = random.Random(f"{self.seed}/arrivals")
        arrival_s = 0.0
        while True:
            arrival_s += rng.expovariate(self.rate_per_s)
            yield arrival_s

    def describe(self) -> dict[str, Any]:
        """The arguments, for a report; of a trace its name, length and what was changed."""
        fields = dict(vars(self))
        fields["classes"] = [dict(vars(each)) for each in self.classes]
        if self.trace is not None:
            about = {key: value for key, value in vars(self.trace).items() if key != "requests"}
            fields["trace"] = {**about, "num_requests": len(self.trace.requests)}
        return fields


def _draw(rng: random.Random, lengths: Lengths) -> int:
    low, high = lengths if isinstance(lengths, tuple) else (lengths, lengths)
    return rng.randint(low, high)


def _pieces(rng: random.Random, count: int, vocab_size: int | None) -> list[Any]:
    return rng.choices(range(vocab_size) if vocab_size else WORDS, k=count)


class _Common:
    """The text that all prompts begin with; it grows as longer ones ask for more."""

    def __init__(self, rng: random.Random, vocab_size: int | None) -> None:
        self._rng, self._vocab_size = rng, vocab_size
        self._pieces: list[Any] = []

    def first(self, count: int) -> list[Any]:
        missing = count - len(self._pieces)
        if missing > 0:
            self._pieces += _pieces(self._rng, missing, self._vocab_size)
        return self._pieces[:count]
