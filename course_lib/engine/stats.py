"""Counters of one engine, the source of its metrics. All counts are since the start."""

from dataclasses import dataclass


@dataclass
class SchedulerStats:
    """What the scheduler has done so far."""

    num_steps: int = 0
    num_scheduled_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0  # tokens looked up, preempted requests excluded
    prefix_cache_hits: int = 0  # tokens found

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Share of looked-up tokens that were found, 0 to 1; 0 before the first lookup."""
        return self.prefix_cache_hits / max(1, self.prefix_cache_queries)
