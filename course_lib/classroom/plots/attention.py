"""Plots of the kernel notebook: who reads which block, online softmax, time against bandwidth."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from course_lib.classroom.plots.style import COLORS, REPLY_COLORS, STYLE, caption


def plot_block_reads(
    block_tables: Sequence[Sequence[int]],
    context_lens: Sequence[int],
    *,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    splits: Sequence[int] = (1,),
) -> Figure:
    """Draw which program of a decode step reads which block of the cache, a panel for each split.

    Args:
        block_tables: blocks of each request, in order; longer rows are padding.
        context_lens: tokens of each request.
        block_size: tokens of a block.
        num_heads: query heads, one program each (and for each share of the keys).
        num_kv_heads: heads of the cache; a block is drawn as so many columns.
        splits: programs that share the blocks of a request and head.
    """
    num_blocks = 1 + max(
        block
        for table, context in zip(block_tables, context_lens, strict=True)
        for block in table[: -(-context // block_size)]
    )
    rows = [len(context_lens) * num_heads * num_splits for num_splits in splits]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(splits),
            1,
            sharex=True,
            squeeze=False,
            figsize=(8.4, 1.9 + 0.2 * sum(rows)),
            height_ratios=rows,
        )
        for ax, num_splits in zip(axes[:, 0], splits, strict=True):
            programs = _draw_reads(
                ax, block_tables, context_lens, block_size, num_heads, num_kv_heads, num_splits
            )
            ax.set_yticks(range(len(programs)), labels=programs, fontsize=7)
            ax.set_ylim(len(programs) - 0.5, -0.5)
            ax.set_title(
                f"{len(programs)} programs: one for each request and head"
                if num_splits == 1
                else f"{len(programs)} programs: {num_splits} for each request and head"
            )
            ax.set_xticks(np.arange(num_blocks) + 0.5, labels=[str(b) for b in range(num_blocks)])
            ax.set_xticks(range(num_blocks + 1), minor=True)
            ax.set_xlim(0, num_blocks)
            ax.grid(visible=False)
            ax.grid(which="minor", axis="x")
            ax.tick_params(which="both", length=0)
        axes[-1, 0].set_xlabel("block of the cache (number)")
        figure.legend(
            handles=[
                Patch(color=_color(request), label=f"request {request}, {context} tokens")
                for request, context in enumerate(context_lens)
            ],
            loc="outside upper right",
            ncols=len(context_lens),
            fontsize=8,
        )
        halves = (
            f" A block's column has {num_kv_heads} parts, one a KV head."
            if num_kv_heads > 1
            else ""
        )
        caption(
            figure,
            "A row is a program. A bar is a block that it reads, as wide as it is full; the number "
            f"is\nthe block's place in the request's block table.{halves}",
        )
        plt.close(figure)
    return figure


def _draw_reads(
    ax: Axes,
    block_tables: Sequence[Sequence[int]],
    context_lens: Sequence[int],
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    num_splits: int,
) -> list[str]:
    """One panel. Returns the programs' names, from the top."""
    programs: list[str] = []
    part = 1 / num_kv_heads  # of a column
    for request, context in enumerate(context_lens):
        blocks = -(-context // block_size)
        share = -(-blocks // num_splits)
        for head in range(num_heads):
            left = head // (num_heads // num_kv_heads) * part
            for split in range(num_splits):
                for index in range(split * share, min((split + 1) * share, blocks)):
                    filled = min(1.0, (context - index * block_size) / block_size)
                    start = block_tables[request][index] + left
                    ax.barh(
                        len(programs), part * filled, 0.8, start, align="center",
                        color=_color(request), linewidth=0,
                    )  # fmt: skip
                    ink = "white" if _color(request) == REPLY_COLORS[0] else "black"
                    middle = start + part * filled / 2
                    ax.text(
                        middle, len(programs), f"{index}", ha="center", va="center",
                        fontsize=6.5, color=ink,
                    )  # fmt: skip
                name = f"request {request}, head {head}"
                programs.append(name if num_splits == 1 else f"{name}, split {split}")
    return programs


def _color(request: int) -> str:
    return REPLY_COLORS[request % len(REPLY_COLORS)]


def plot_online_softmax(scores: Sequence[float], block_size: int) -> Figure:
    """Draw the largest score and the total so far, as an online softmax walks over the blocks.

    Args:
        scores: of one query with each key, in order.
        block_size: keys of a block.
    """
    values = np.asarray(scores, dtype=float)
    starts = range(0, len(values), block_size)
    ends = np.array([min(start + block_size, len(values)) for start in starts])
    largest = np.array([values[:end].max() for end in ends])
    totals = np.array([np.exp(values[:end] - values[:end].max()).sum() for end in ends])
    kept = np.append(0, totals[:-1]) * np.exp(np.append(-np.inf, largest[:-1]) - largest)
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8.4, 4.8))
        top.plot(np.arange(len(values)) + 0.5, values, "o", ms=4, color=COLORS["prefill"])
        edges = np.append(0, ends)
        top.stairs(largest, edges, baseline=None, color=COLORS["accent"], lw=2)
        top.set_title("Scores, and the largest so far")
        top.set_ylabel("score")
        bottom.bar(edges[:-1], kept, np.diff(edges), align="edge", color=COLORS["queue"],
                   edgecolor="w", label="what was there, scaled down")  # fmt: skip
        bottom.bar(edges[:-1], totals - kept, np.diff(edges), kept, align="edge",
                   color=COLORS["decode"], edgecolor="w", label="this block's part")  # fmt: skip
        for index in np.flatnonzero(np.diff(largest) > 0) + 1:
            factor = np.exp(largest[index - 1] - largest[index])
            middle = (edges[index] + edges[index + 1]) / 2
            bottom.annotate(
                f"x {factor:.2g}", (middle, totals[index]), xytext=(0, 3), ha="center",
                textcoords="offset points", fontsize=8, color=COLORS["accent"],
            )  # fmt: skip
        bottom.set_title("Total so far: the sum of exp(score - largest)")
        bottom.set_ylabel("total")
        bottom.set_xlabel(f"key (blocks of {block_size} tokens)")
        bottom.set_xlim(0, len(values))
        bottom.set_ylim(0, 1.15 * totals.max())
        bottom.set_xticks(edges)
        figure.legend(ncols=2, fontsize=8, loc="outside upper right")
        caption(
            figure,
            "Line: the largest score so far. Where it rises, what was summed before is multiplied "
            "by the\nred factor, because it was measured against a smaller one.",
        )
        plt.close(figure)
    return figure


