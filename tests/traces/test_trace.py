"""A trace's prompts: equal contents are equal tokens, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.traces.trace import (
    Segment,
    Trace,
    TraceRequest,
    content_ids,
    prompt_contents,
    token_ids,
)


def prompt(prompt_tokens: int, *segments: tuple[int, int]) -> TraceRequest:
    return TraceRequest(0.0, prompt_tokens, 1, tuple(Segment(*each) for each in segments))


def test_contents_by_hand():
    request = prompt(6, (7, 3), (9, 1))
    assert content_ids(prompt_contents(request, -4)) == [7, 7, 7, 9, -4, -4]
    assert content_ids(prompt_contents(prompt(2), -1)) == [-1, -1]


def test_tokens_of_a_shorter_part_of_a_text_are_the_beginning_of_it():
    long, short = token_ids(prompt(300, (5, 300)), -1), token_ids(prompt(200, (5, 200)), -2)
    assert long[:200] == short


SEGMENTS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=4)


@given(SEGMENTS, SEGMENTS, st.integers(1, 30), st.sampled_from([2, 512, 32_000]))
def test_prompts_are_equal_just_as_far_as_their_contents_are(common, rest, own, vocab_size):
    shared = sum(tokens for _, tokens in common)
    longer = prompt(shared + sum(tokens for _, tokens in rest) + own, *common, *rest)
    shorter = prompt(shared + own, *common)
    one, other = token_ids(longer, -1, vocab_size), token_ids(shorter, -2, vocab_size)
    assert (len(one), len(other)) == (longer.prompt_tokens, shorter.prompt_tokens)
    assert one[:shared] == other[:shared]
    assert all(0 <= token < vocab_size for token in one + other)


def test_what_is_a_requests_own_differs_from_all_others():
    one, other = token_ids(prompt(64), -1), token_ids(prompt(64), -2)
    same = sum(a == b for a, b in zip(one, other, strict=True))
    assert same <= 4  # 64 draws from 512 tokens: 0.125 are equal by chance


def test_a_trace_lasts_until_its_last_arrival():
    requests = (TraceRequest(0.5, 1, 1), TraceRequest(2.5, 1, 1))
    assert Trace("two", requests).duration_s == pytest.approx(2.5)
    assert Trace("none", ()).duration_s == 0.0
    assert not Trace("two", requests).has_shared_prefixes
    assert Trace("one", (prompt(3, (1, 2)),)).has_shared_prefixes
