"""Plots of the first notebooks: a request's timeline, slots, steps, throughput and latency."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course_lib.classroom.plots.style import COLORS, REPLY_COLORS, STYLE, caption, stacked_figure
from course_lib.engine.batch import ScheduledBatch
from course_lib.engine.request import RequestMetrics
from course_lib.sizing.batching import simulate_slots, slot_schedule


def plot_request_timeline(metrics: RequestMetrics, title: str = "One request") -> Figure:
    """Draw where the time of a finished request went: queue, prefill, each decoded token.

    Above, the phases on an axis of milliseconds since the request arrived; below, on the same
    axis, how long each token after the first took.

    Raises:
        ValueError: the request has no tokens yet.
    """
    if metrics.first_scheduled_time is None or not metrics.token_times:
        raise ValueError("the request has no tokens yet; draw its timeline when it has finished")
    scheduled, *tokens = (
        1000 * (time - metrics.arrival_time)
        for time in [metrics.first_scheduled_time, *metrics.token_times]
    )
    phases = {
        "queue": (0.0, scheduled),
        "prefill": (scheduled, tokens[0]),
        "decode": (tokens[0], tokens[-1]),
    }
    with stacked_figure(2, height_ratios=[1.2, 1]) as (figure, (lanes, latencies)):
        _draw_phases(lanes, phases, tokens)
        lanes.set_title(f"{title}: where the time went")
        _draw_token_latencies(latencies, tokens)
        latencies.set_xlabel("time since the request arrived (ms)")
        latencies.set_xlim(-0.01 * tokens[-1], 1.01 * tokens[-1])
        caption(
            figure,
            "Each white line is a token. TTFT, the time to first token, is queue and prefill;\n"
            "TPOT, the time per output token, is the mean of the bars. "
            "Prefill computes all tokens of the prompt, a decode step one.",
        )
    return figure


def _draw_phases(ax: Axes, phases: dict[str, tuple[float, float]], tokens: list[float]) -> None:
    for lane, (name, (start, end)) in enumerate(phases.items()):
        ax.barh(lane, end - start, left=start, height=0.6, color=COLORS[name])
    ax.vlines(tokens[:-1], len(phases) - 1.3, len(phases) - 0.7, color="white", linewidth=0.8)
    ax.axvline(tokens[0], color=COLORS["accent"], linewidth=1.2)
    ax.text(tokens[0], 0, f"  TTFT {_ms(tokens[0])}", color=COLORS["accent"], va="center")
    ax.set_yticks(
        range(len(phases)),
        labels=[f"{name}  {_ms(end - start)}" for name, (start, end) in phases.items()],
    )
    ax.set_ylim(len(phases) - 0.5, -0.5)  # the first phase on top
    ax.grid(axis="y", visible=False)


def _draw_token_latencies(ax: Axes, tokens: list[float]) -> None:
    ax.set_title("Time of each token after the first")
    ax.set_ylabel("ms")
    ax.grid(axis="x", visible=False)
    gaps = [later - earlier for earlier, later in pairwise(tokens)]
    if gaps:
        tpot = sum(gaps) / len(gaps)
        ax.bar(tokens[:-1], gaps, width=gaps, align="edge", color=COLORS["decode"], edgecolor="w")
        ax.axhline(tpot, color=COLORS["accent"], linewidth=1.2)
        ax.set_title(f"TPOT {_ms(tpot)}", loc="right", color=COLORS["accent"], weight="normal")


def plot_slots(reply_lengths: Sequence[int], slots: int) -> Figure:
    """Draw which reply is in which slot at each step, static above continuous.

    Args:
        reply_lengths: in tokens, in the order of arrival.
        slots: replies that are written at once.
    """
    with stacked_figure(2, height_ratios=[1, 1]) as (figure, panels):
        for ax, continuous in zip(panels, (False, True), strict=True):
            usage = simulate_slots(reply_lengths, slots, continuous)
            ax.barh(range(slots), usage.token_steps, color="#eeeeee", hatch="///", edgecolor="w")
            for bar in slot_schedule(reply_lengths, slots, continuous):
                width, number = bar.end_step - bar.start_step, bar.request
                color = REPLY_COLORS[number % len(REPLY_COLORS)]
                ax.barh(bar.slot, width, left=bar.start_step, color=color, edgecolor="w")
                label = f"reply {number}" if len(reply_lengths) < 10 else f"{number}"
                ax.text(
                    bar.start_step + width / 2,
                    bar.slot,
                    label,
                    ha="center",
                    va="center",
                    color="white" if color == REPLY_COLORS[0] else "black",
                )
            ax.set_title(
                f"{'Continuous' if continuous else 'Static'}: {usage.token_steps} steps, "
                f"{usage.empty_slot_steps} empty"
            )
            ax.set_yticks(range(slots), labels=[f"slot {slot}" for slot in range(slots)])
            ax.set_ylim(slots - 0.5, -0.5)
            ax.grid(axis="y", visible=False)
        panels[-1].set_xlabel("step")
        caption(figure, "Each block is a reply, one token a step. Hatched: the slot stands empty.")
    return figure


def plot_steps(batches: Sequence[ScheduledBatch]) -> Figure:
    """Draw what each request computed in each step of an engine.

    Args:
        batches: of the steps, in order.
    """
    rows: dict[str, int] = {}
    with stacked_figure(2, height_ratios=[2.2, 1]) as (figure, (lanes, totals)):
        tokens = {"prefill": [0] * len(batches), "decode": [0] * len(batches)}
        for step, batch in enumerate(batches):
            for entry in batch.scheduled:
                row = rows.setdefault(entry.request.request_id, len(rows))
                kind = "prefill" if entry.start < entry.request.num_prompt_tokens else "decode"
                tokens[kind][step] += entry.num_tokens
                lanes.barh(row, 1, left=step, height=0.8, color=COLORS[kind])
        lanes.set_yticks(range(len(rows)), labels=[f"request {name}" for name in rows])
        lanes.set_ylim(len(rows) - 0.5, -0.5)
        lanes.grid(axis="y", visible=False)
        lanes.set_title("Who was in which step")
        steps = [step + 0.5 for step in range(len(batches))]
        totals.bar(steps, tokens["prefill"], 1, color=COLORS["prefill"], label="prefill")
        totals.bar(
            steps, tokens["decode"], 1, tokens["prefill"], color=COLORS["decode"], label="decode"
        )
        totals.set_title("Tokens computed in each step")
        totals.set_ylabel("tokens")
        totals.set_xlabel("step")
        totals.legend(ncols=2, loc="upper right")
        caption(
            figure,
            "Blue: tokens of the request's prompt. Orange: one token of its reply.",
        )
    return figure


def plot_throughput_and_ttft(
    tokens_per_s: Mapping[str, float], ttft_s: Mapping[str, Sequence[float]], title: str
) -> Figure:
    """Draw two ways of serving the same requests side by side.

    Args:
        tokens_per_s: output tokens per second of each way.
        ttft_s: times to first token of its requests, in seconds.
        title: what was served.
    """
    with plt.rc_context(STYLE):
        figure, (rates, waits) = plt.subplots(1, 2, figsize=(8.4, 3.6))
        for index, (name, rate) in enumerate(tokens_per_s.items()):
            color = (COLORS["queue"], COLORS["prefill"], COLORS["decode"])[index % 3]
            rates.bar(name, rate, 0.6, color=color)
            rates.text(index, rate, f"{rate:.0f}", ha="center", va="bottom")
            rates.margins(y=0.12)
            ordered = sorted(ttft_s[name])
            waits.plot(range(1, len(ordered) + 1), ordered, color=color, lw=2, label=name)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        rates.set_title("Throughput")
        rates.set_ylabel("output tokens/s")
        rates.grid(axis="x", visible=False)
        waits.set_title("Time to first token")
        waits.set_ylabel("s")
        waits.set_xlabel("requests, the soonest served first")
        waits.legend()
        caption(
            figure, "Measured on this machine. Higher is better on the left, lower on the right."
        )
        plt.close(figure)
    return figure


def _ms(value: float) -> str:
    """A time in milliseconds with two significant digits, or all of them from 10 on."""
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2g} ms"