def plot_attention_errors(errors: Mapping[str, Mapping[int, float]], limit: float) -> Figure:
    """Draw a kernel's error against float64 over the length of the context.

    Args:
        errors: by series, context in tokens -> ||out - reference|| / ||reference||.
        limit: of the exercise's check, in float32.
    """
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8.4, 3.4))
        for index, (name, series) in enumerate(errors.items()):
            color = (COLORS["prefill"], COLORS["decode"])[index % 2]
            ax.plot(list(series), list(series.values()), "o-", color=color, lw=2, label=name)
        ax.axhline(limit, color=COLORS["accent"], linestyle="--", lw=1.2, label="limit in float32")
        _context_axis(ax, sorted({context for series in errors.values() for context in series}))
        ax.set_yscale("log")
        ax.set_ylabel("relative error")
        ax.set_title("Error against float64")
        figure.legend(loc="outside upper right", ncols=3, fontsize=9)
        caption(figure, "||out - reference|| / ||reference||. Both axes are logarithmic.")
        plt.close(figure)
    return figure


def plot_decode_times(
    floors_us: Mapping[str, Mapping[int, float]],
    measured_us: Mapping[str, Mapping[int, float]],
    title: str,
    note: str,
) -> Figure:
    """Draw the time of attention in a decode step against what reading the cache takes at least.

    Args:
        floors_us: by GPU, context in tokens -> bytes / bandwidth, in microseconds.
        measured_us: by kernel, context in tokens -> microseconds; empty if nothing was measured.
        title: what was computed, in words.
        note: where the numbers come from, for the caption.
    """
    lines = [*floors_us.values(), *measured_us.values()]
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8.4, 4.2))
        for index, (name, series) in enumerate(floors_us.items()):
            style = ("--", ":", "-.")[index % 3]
            ax.plot(list(series), list(series.values()), style, color="black", lw=1.4, label=name)
        for index, (name, series) in enumerate(measured_us.items()):
            color = REPLY_COLORS[index % len(REPLY_COLORS)]
            ax.plot(list(series), list(series.values()), "o-", color=color, lw=2, label=name)
        _context_axis(ax, sorted({context for series in lines for context in series}))
        ax.set_yscale("log")
        ax.set_ylabel("time (µs)")
        ax.set_title(title)
        figure.legend(loc="outside right upper", fontsize=9)
        caption(figure, f"Both axes are logarithmic, lower is better. {note}")
        plt.close(figure)
    return figure


def _context_axis(ax: Axes, contexts: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(contexts, labels=[f"{context:,}" for context in contexts])
    ax.minorticks_off()
    ax.set_xlabel("tokens of each context")
