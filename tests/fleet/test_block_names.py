"""Names of simulated blocks tell apart just what the engine's hashes tell apart."""

from hypothesis import given
from hypothesis import strategies as st

from course_lib.engine.block_pool import BlockPool
from course_lib.engine.request import Request
from course_lib.fleet.block_names import block_names, contents_of
from course_lib.traces.trace import Segment, content_ids

# Few contents and short runs, so that beginnings are often the same and runs often meet.
PROMPTS = st.lists(
    st.builds(Segment, st.integers(-2, 1), st.integers(0, 5)), min_size=1, max_size=6
).filter(content_ids)


@given(st.lists(PROMPTS, min_size=2, max_size=8), st.integers(1, 4))
def test_two_blocks_have_one_name_just_where_the_engine_gives_them_one(prompts, block_size):
    pool = BlockPool(2, block_size)
    ours, engines = [], []
    for prompt in prompts:
        ids = content_ids(prompt)
        ours += block_names(prompt, block_size)
        engines += pool.hashes_of(Request("r", ids), len(ids) // block_size)
    assert len(ours) == len(engines)
    assert len(set(zip(ours, engines, strict=True))) == len(set(ours)) == len(set(engines))


@given(PROMPTS)
def test_tokens_and_the_segments_they_come_from_have_the_same_names(prompt):
    assert block_names(contents_of(content_ids(prompt)), 2) == block_names(prompt, 2)
