"""The plots of the notebooks, in one style.

Each function takes what the engine measured and returns a finished figure with title, units and a
caption, which a notebook shows by naming it in the last line of a cell. Colours mean the same in
every plot, and can be told apart by colour-blind readers.
"""

from course_lib.classroom.plots.attention import (
    plot_attention_errors,
    plot_block_reads,
    plot_decode_times,
    plot_online_softmax,
)
from course_lib.classroom.plots.batching import (
    plot_request_timeline,
    plot_slots,
    plot_steps,
    plot_throughput_and_ttft,
)
from course_lib.classroom.plots.edge import (
    plot_back_pressure,
    plot_outcomes,
    plot_queue,
    plot_token_bucket,
)
from course_lib.classroom.plots.fleet import plot_fleet, plot_signals
from course_lib.classroom.plots.forecast import plot_forecast
from course_lib.classroom.plots.load import plot_latency_over_time
from course_lib.classroom.plots.loading import plot_night_cost, plot_waterfall
from course_lib.classroom.plots.paging import (
    plot_block_map,
    plot_block_maps,
    plot_fragmentation,
    plot_prefix_hits,
)
from course_lib.classroom.plots.policies import (
    plot_autoscaling,
    plot_cost,
    plot_frontier,
    plot_policies,
)
from course_lib.classroom.plots.sizing import (
    plot_context_growth,
    plot_gpus_needed,
    plot_mig_fits,
    plot_plan,
)
from course_lib.classroom.plots.waits import plot_cold_starts, plot_request_spans

__all__ = [
    "plot_attention_errors",
    "plot_autoscaling",
    "plot_back_pressure",
    "plot_block_map",
    "plot_block_maps",
    "plot_block_reads",
    "plot_cold_starts",
    "plot_context_growth",
    "plot_cost",
    "plot_decode_times",
    "plot_fleet",
    "plot_forecast",
    "plot_fragmentation",
    "plot_frontier",
    "plot_gpus_needed",
    "plot_latency_over_time",
    "plot_mig_fits",
    "plot_night_cost",
    "plot_online_softmax",
    "plot_outcomes",
    "plot_plan",
    "plot_policies",
    "plot_prefix_hits",
    "plot_queue",
    "plot_request_spans",
    "plot_request_timeline",
    "plot_signals",
    "plot_slots",
    "plot_steps",
    "plot_throughput_and_ttft",
    "plot_token_bucket",
    "plot_waterfall",
]
