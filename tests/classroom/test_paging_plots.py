"""The pictures of the paged KV cache say who owns which block, also on a pool of one's own."""

import matplotlib
import pytest

from course_lib import LLM, SamplingParams
from course_lib.classroom.plots import (
    plot_block_map,
    plot_block_maps,
    plot_fragmentation,
    plot_prefix_hits,
)
from course_lib.classroom.plots.style import REPLY_COLORS
from course_lib.classroom.recording import BlockMap, record_block_maps
from course_lib.data import DEFAULT_MODEL
from course_lib.engine.block_pool import BlockPool
from tests.classroom.answers_b2 import PoolOfItsOwn

MAP = BlockMap(
    step=7,
    num_blocks=8,
    block_size=16,
    owned={"0": (1, 2), "1": (1, 3)},
    cached={"2": (1, 5)},
    num_waiting=4,
)


@pytest.fixture(autouse=True)
def no_screen():
    matplotlib.use("agg")


def texts(ax):
    return [text.get_text().strip() for text in ax.texts]


def test_fragmentation_shows_what_is_set_aside_and_stays_empty():
    figure = plot_fragmentation([320, 75, 900, 250], 2048, 16)
    fixed, paged = figure.axes
    assert fixed.get_title(loc="left") == "Fixed reservation: 512 blocks of 16 tokens, 18.9 % used"
    assert paged.get_title(loc="left") == "Pages: 98 blocks of 16 tokens, 98.5 % used"
    assert texts(fixed) == ["1728 unused", "1973 unused", "1148 unused", "1798 unused"]
    assert texts(paged) == ["0 unused", "5 unused", "12 unused", "6 unused"]
    assert [bar.get_width() for bar in paged.patches[4:]] == [320, 75, 900, 250]
    assert paged.get_xlabel() == "tokens"
    assert "Hatched: set aside, but empty" in figure.get_supxlabel()


def test_a_block_map_counts_owned_shared_and_cached_blocks():
    assert (MAP.num_owned, MAP.num_shared, MAP.num_cached) == (3, 1, 1)
    assert MAP.owners(1) == ["0", "1"] and MAP.finders(1) == MAP.finders(5) == ["2"]


def test_a_block_map_is_a_cell_for_each_block_in_the_colour_of_its_owner():
    figure = plot_block_map(MAP)
    (ax,) = figure.axes
    null, shared, of_0, of_1, free, cached, *_ = ax.patches
    assert len(ax.patches) == 8 and null.get_hatch()
    colors = [matplotlib.colors.to_hex(cell.get_facecolor()).upper() for cell in (of_0, of_1)]
    assert colors == list(REPLY_COLORS[:2])
    assert shared.get_facecolor() not in (of_0.get_facecolor(), of_1.get_facecolor())
    assert cached.get_alpha() < 1 == of_0.get_alpha() == free.get_alpha()
    assert texts(ax) == ["0", "1", "1", "1"]  # places in the block tables, of blocks 1, 2, 3 and 5
    assert ax.get_title(loc="left") == (
        "After step 7: running 0, 1; 4 waiting; 3 blocks owned, 1 of them shared, 1 cached"
    )
    assert "place in a block table" in figure.get_supxlabel()
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[:3] == ["request 0", "request 1", "request 2"]


def test_several_steps_are_drawn_under_each_other():
    empty = BlockMap(8, 8, 16, {}, {}, 0)
    first, second = plot_block_maps([MAP, empty]).axes
    assert len(first.patches) == len(second.patches) == 8 and not texts(second)
    assert "nobody running" in second.get_title(loc="left")


def test_prefix_hits_name_what_was_computed():
    (ax,) = plot_prefix_hits([300, 100], [0, 80], "Two questions").axes
    assert ax.get_title(loc="left") == "Two questions: 20 % of the prompt tokens found"
    assert texts(ax) == ["300", "20"]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("tokens of the prompt", "request")


@pytest.mark.parametrize("block_pool", [BlockPool, PoolOfItsOwn])
def test_a_recorded_run_is_the_engines_own(block_pool):
    llm = LLM(
        DEFAULT_MODEL,
        dtype="float32",
        block_pool=block_pool,
        max_model_len=64,
        num_gpu_blocks_override=10,
        max_num_seqs=2,
    )
    prompts = [[*range(500, 532), last] for last in (1, 2, 3)]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    before, first, *_, last = record_block_maps(llm.llm_engine, prompts, params)
    assert (before.step, before.owned, before.cached, before.num_waiting) == (0, {}, {}, 3)
    assert list(first.owned) == ["0", "1"] and first.num_waiting == 1
    assert first.owned["0"][:2] == first.owned["1"][:2] and first.num_shared == 2
    assert first.num_owned == 4 and first.num_cached == 0
    assert last.owned == {} and list(last.cached) == ["0", "1", "2"] and last.num_cached == 2
