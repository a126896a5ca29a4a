"""What all plots have in common: colours, fonts, where the caption stands."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Of the palette by Okabe and Ito, https://jfly.uni-koeln.de/color/
COLORS = {"queue": "#999999", "prefill": "#0072B2", "decode": "#E69F00", "accent": "#D55E00"}
REPLY_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")

STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
}


@contextmanager
def stacked_figure(
    rows: int, height_ratios: list[float], height: float = 4.4
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of panels under each other on one x axis, closed so that it is shown once.

    Args:
        rows: number of panels.
        height_ratios: of the panels.
        height: of the figure, in inches.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, 1, sharex=True, figsize=(8.4, height), height_ratios=height_ratios, squeeze=False
        )
        yield figure, list(axes[:, 0])
        plt.close(figure)


def caption(figure: Figure, text: str) -> None:
    """Write what the reader should see under a figure."""
    figure.supxlabel(text, fontsize=9, color="#555555", x=0.01, ha="left")
