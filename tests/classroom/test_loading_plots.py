"""The plots of B4 say what was measured and what it costs."""

import matplotlib
import pytest

from course_lib.classroom.plots import plot_night_cost, plot_waterfall


@pytest.fixture(autouse=True)
def no_screen():
    matplotlib.use("agg")


def test_each_phase_begins_where_the_one_before_it_ends_and_panels_share_the_scale():
    figure = plot_waterfall(
        {"cold": {"disk_read": 2.0, "host_copy": 6.0}, "warm": {"disk_read": 0.5, "host_copy": 1.5}}
    )
    cold, warm = figure.axes
    assert [(bar.get_x(), bar.get_width()) for bar in cold.patches] == [(0, 2), (2, 6)]
    assert [(bar.get_x(), bar.get_width()) for bar in warm.patches] == [(0, 0.5), (0.5, 1.5)]
    assert cold.get_xlim() == warm.get_xlim()
    assert [text.get_text() for text in cold.texts] == ["2.0 s, 25%", "6.0 s, 75%"]
    assert [label.get_text() for label in cold.get_yticklabels()] == ["disk read", "host copy"]
    assert (
        cold.get_title(loc="left") == "cold: 8.0 s" and warm.get_title(loc="left") == "warm: 2.0 s"
    )
    assert warm.get_xlabel() == "time since it began (s)" and cold.get_xlabel() == ""


def test_the_same_phase_has_the_same_colour_in_every_panel():
    figure = plot_waterfall({"a": {"x": 1.0, "y": 1.0}, "b": {"y": 1.0}})
    a, b = figure.axes
    assert a.patches[1].get_facecolor() == b.patches[0].get_facecolor()
    assert a.patches[0].get_facecolor() != a.patches[1].get_facecolor()


@pytest.mark.parametrize(
    "starts", [{}, {"a": {}}, {"a": {"x": 0.0}}, {"a": dict.fromkeys(range(25), 1.0)}]
)
def test_what_cannot_be_read_is_not_drawn(starts):
    with pytest.raises(ValueError, match="draw 1 to 24 phases"):
        plot_waterfall(starts)


def test_the_price_of_nights_is_drawn_against_that_of_staying():
    figure = plot_night_cost([1, 10, 100], {"7B": [0.1, 0.6, 2.0], "70B": [0.2, 0.9, 2.0]})
    (ax,) = figure.axes
    small, large, staying = ax.lines
    assert list(small.get_xdata()) == [1, 10, 100] and list(large.get_ydata()) == [0.2, 0.9, 2.0]
    assert list(staying.get_ydata()) == [1, 1]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["7B", "70B"]
    assert "requests" in ax.get_xlabel() and "price" in ax.get_ylabel()


def test_curves_of_another_length_are_refused():
    with pytest.raises(ValueError, match="a share for each"):
        plot_night_cost([1, 10], {"7B": [0.1]})
    with pytest.raises(ValueError, match="two or more"):
        plot_night_cost([1], {"7B": [0.1]})
