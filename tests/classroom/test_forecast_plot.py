"""The picture of a forecast marks what a start at one moment has to serve."""

import pytest

from course_lib.classroom.plots import plot_forecast

DAY = [0.0] * 50 + [1.0, 3.0, 2.0] + [0.5] * 7  # an hour of minutes


def labels(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    ("at_s", "most"), [(49 * 60, "1.00"), (49 * 60 + 30, "3.00"), (53 * 60, "0.50")]
)
def test_the_most_that_is_expected_until_ready_is_named(at_s: float, most: str) -> None:
    figure = plot_forecast(DAY, 60, ready_time_s=90, at_s=at_s)
    assert labels(figure)[-1] == f"most until then:\n{most} requests/s"
    (ax,) = figure.axes
    (line,) = ax.collections
    (start, end) = line.get_segments()[0]
    assert (start[0], end[0], start[1]) == (at_s, at_s + 90, float(most))


def test_what_came_is_drawn_in_the_same_unit() -> None:
    arrivals_s = [50 * 60 + second for second in range(60)]
    figure = plot_forecast(DAY, 60, 90, 49 * 60, arrivals_s, window_s=(2400, 3600), title="Today")
    came, expected = figure.axes[0].patches[:2]
    assert came.get_data().values[50] == pytest.approx(1.0) and came.get_data().values.sum() == 1
    assert list(expected.get_data().values) == DAY
    assert figure.axes[0].get_title(loc="left") == "Today"
    assert labels(figure)[0] == "came"


def test_one_cannot_look_beyond_the_forecast() -> None:
    with pytest.raises(ValueError, match="must lie within the forecast of 3600 s"):
        plot_forecast(DAY, 60, 90, at_s=3590)
