"""The plots of the sizing notebook say what the calculator says."""

import matplotlib
import pytest

from course_lib.classroom.plots import (
    plot_context_growth,
    plot_gpus_needed,
    plot_mig_fits,
    plot_plan,
)
from course_lib.sizing import catalog
from course_lib.sizing.memory import estimate_gpu_requirements
from course_lib.sizing.mig import best_mig_fit

H100 = catalog.find_gpu("H100_80GB")


@pytest.fixture(autouse=True)
def no_screen():
    matplotlib.use("agg")


def texts(ax):
    return [text.get_text().strip() for text in ax.texts]


def test_the_heat_map_has_a_panel_for_each_load_and_a_number_for_each_gpu():
    few, many = {"L4": 1, "H100": 1}, {"L4": 13, "H100": 4}
    figure = plot_gpus_needed({"8 AM": {"A": few}, "9 AM": {"A": many}}, "BF16.")
    left, right = figure.axes
    assert [ax.get_title(loc="left") for ax in (left, right)] == ["8 AM", "9 AM"]
    assert texts(left) == ["1", "1"] and texts(right) == ["13", "4"]
    assert [label.get_text() for label in left.get_xticklabels()] == ["L4", "H100"]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()][-1] == "more than 8"
    assert "memory alone. BF16." in figure.get_supxlabel()


def test_a_plan_is_framed_in_the_heat_map_and_its_memory_drawn_up_to_the_total():
    needs = {
        "8B": estimate_gpu_requirements(8, 32, 8, 128, 8192, 4),
        "70B": estimate_gpu_requirements(70, 80, 8, 128, 8192, 4),
    }
    grid, bar = plot_plan(needs, "70B", H100, "4 x 8,192 tokens").axes
    (frame,) = grid.patches
    column = [label.get_text() for label in grid.get_xticklabels()].index("H100_80GB")
    assert frame.get_xy() == (column - 0.5, 0.5)
    assert len(texts(grid)) == 2 * len(catalog.gpus())
    assert texts(grid)[len(catalog.gpus()) + column] == "3"
    ends = [part.get_x() + part.get_width() for part in bar.patches]
    assert ends == pytest.approx([140.0, 150.737, 173.348], abs=0.001)
    assert bar.get_title(loc="left") == "70B: 173 GB, 3 x H100_80GB"
    assert [line.get_xdata()[0] for line in bar.lines] == [76, 152, 228]
    assert bar.get_xlabel() == "memory (GB)"


def test_memory_over_context_is_drawn_against_gpus_up_to_the_largest_need():
    lens = [1024, 4096, 131072]
    needs = [estimate_gpu_requirements(8, 32, 8, 128, length, 100) for length in lens]
    figure = plot_context_growth(lens, needs, H100, "8B, 100 customers")
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1K", "4K", "128K"]
    assert texts(ax) == [f"{2**power} x H100_80GB" for power in range(6)]
    assert list(ax.lines[2].get_ydata()) == [need.total_with_overhead_gb for need in needs]
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_ylabel()) == ("log", "log", "memory (GB)")


def test_slices_are_drawn_with_the_replicas_that_fit():
    required = {"small": 3.6, "medium": 10.1, "large": 100.0}
    fits = {name: best_mig_fit(size, H100) for name, size in required.items()}
    (ax,) = plot_mig_fits(required, fits, H100).axes
    assert texts(ax)[:3] == ["3.6 GB: 7 x 1g.10gb", "10.1 GB: 4 x 1g.20gb", "100 GB: no slice"]
    assert texts(ax)[3:] == ["9.5 GB", "19.0 GB", "38.0 GB", "76.0 GB"]
    assert ax.get_title(loc="left") == "Replicas on one H100_80GB"
