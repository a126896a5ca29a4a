"""The plots of the kernel notebook: which program reads what, online softmax, errors, times."""

import matplotlib
import numpy as np
import pytest

from course_lib.classroom.plots import (
    plot_attention_errors,
    plot_block_reads,
    plot_decode_times,
    plot_online_softmax,
)


@pytest.fixture(autouse=True)
def no_screen():
    matplotlib.use("agg")


def reads(ax):
    """(row, left, width) of the bars, in blocks."""
    return [(round(b.get_y() + 0.4), b.get_x(), b.get_width()) for b in ax.patches]


def test_a_program_reads_the_blocks_of_its_table_and_a_last_one_in_part():
    figure = plot_block_reads(
        [[5, 2, 0], [3, 0, 0]], [6, 4], block_size=4, num_heads=2, num_kv_heads=1
    )
    (ax,) = figure.axes
    assert ax.get_title(loc="left") == "4 programs: one for each request and head"
    assert reads(ax) == [(0, 5, 1), (0, 2, 0.5), (1, 5, 1), (1, 2, 0.5), (2, 3, 1), (3, 3, 1)]
    assert [text.get_text() for text in ax.texts] == ["0", "1", "0", "1", "0", "0"]


def test_heads_that_share_a_kv_head_read_the_same_part_of_a_block():
    figure = plot_block_reads([[1]], [4], block_size=4, num_heads=4, num_kv_heads=2)
    assert [left for _, left, _ in reads(figure.axes[0])] == [1, 1, 1.5, 1.5]
    assert "2 parts, one a KV head" in figure.get_supxlabel()


def test_splits_share_the_blocks_and_may_get_none():
    figure = plot_block_reads(
        [[4, 2, 6]], [12], block_size=4, num_heads=1, num_kv_heads=1, splits=(1, 2, 4)
    )
    assert reads(figure.axes[1]) == [(0, 4, 1), (0, 2, 1), (1, 6, 1)]
    assert reads(figure.axes[2]) == [(0, 4, 1), (1, 2, 1), (2, 6, 1)]
    labels = [label.get_text() for label in figure.axes[2].get_yticklabels()]
    assert labels[-1] == "request 0, head 0, split 3"


def test_the_total_of_an_online_softmax_ends_at_the_whole_sum():
    scores = [0.0, 1.0, 3.0, -1.0, 2.0]
    top, bottom = plot_online_softmax(scores, 2).axes
    steps = top.patches[0].get_data().values
    assert list(steps) == [1, 3, 3]
    last = bottom.containers[1][-1]
    total = np.exp(np.array(scores) - 3).sum()
    assert last.get_y() + last.get_height() == pytest.approx(total)
    assert [text.get_text() for text in bottom.texts] == ["x 0.14"]  # exp(1 - 3)
    assert bottom.get_xlabel() == "key (blocks of 2 tokens)"


def test_errors_stand_beside_the_limit():
    (ax,) = plot_attention_errors({"float32": {4: 5e-8, 64: 8e-8}}, 1e-5).axes
    assert [line.get_label() for line in ax.lines] == ["float32", "limit in float32"]
    assert ax.get_xlabel() == "tokens of each context" and ax.get_ylabel() == "relative error"


@pytest.mark.parametrize("measured", [{}, {"your kernel": {512: 90.0, 2048: 300.0}}])
def test_times_stand_beside_what_the_bandwidth_allows(measured):
    floors = {"H100_80GB, 3350 GB/s": {512: 5.0, 2048: 20.0}}
    figure = plot_decode_times(floors, measured, "Attention, 8 requests", "Nothing measured.")
    (ax,) = figure.axes
    assert [line.get_label() for line in ax.lines] == [*floors, *measured]
    assert list(ax.lines[0].get_ydata()) == [5.0, 20.0]
    assert ax.get_ylabel() == "time (µs)" and "Nothing measured." in figure.get_supxlabel()
