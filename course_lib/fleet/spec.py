"""What is simulated: a replica, and the fleet around it.

    fleet = FleetSpec(ReplicaSpec(step_time, num_blocks=4000, max_model_len=8192),
                      autoscaler=lambda clock: GPUAutoscaler(cooldown_s=60, clock=clock))

Parts of the engine and of the fleet are given as what makes them, since each replica, region and
run needs its own. Those that need the time get the simulation's clock.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from course_lib.engine.block_pool import BlockPool
from course_lib.engine.block_pool_base import BlockPoolBase
from course_lib.engine.scheduler import Scheduler
from course_lib.engine.scheduler_base import SchedulerBase
from course_lib.fleet.autoscaler import Autoscaler
from course_lib.fleet.cold_start import ColdStart
from course_lib.fleet.regions import Outage, Region
from course_lib.fleet.router import RoundRobin, Router
from course_lib.fleet.spot import SpotMarket
from course_lib.fleet.step_time import StepTimeModel
from course_lib.fleet.warm_pool import WarmPool
from course_lib.serving.admission_base import AdmissionBase
from course_lib.serving.lifecycle import DrainPolicy
from course_lib.validation import number, whole_number

Clock = Callable[[], float]


@dataclass(frozen=True)
class ReplicaSpec:
    """One replica: an engine with its arguments, and what it costs.

    Args:
        step_time: how long its steps take.
        num_blocks: of its KV cache, the null block included.
        max_model_len: longest sequence, prompt and reply, in tokens.
        block_size: tokens in a block.
        max_num_seqs: requests that may run at once.
        max_num_batched_tokens: tokens a step may compute.
        enable_prefix_caching: share the KV blocks of equal beginnings.
        scheduler: makes its scheduler.
        block_pool: makes its block pool.
        usd_per_hour: price of all its GPUs, on demand.
        cpu_cores: of its machine; the engine keeps one of them busy.

    Raises:
        ValueError: a number is out of its range.
    """

    step_time: StepTimeModel
    num_blocks: int
    max_model_len: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    scheduler: Callable[..., SchedulerBase] = Scheduler
    block_pool: Callable[..., BlockPoolBase] = BlockPool
    usd_per_hour: float = 1.0
    cpu_cores: int = 16

    def __post_init__(self) -> None:
        whole_number("num_blocks", self.num_blocks, at_least=2)
        whole_number("max_model_len", self.max_model_len, at_least=2)
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "cpu_cores"):
            whole_number(name, getattr(self, name))
        number("usd_per_hour", self.usd_per_hour, at_least=0)


@dataclass(frozen=True)
class Gateway:
    """Where requests come in: it hands each to a replica, one after the other.

    Args:
        service_s: how long it is busy with each request.
        max_queue: requests that may wait at it, for their turn or for a replica; others are
            refused.
        timeout_s: a request that has found no replica after this long is refused.

    Raises:
        ValueError: a number is out of its range.
    """

    service_s: float = 0.0
    max_queue: int = 100_000
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        number("service_s", self.service_s, at_least=0)
        whole_number("max_queue", self.max_queue)
        number("timeout_s", self.timeout_s, above=0)


@dataclass(frozen=True)
class FleetSpec:
    """The fleet.

    Args:
        replica: what each of its replicas is.
        initial_replicas: in rotation when the simulation begins, where there are no `regions`.
        autoscaler: makes one for each region. None: the replicas stay as many as they are.
        router: makes the gateway's router.
        admission: makes each replica's policy. None: everybody is let in.
        scrape_interval_s: metrics are read, and the autoscaler decides, so often.
        cold_start: what it takes to start a replica.
        warm_pool: loaded replicas that stand by; one goes into rotation in `activation_s`. A
            number, or what makes a plan for each region, which decides once a scrape.
        activation_s: see there.
        warm_up_prefixes: so many of the router's busiest prefixes are computed by a new replica
            before it goes into rotation.
        spot: replicas beyond the base are of this kind; None for none.
        drain: what a replica finishes after a reclaim's warning. None: what fits the warning less
            one second.
        regions: where there are replicas; empty for one place without a name.
        outages: of regions.
        gateway: what stands before the replicas.
        connect_timeout_s: after which a request to a replica that is gone counts as failed.
        max_retries: of a request that a replica lost, sent back or did not answer.
        slowdowns: factor on the step times of the n-th replica that is started, from 0.

    Raises:
        ValueError: a number is out of its range, or an outage is in no region.
    """

    replica: ReplicaSpec
    initial_replicas: int = 1
    autoscaler: Callable[[Clock], Autoscaler] | None = None
    router: Callable[[], Router] = RoundRobin
    admission: Callable[[Clock], AdmissionBase] | None = None
    scrape_interval_s: float = 15.0
    cold_start: ColdStart = field(default_factory=ColdStart)
    warm_pool: int | Callable[[Clock], WarmPool] = 0
    activation_s: float = 1.0
    warm_up_prefixes: int = 0
    spot: SpotMarket | None = None
    drain: DrainPolicy | None = None
    regions: tuple[Region, ...] = ()
    outages: tuple[Outage, ...] = ()
    gateway: Gateway = Gateway()
    connect_timeout_s: float = 5.0
    max_retries: int = 10
    slowdowns: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("initial_replicas", "warm_up_prefixes", "max_retries"):
            whole_number(name, getattr(self, name), at_least=0)
        if not callable(self.warm_pool):
            whole_number("warm_pool", self.warm_pool, at_least=0)
        number("scrape_interval_s", self.scrape_interval_s, above=0)
        for name in ("activation_s", "connect_timeout_s"):
            number(name, getattr(self, name), at_least=0)
        for started, factor in self.slowdowns.items():
            whole_number("a key of slowdowns", started, at_least=0)
            number(f"slowdowns[{started}]", factor, above=0)
