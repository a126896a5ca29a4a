"""The pictures of a failed check show the first difference; a picture never fails a check."""

import re

import matplotlib
import pytest

from course_lib.classroom import checks
from course_lib.classroom.checks import CheckFailed, assess, check, find_exercise
from course_lib.classroom.plots.differences import plot_pool, plot_schedules
from tests.classroom import answers_a1, answers_b2


@pytest.fixture(autouse=True)
def no_screen():
    matplotlib.use("agg")


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_schedules_stand_below_each_other_and_the_last_step_differs():
    before = [{"a": (0, 6)}, {"a": (6, 1), "b": (0, 3)}]
    figure = plot_schedules(before, {"b": (3, 1)}, {"a": (7, 1)}, {"a": 6, "b": 3, "c": 9})
    asked, got = figure.axes
    assert texts(asked) == ["6", "1", "3", "1"] == texts(got)
    assert [tick.get_text() for tick in got.get_yticklabels()] == ["a", "b"]  # c never ran
    places = [[text.get_position() for text in ax.texts][-1] for ax in (asked, got)]
    assert places == [(2.5, 1), (2.5, 0)]
    assert got.get_xlabel() == "step" and got.get_xlim() == (0, 3)


def test_of_a_long_schedule_the_last_steps_are_shown():
    before = [{"a": (step, 1)} for step in range(40)]
    asked, _ = plot_schedules(before, {"a": (40, 1)}, {}, {"a": 1}).axes
    assert asked.get_xlim() == (29, 41) and len(texts(asked)) == 12


def test_a_pool_shows_each_block_and_whose_it_is():
    figure = plot_pool(
        {1: "11", 2: "22", 3: "3"}, {1: ["a", "b"], 3: ["b"]}, [2], 6, {"b": [1, 3], "c": []}, "go"
    )
    pool, tables = figure.axes
    assert len(pool.patches) == 5
    assert "to evict: no. 1" in texts(pool)[3]
    assert texts(tables) == ["1", "3"]
    assert [tick.get_text() for tick in tables.get_yticklabels()] == ["b"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:3] == ["owned by a", "owned by b", "owned by several"]


@pytest.mark.parametrize("answer", answers_a1.WRONG["A1.2"], ids=lambda a: a.__name__)
def test_each_wrong_schedule_has_a_picture_of_its_step(answer):
    verdict = assess(find_exercise("A1.2"), answer, 1)
    step = re.search(r"step (\d+) ", verdict.message)
    without = ("to end, got", "schedule() returned")  # no batch that could be drawn
    if step is None or any(words in verdict.message for words in without):
        assert verdict.picture is None
        return
    _, got = verdict.picture().axes
    assert got.get_xlim()[1] == int(step[1]) + 1


@pytest.mark.parametrize("answer", answers_b2.WRONG["B2.3"], ids=lambda a: a.__name__)
def test_each_wrong_pool_has_a_picture_of_its_blocks(answer):
    verdict = assess(find_exercise("B2.3"), answer, 1)
    blocks = re.search(r"with (\d+) blocks of", verdict.message)
    if blocks is None:
        assert verdict.picture is None
        return
    pool, _ = verdict.picture().axes
    assert len(pool.patches) == int(blocks[1])


def test_in_a_notebook_the_picture_comes_before_the_message(monkeypatch):
    shown = []
    monkeypatch.setattr(checks, "get_ipython", object)
    monkeypatch.setattr(checks, "display", shown.append)
    with pytest.raises(CheckFailed):
        check("A1.2", answers_a1.WRONG["A1.2"][0])
    assert len(shown) == 1 and len(shown[0].axes) == 2


def test_a_picture_that_fails_leaves_the_message(monkeypatch):
    def fail(figure):
        raise RuntimeError("no screen")

    monkeypatch.setattr(checks, "get_ipython", object)
    monkeypatch.setattr(checks, "display", fail)
    with pytest.raises(CheckFailed, match="First difference"):
        check("A1.2", answers_a1.WRONG["A1.2"][0])
