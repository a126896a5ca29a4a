"""Spot machines: cheap replicas that the cloud takes back, with a warning.

    SpotMarket(on_demand_replicas=2, price_factor=0.35, warning_s=GCP_WARNING_S)

Baseline on demand, overflow on spot: the first replicas are the machines one keeps, those beyond
are spot. What a replica does with its warning is `DrainPolicy`'s to say.
"""

import math
from dataclasses import dataclass

import numpy as np

from course_lib.validation import number, whole_number

# From the notice to the end of the machine, as the clouds document it.
AWS_WARNING_S = 120.0
GCP_WARNING_S = 30.0


@dataclass(frozen=True)
class SpotMarket:
    """What spot capacity costs and how long it lasts.

    Reclaims are a Poisson process for each replica: an old machine is as likely to be taken as a
    new one, and each by itself. Real ones come in groups when the cloud runs short, and prices and
    rates differ by region, GPU and hour: the defaults are illustrative.

    Args:
        on_demand_replicas: so many replicas are kept on demand; those beyond are spot.
        price_factor: a spot hour costs so much of one on demand.
        reclaims_per_hour: of one replica, on average; 0 for never.
        warning_s: from the warning to the end of the machine.

    Raises:
        ValueError: an argument is out of its range.
    """

    on_demand_replicas: int = 1
    price_factor: float = 0.4
    reclaims_per_hour: float = 0.1
    warning_s: float = AWS_WARNING_S

    def __post_init__(self) -> None:
        """Refuse what no market has."""
        whole_number("on_demand_replicas", self.on_demand_replicas, at_least=0)
        number("price_factor", self.price_factor, at_least=0, at_most=1)
        number("reclaims_per_hour", self.reclaims_per_hour, at_least=0)
        number("warning_s", self.warning_s, at_least=0)

    def draw_lifetime_s(self, rng: np.random.Generator) -> float:
        """Seconds from the start of a spot machine to its warning; infinite if never."""
        if self.reclaims_per_hour == 0:
            return math.inf
        return float(rng.exponential(3600 / self.reclaims_per_hour))
