"""Plots of the sizing notebook: GPUs by model, memory by context, slices of a GPU."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import StrMethodFormatter

from course_lib.classroom.plots.style import COLORS, STYLE, caption
from course_lib.sizing.catalog import Gpu
from course_lib.sizing.memory import GpuRequirements
from course_lib.sizing.mig import MigFit

# Numbers of GPUs that look alike: a server commonly holds 8, so beyond it the colour changes.
GPU_BINS = {"1": 1, "2": 2, "3 to 4": 4, "5 to 8": 8, "more than 8": 10**9}
BIN_COLORS = ("#e3f1fa", "#a9d3ee", "#56B4E9", "#0072B2", "#D55E00")

MEMORY_COLORS = {
    "weights": COLORS["prefill"],
    "KV cache": COLORS["decode"],
    "overhead": COLORS["queue"],
}


def plot_gpus_needed(panels: Mapping[str, Mapping[str, Mapping[str, int]]], note: str) -> Figure:
    """Draw how many GPUs each model needs, a heat map a panel.

    Args:
        panels: title -> model -> GPU -> number needed. All panels have the same models and GPUs.
        note: what was assumed, for the caption.
    """
    first = next(iter(panels.values()))
    with plt.rc_context(STYLE):
        height = 1.9 + 0.27 * len(first)
        figure, axes = plt.subplots(
            1, len(panels), sharey=True, squeeze=False, figsize=(8.4, height)
        )
        for ax, (title, rows) in zip(axes[0], panels.items(), strict=True):
            _draw_gpus_needed(ax, rows)
            ax.set_title(title)
            ax.tick_params(axis="x", rotation=90)
        figure.legend(handles=_bin_handles(), title="GPUs", loc="outside right center", fontsize=8)
        caption(figure, f"Numbers of GPUs, counted by memory alone. {note}")
        plt.close(figure)
    return figure


def _draw_gpus_needed(ax: Axes, rows: Mapping[str, Mapping[str, int]]) -> None:
    """A heat map: model -> GPU -> number needed."""
    gpus = list(next(iter(rows.values())))
    colors = ListedColormap(BIN_COLORS)
    norm = BoundaryNorm([0.5] + [most + 0.5 for most in GPU_BINS.values()], colors.N)
    grid = np.array([[row[gpu] for gpu in gpus] for row in rows.values()])
    ax.imshow(grid, cmap=colors, norm=norm, aspect="auto")
    for (row, column), needed in np.ndenumerate(grid):
        ink = "white" if needed > 4 else "black"
        ax.text(column, row, f"{needed}", ha="center", va="center", color=ink, fontsize=8)
    ax.set_xticks(range(len(gpus)), labels=gpus, fontsize=8)
    ax.set_yticks(range(len(rows)), labels=rows, fontsize=8)
    ax.set_xticks(np.arange(len(gpus) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    ax.grid(visible=False)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)


def _bin_handles() -> list[Patch]:
    return [
        Patch(color=color, label=label) for label, color in zip(GPU_BINS, BIN_COLORS, strict=True)
    ]


def plot_plan(needs: Mapping[str, GpuRequirements], model: str, gpu: Gpu, title: str) -> Figure:
    """Draw how many GPUs each model needs, and for one of them on one GPU, what takes the memory.

    Args:
        needs: what the calculator gave for each model.
        model: the one whose memory is drawn.
        gpu: the GPU it is drawn against.
        title: the plan, in words.
    """
    rows = {
        name: {option: found.needed for option, found in need.gpu_options.items()}
        for name, need in needs.items()
    }
    with plt.rc_context(STYLE):
        figure, (grid, bar) = plt.subplots(
            2, 1, figsize=(8.4, 2.9 + 0.19 * len(rows)), height_ratios=[0.19 * len(rows), 1.0]
        )
        _draw_gpus_needed(grid, rows)
        grid.set_title(f"GPUs needed: {title}")
        place = (list(rows[model]).index(gpu.name) - 0.5, list(rows).index(model) - 0.5)
        grid.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="black", linewidth=2))
        figure.legend(handles=_bin_handles(), title="GPUs", loc="outside right upper", fontsize=8)
        _draw_memory(bar, needs[model], gpu, model)
        caption(
            figure,
            "Counted by memory alone. Framed: the plan of the bar below it. "
            f"Dashed: usable memory,\n{gpu.usable_gb:g} GB for each {gpu.name}.",
        )
        plt.close(figure)
    return figure


def _draw_memory(ax: Axes, needs: GpuRequirements, gpu: Gpu, title: str) -> None:
    needed = needs.gpu_options[gpu.name].needed
    parts = {"weights": needs.weights_gb, "KV cache": needs.kv_cache_gb}
    parts["overhead"] = needs.total_with_overhead_gb - sum(parts.values())
    left = 0.0
    for name, size_gb in parts.items():
        label = f"{name} {_gb(size_gb)}"
        ax.barh(0, size_gb, left=left, height=0.5, color=MEMORY_COLORS[name], label=label)
        left += size_gb
    _draw_capacity(ax, gpu, needed)
    ax.set_title(f"{title}: {_gb(left)}, {needed} x {gpu.name}")
    ax.set_xlabel("memory (GB)")
    ax.set_xlim(0, 1.03 * max(left, needed * gpu.usable_gb))
    ax.set_ylim(-0.5, 0.9)
    ax.set_yticks([])
    ax.grid(axis="y", visible=False)
    ax.legend(ncols=3, loc="upper left", fontsize=9)


def _draw_capacity(ax: Axes, gpu: Gpu, needed: int) -> None:
    """A line where each GPU ends; beyond 40 they would be a grey area, so only the last."""
    ends = range(1, needed + 1) if needed <= 40 else [needed]
    for number in ends:
        ax.axvline(number * gpu.usable_gb, color=COLORS["accent"], linestyle="--", linewidth=1.2)


def plot_context_growth(
    context_lens: Sequence[int], needs: Sequence[GpuRequirements], gpu: Gpu, title: str
) -> Figure:
    """Draw memory over the length of the conversations, against 1, 2, 4, ... GPUs.

    Args:
        context_lens: in tokens.
        needs: what the calculator gave at each of them.
        gpu: the kind of GPU.
        title: the plan, in words.
    """
    total = [need.total_with_overhead_gb for need in needs]
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8.4, 4.4))
        lines = {
            "weights": [need.weights_gb for need in needs],
            "KV cache": [need.kv_cache_gb for need in needs],
        }
        for name, sizes in lines.items():
            ax.plot(context_lens, sizes, color=MEMORY_COLORS[name], lw=2, label=name)
        ax.plot(context_lens, total, color="black", lw=2, label="total with overhead")
        number = 1
        while number == 1 or number * gpu.usable_gb < 2 * total[-1]:
            level = number * gpu.usable_gb
            ax.axhline(level, color=COLORS["accent"], linestyle="--", linewidth=1)
            ax.annotate(
                f"{number} x {gpu.name}",
                (context_lens[0], level),
                xytext=(2, 2),
                textcoords="offset points",
                color=COLORS["accent"],
                fontsize=8,
            )
            number *= 2
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(list(context_lens), labels=[_tokens(length) for length in context_lens])
        ax.set_xlim(context_lens[0], context_lens[-1])
        ax.set_title(title)
        ax.set_xlabel("tokens of each conversation (K: 1024)")
        ax.set_ylabel("memory (GB)")
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        figure.legend(loc="outside upper right", ncols=3)
        caption(
            figure,
            "Both axes are logarithmic. Dashed: what is usable of so many GPUs. Where the black "
            "line\ncrosses a dashed one, the plan needs more GPUs.",
        )
        plt.close(figure)
    return figure


def plot_mig_fits(
    required_gb: Mapping[str, float], fits: Mapping[str, MigFit | None], gpu: Gpu
) -> Figure:
    """Draw what each model needs against the slices of a GPU, and the slice that suits it.

    Args:
        required_gb: by model, overhead included.
        fits: by model, the best slice; None where none fits.
        gpu: the GPU that is cut.
    """
    share = gpu.usable_gb / gpu.memory_gb
    slices = sorted({profile.memory_gb * share for profile in gpu.mig}) or [gpu.usable_gb]
    right = min((size for size in slices if size >= max(required_gb.values())), default=slices[-1])
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8.4, 1.6 + 0.32 * len(required_gb)))
        for row, (name, size_gb) in enumerate(required_gb.items()):
            fit = fits[name]
            color = COLORS["queue"] if fit is None else COLORS["prefill"]
            ax.barh(row, min(size_gb, right), height=0.6, color=color)
            text = "no slice" if fit is None else f"{fit.replicas_per_gpu} x {fit.profile.name}"
            ax.text(1.02 * right, row, f"{_gb(size_gb)}: {text}", va="center")
        for size in slices:
            if size <= right:
                ax.axvline(size, color=COLORS["accent"], linestyle="--", linewidth=1.2)
                label = f"{size:.1f} GB"
                ax.text(size, -0.6, label, ha="center", va="bottom", color=COLORS["accent"])
        ax.set_yticks(range(len(required_gb)), labels=required_gb)
        ax.set_ylim(len(required_gb) - 0.5, -0.5)
        ax.set_xlim(0, 1.35 * right)
        ax.grid(axis="y", visible=False)
        ax.set_title(f"Replicas on one {gpu.name}", pad=20)
        ax.set_xlabel("GB that one replica needs")
        caption(
            figure, "Dashed: usable memory of the slices. At each bar: how many, of which profile."
        )
        plt.close(figure)
    return figure


def _gb(size_gb: float) -> str:
    return f"{size_gb:,.0f} GB" if size_gb >= 100 else f"{size_gb:.1f} GB"


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else f"{length}"
