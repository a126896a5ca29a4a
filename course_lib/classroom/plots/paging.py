"""Plots of the paged KV cache: fragmentation, who owns which block, what the prefix cache saves."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from course_lib.classroom.plots.style import COLORS, REPLY_COLORS, STYLE, caption, stacked_figure
from course_lib.classroom.recording import BlockMap
from course_lib.sizing.memory import paged_kv_accounting

COLUMNS = 16  # blocks in a row of a block map
SHARED, FREE, NULL = "#444444", "#f7f7f7", "#ffffff"


def plot_fragmentation(
    cached_tokens: Sequence[int], max_tokens_per_request: int, tokens_per_block: int
) -> Figure:
    """Draw what requests set aside in the KV cache and what they use, reserved above paged.

    Args:
        cached_tokens: tokens that each request has in the cache.
        max_tokens_per_request: what a fixed reservation sets aside for each.
        tokens_per_block: of a page.
    """
    account = paged_kv_accounting(cached_tokens, max_tokens_per_request, tokens_per_block)
    rows = range(len(cached_tokens))
    ways = {
        "Fixed reservation": (account.fixed_reservation_blocks, max_tokens_per_request),
        "Pages": (account.paged_blocks, 1),
    }
    with stacked_figure(2, height_ratios=[1, 1]) as (figure, panels):
        for ax, (title, (blocks, at_least)) in zip(panels, ways.items(), strict=True):
            taken = [
                -(-max(tokens, at_least) // tokens_per_block) * tokens_per_block
                for tokens in cached_tokens
            ]
            ax.barh(rows, taken, 0.7, color="#dddddd", hatch="////", edgecolor="white")
            ax.barh(rows, cached_tokens, 0.7, color=COLORS["prefill"])
            used = 100 * account.used_tokens / (blocks * tokens_per_block)
            ax.set_title(
                f"{title}: {blocks} blocks of {tokens_per_block} tokens, {used:.1f} % used"
            )
            for row, (tokens, room) in enumerate(zip(cached_tokens, taken, strict=True)):
                ax.text(room, row, f"  {room - tokens} unused", va="center", fontsize=9)
            ax.set_yticks(rows, labels=[f"request {row}" for row in rows])
            ax.set_ylim(len(cached_tokens) - 0.5, -0.5)
            ax.grid(axis="y", visible=False)
            ax.margins(x=0.16)
        panels[-1].set_xlabel("tokens")
        caption(
            figure,
            "Blue: tokens in the KV cache. Hatched: set aside, but empty. A reservation is as long "
            "as the longest\nrequest may become. With pages, less than one block a request is "
            "empty.",
        )
    return figure


def plot_block_map(block_map: BlockMap) -> Figure:
    """Draw who owns which block after one step."""
    return plot_block_maps([block_map])


def plot_block_maps(block_maps: Sequence[BlockMap]) -> Figure:
    """Draw who owns which block after each of several steps of one run."""
    num_rows = -(-block_maps[0].num_blocks // COLUMNS)
    with plt.rc_context(STYLE):
        height = len(block_maps) * (0.55 + 0.36 * num_rows) + 1.3
        figure, axes = plt.subplots(len(block_maps), 1, squeeze=False, figsize=(8.4, height))
        for ax, block_map in zip(axes[:, 0], block_maps, strict=True):
            _draw_block_map(ax, block_map)
        figure.legend(handles=_legend(block_maps), loc="outside right upper", fontsize=8)
        caption(
            figure,
            "One cell is one block; at the left is the id of a row's first. The number is its "
            "place in a block table:\n0 holds a request's first tokens. Pale: nobody owns the "
            "block, but its contents can still be found.",
        )
        plt.close(figure)
    return figure


def _draw_block_map(ax: Axes, block_map: BlockMap) -> None:
    for block in range(block_map.num_blocks):
        owners, finders = block_map.owners(block), block_map.finders(block)
        names, tables = (owners, block_map.owned) if owners else (finders, block_map.cached)
        x, y = block % COLUMNS, block // COLUMNS
        color = _color(names) if names else NULL if block == 0 else FREE
        ax.add_patch(
            Rectangle(
                (x + 0.05, y + 0.05),
                0.9,
                0.9,
                facecolor=color,
                edgecolor="#bbbbbb",
                linewidth=0.6,
                alpha=1 if owners or not names else 0.3,
                hatch="xxxx" if block == 0 else None,
            )
        )
        if names:
            ink = "black" if not owners or color in REPLY_COLORS[1:] else "white"
            place = list(tables[names[0]]).index(block)
            ax.text(x + 0.5, y + 0.5, f"{place}", ha="center", va="center", fontsize=7, color=ink)
    num_rows = -(-block_map.num_blocks // COLUMNS)
    ax.set_xlim(0, COLUMNS)
    ax.set_ylim(num_rows, 0)
    ax.set_yticks(
        [row + 0.5 for row in range(num_rows)],
        labels=[f"{row * COLUMNS}" for row in range(num_rows)],
    )
    ax.set_ylabel("first block", fontsize=8)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    running = f"running {', '.join(block_map.owned)}" if block_map.owned else "nobody running"
    ax.set_title(
        f"After step {block_map.step}: {running}; {block_map.num_waiting} waiting; "
        f"{block_map.num_owned} blocks owned, {block_map.num_shared} of them shared, "
        f"{block_map.num_cached} cached",
        fontsize=9,
    )


def _color(names: Sequence[str]) -> str:
    return SHARED if len(names) > 1 else REPLY_COLORS[int(names[0]) % len(REPLY_COLORS)]


def _legend(block_maps: Sequence[BlockMap]) -> list[Patch]:
    names = {name for m in block_maps for name in [*m.owned, *m.cached]}
    handles = [Patch(color=_color([n]), label=f"request {n}") for n in sorted(names, key=int)]
    return [
        *handles,
        Patch(color=SHARED, label="several requests"),
        Patch(facecolor=FREE, edgecolor="#bbbbbb", label="free, empty"),
        Patch(facecolor=NULL, edgecolor="#bbbbbb", hatch="xxxx", label="null block"),
    ]


def plot_prefix_hits(
    prompt_tokens: Sequence[int], cached_tokens: Sequence[int], title: str
) -> Figure:
    """Draw how much of each prompt was in the cache already, and how much was computed.

    Args:
        prompt_tokens: length of each prompt.
        cached_tokens: how many of them the prefix cache had.
        title: what was served.
    """
    requests = range(len(prompt_tokens))
    computed = [
        prompt - cached for prompt, cached in zip(prompt_tokens, cached_tokens, strict=True)
    ]
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8.4, 3.4))
        ax.bar(requests, cached_tokens, 0.75, color=COLORS["queue"], label="found in the cache")
        ax.bar(
            requests,
            computed,
            0.75,
            bottom=cached_tokens,
            color=COLORS["prefill"],
            label="computed",
        )
        for request, (prompt, rest) in enumerate(zip(prompt_tokens, computed, strict=True)):
            ax.text(request, prompt, f"{rest}", ha="center", va="bottom", fontsize=8)
        ax.margins(y=0.1)
        share = 100 * sum(cached_tokens) / max(1, sum(prompt_tokens))
        ax.set_title(f"{title}: {share:.0f} % of the prompt tokens found")
        ax.set_ylabel("tokens of the prompt")
        ax.set_xlabel("request")
        ax.set_xticks(requests)
        ax.grid(axis="x", visible=False)
        ax.legend(ncols=2, loc="upper left", bbox_to_anchor=(0, -0.18))
        caption(figure, "The number on a bar is what had to be computed, in tokens.")
        plt.close(figure)
    return figure
