"""What it costs: dollars an hour, a million tokens, a cold start, and a day of each way to rent.

Prices come from `data/catalog` and are examples; every function takes the price as an argument, so
that your own goes in. `compare_deployments` sets serverless GPU, GPU cloud and managed Kubernetes
side by side on a duty cycle: how many hours of the day there is work.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from course_lib.sizing.catalog import read_yaml
from course_lib.validation import known_name, number, whole_number


@dataclass(frozen=True)
class DeploymentOption:
    """A way to rent; `deployments.yaml` says what each figure means."""

    name: str
    price_factor: float
    fixed_usd_per_hour: float
    billed: str  # "always" or "busy"
    idle_timeout_s: float

    def __post_init__(self) -> None:
        number(f"price_factor of {self.name}", self.price_factor, above=0)
        number(f"fixed_usd_per_hour of {self.name}", self.fixed_usd_per_hour, at_least=0)
        number(f"idle_timeout_s of {self.name}", self.idle_timeout_s, at_least=0)
        known_name(f"billing of {self.name}", self.billed, ["always", "busy"])


@dataclass(frozen=True)
class DeploymentCost:
    """A day of one option."""

    name: str
    billed_hours_per_day: float
    usd_per_day: float
    usd_per_busy_hour: float | None  # None where there is no work


@dataclass(frozen=True)
class ColdStart:
    """The phases that do not depend on the model, and the speed at which weights load."""

    node_provisioning_s: float
    container_pull_s: float
    runtime_warmup_s: float
    load_gb_s: float

    def seconds(self, weights_gb: float) -> float:
        """From no machine to a replica that has `weights_gb` of weights loaded and is warm.

        Raises:
            ValueError: `weights_gb` is not a number above 0.
        """
        loading = number("weights_gb", weights_gb, above=0) / self.load_gb_s
        return self.node_provisioning_s + self.container_pull_s + loading + self.runtime_warmup_s


def usd_per_hour(gpu_usd_per_hour: float, gpus: int = 1) -> float:
    """The price of a replica.

    Raises:
        ValueError: the price is negative or `gpus` below 1.
    """
    return number("gpu_usd_per_hour", gpu_usd_per_hour, at_least=0) * whole_number("gpus", gpus)


def usd_per_million_tokens(replica_usd_per_hour: float, tokens_per_s: float) -> float:
    """The price of a million tokens from a replica that makes `tokens_per_s` without a pause.

    Raises:
        ValueError: the price is negative or the rate not above 0.
    """
    price = number("replica_usd_per_hour", replica_usd_per_hour, at_least=0)
    return price / (number("tokens_per_s", tokens_per_s, above=0) * 3600) * 1e6


def cold_start_usd(replica_usd_per_hour: float, cold_start_s: float) -> float:
    """What is paid for a replica before its first token: load time x hourly price.

    Raises:
        ValueError: an argument is negative.
    """
    price = number("replica_usd_per_hour", replica_usd_per_hour, at_least=0)
    return price * number("cold_start_s", cold_start_s, at_least=0) / 3600


def compare_deployments(
    gpu_usd_per_hour: float,
    gpus: int,
    busy_hours_per_day: float,
    starts_per_day: int,
    cold_start_s: float,
    options: Mapping[str, DeploymentOption] | None = None,
) -> tuple[DeploymentCost, ...]:
    """A day of the same work under each option.

    An option that is billed "always" pays 24 hours. One billed by "busy" pays the busy hours, and
    for each start the cold start before and the idle time-out after, but never more than the day.

    Args:
        gpu_usd_per_hour: the catalogue's price of one GPU; options multiply it.
        busy_hours_per_day: hours with work, 0 to 24.
        starts_per_day: how often the busy hours begin anew.
        options: other ones than those of `deployments.yaml`.

    Raises:
        ValueError: an argument is negative, or the day has more than 24 busy hours.
    """
    price = usd_per_hour(gpu_usd_per_hour, gpus)
    busy = number("busy_hours_per_day", busy_hours_per_day, at_least=0, at_most=24)
    starts = whole_number("starts_per_day", starts_per_day, at_least=0)
    cold_start_s = number("cold_start_s", cold_start_s, at_least=0)
    costs = []
    for option in (deployment_options() if options is None else options).values():
        around = starts * (cold_start_s + option.idle_timeout_s) / 3600
        hours = 24.0 if option.billed == "always" else min(24.0, busy + around)
        day = hours * price * option.price_factor + 24 * option.fixed_usd_per_hour
        costs.append(DeploymentCost(option.name, hours, day, day / busy if busy else None))
    return tuple(costs)


@cache
def deployment_options() -> Mapping[str, DeploymentOption]:
    """The options of `deployments.yaml` by name."""
    return {
        name: DeploymentOption(name=name, **entry)
        for name, entry in read_yaml("deployments.yaml")["options"].items()
    }


@cache
def example_cold_start() -> ColdStart:
    """The phases of `deployments.yaml`."""
    return ColdStart(**read_yaml("deployments.yaml")["cold_start"])
