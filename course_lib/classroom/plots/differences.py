"""Pictures of a failed check: a schedule beside the one that was asked for, a pool's blocks."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from course_lib.classroom.plots.style import COLORS, REPLY_COLORS, STYLE, caption, stacked_figure

#: What each request computes in a step: (first token, number of tokens).
Shares = Mapping[str, tuple[int, int]]

LAST_STEPS = 12


def plot_schedules(
    before: Sequence[Shares],
    asked: Shares,
    got: Shares,
    prompt_tokens: Mapping[str, int],
) -> Figure:
    """Draw the step at which a schedule leaves the rules, and those before it, as a Gantt chart.

    Args:
        before: the steps that were right.
        asked: what the rules ask for in the next one.
        got: what came.
        prompt_tokens: of each request; what lies behind is its reply.
    """
    shown = before[-LAST_STEPS + 1 :]
    first = len(before) - len(shown)
    names = [name for name in prompt_tokens if any(name in step for step in [*shown, asked, got])]
    height = 1.6 + 2 * (0.5 + 0.24 * len(names))
    with stacked_figure(2, height_ratios=[1, 1], height=height) as (figure, panels):
        for ax, title, last in zip(
            panels, ("What the rules ask for", "Yours"), (asked, got), strict=True
        ):
            ax.axvspan(len(before), len(before) + 1, color=COLORS["accent"], alpha=0.15, lw=0)
            for step, shares in enumerate([*shown, last], start=first):
                for name, (start, count) in shares.items():
                    if name in names:
                        _draw_share(ax, step, names.index(name), start, count, prompt_tokens[name])
            ax.set_title(title)
            ax.set_yticks(range(len(names)), labels=names)
            ax.set_ylim(len(names) - 0.5, -0.5)
            ax.grid(axis="y", visible=False)
        panels[-1].set_xlim(first, len(before) + 1)
        panels[-1].set_xlabel("step")
        caption(
            figure,
            "The number is how many tokens a request computes in a step. Blue: tokens of its "
            "prompt. Orange: of its\nreply. The shaded step is the first that differs.",
        )
    return figure


def _draw_share(ax: Axes, step: int, row: int, start: int, count: int, prompt_tokens: int) -> None:
    is_prefill = start < prompt_tokens
    color = COLORS["prefill" if is_prefill else "decode"]
    ax.barh(row, 0.94, left=step + 0.03, height=0.8, color=color)
    ink = "white" if is_prefill else "black"
    ax.text(step + 0.5, row, f"{count}", ha="center", va="center", fontsize=8, color=ink)


def plot_pool(
    contents: Mapping[int, str],
    owners: Mapping[int, Sequence[str]],
    cached_free: Sequence[int],
    num_blocks: int,
    tables: Mapping[str, Sequence[int]],
    last_call: str,
) -> Figure:
    """Draw the blocks of a pool and the block tables of those who own some.

    Args:
        contents: of a block, its tokens.
        owners: of a block, the requests that own it.
        cached_free: blocks that nobody owns and that can still be found, the next to go first.
        num_blocks: of the pool, the null block included.
        tables: of a request, its block ids as they are after the last call.
        last_call: that call.
    """
    rows = {name: list(table) for name, table in tables.items() if table}
    names = sorted({name for who in owners.values() for name in who} | set(rows))
    color_of = {name: REPLY_COLORS[i % len(REPLY_COLORS)] for i, name in enumerate(names)}
    width = max([num_blocks - 1, *(len(table) for table in rows.values())])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, 1, figsize=(8.4, 2.6 + 0.36 * len(rows)), height_ratios=[1.4, len(rows) + 0.6]
        )
        pool, lists = axes
        for block in range(1, num_blocks):
            who = owners.get(block, ())
            held = contents.get(block, "")
            color = "#ffffff" if not who else "#444444" if len(who) > 1 else color_of[who[0]]
            if not who and block in cached_free:
                held += f"\nto evict: no. {cached_free.index(block) + 1}"
                color = "#eeeeee"
            _draw_cell(pool, block - 1, 0, color, f"{block}", held)
        pool.set_title(f"The blocks as the rules have them, after {last_call}", fontsize=10)
        for row, (name, table) in enumerate(rows.items()):
            for place, block in enumerate(table):
                _draw_cell(lists, place, row, color_of[name], "", f"{block}")
        lists.set_title("The block tables as they are in your pool", fontsize=10)
        lists.set_yticks([row + 0.5 for row in range(len(rows))], labels=list(rows))
        for ax, num_rows in ((pool, 1), (lists, max(1, len(rows)))):
            ax.set_xlim(0, width)
            ax.set_ylim(num_rows, 0)
            ax.set_xticks([])
            ax.grid(visible=False)
            ax.spines[:].set_visible(False)
            ax.tick_params(length=0)
        pool.set_yticks([])
        handles = [Patch(color=color_of[name], label=f"owned by {name}") for name in names]
        handles += [
            Patch(color="#444444", label="owned by several"),
            Patch(facecolor="#eeeeee", edgecolor="#bbbbbb", label="free, can be found"),
            Patch(facecolor="#ffffff", edgecolor="#bbbbbb", label="free, empty"),
        ]
        figure.legend(handles=handles, loc="outside right upper", fontsize=8)
        caption(
            figure,
            "Above, each cell is a block with its id and its tokens. Below, the numbers are block "
            "ids, a request's first tokens at the left.",
        )
        plt.close(figure)
    return figure


def _draw_cell(ax: Axes, x: float, y: float, color: str, corner: str, text: str) -> None:
    ax.add_patch(
        Rectangle((x + 0.05, y + 0.06), 0.9, 0.88, facecolor=color, edgecolor="#bbbbbb", lw=0.6)
    )
    ink = "white" if color in ("#444444", REPLY_COLORS[0]) else "black"
    if corner:
        ax.text(x + 0.12, y + 0.16, corner, va="top", fontsize=7, weight="bold", color=ink)
    ax.text(x + 0.5, y + 0.55, text, ha="center", va="center", fontsize=8, color=ink)
