import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.sizing.batching import (
    SlotInterval,
    SlotUsage,
    simulate_slots,
    slot_schedule,
)

LENGTHS = st.lists(st.integers(1, 30), max_size=20)
SLOTS = st.integers(1, 6)


def test_a_static_batch_waits_for_its_longest_member():
    assert simulate_slots([8, 2, 5, 3], 2, continuous=False) == SlotUsage(13, 8)


def test_a_continuous_batch_refills_a_slot_at_once():
    assert simulate_slots([8, 2, 5, 3], 2, continuous=True) == SlotUsage(10, 2)


def test_the_schedule_says_who_held_which_slot_and_when():
    assert slot_schedule([8, 2, 5, 3], 2, continuous=True) == [
        SlotInterval(request=0, slot=0, start_step=0, end_step=8),
        SlotInterval(request=1, slot=1, start_step=0, end_step=2),
        SlotInterval(request=2, slot=1, start_step=2, end_step=7),
        SlotInterval(request=3, slot=1, start_step=7, end_step=10),
    ]


def test_no_requests_take_no_steps():
    assert simulate_slots([], 3, continuous=True) == SlotUsage(0, 0)
    assert slot_schedule([], 3, continuous=True) == []


@given(LENGTHS, SLOTS)
def test_continuous_never_takes_more_steps_than_static(lengths, slots):
    static = simulate_slots(lengths, slots, continuous=False)
    continuous = simulate_slots(lengths, slots, continuous=True)
    assert continuous.token_steps <= static.token_steps
    assert continuous.empty_slot_steps <= static.empty_slot_steps


@given(LENGTHS, SLOTS, st.booleans())
def test_every_slot_step_is_a_token_or_empty(lengths, slots, continuous):
    usage = simulate_slots(lengths, slots, continuous)
    assert sum(lengths) + usage.empty_slot_steps == usage.token_steps * slots

    schedule = slot_schedule(lengths, slots, continuous)
    assert [bar.end_step - bar.start_step for bar in schedule] == lengths
    cells = [(bar.slot, step) for bar in schedule for step in range(bar.start_step, bar.end_step)]
    assert len(cells) == len(set(cells)), "two requests hold a slot in the same step"
    assert all(slot < slots and step < usage.token_steps for slot, step in cells)


@pytest.mark.parametrize(
    ("lengths", "slots", "named"),
    [
        ([3], 0, "slots"),
        ([3], -1, "slots"),
        ([3], True, "slots"),
        ([3, 0], 2, r"reply_lengths\[1\]"),
        ([3, -2], 2, r"reply_lengths\[1\]"),
        ([2.5], 2, r"reply_lengths\[0\]"),
        (["7"], 2, r"reply_lengths\[0\]"),
    ],
)
def test_bad_input_is_refused_by_name(lengths, slots, named):
    with pytest.raises(ValueError, match=f"{named} must be a whole number of at least 1"):
        simulate_slots(lengths, slots, continuous=True)
