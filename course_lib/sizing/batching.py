"""Static against continuous batching, reduced to slots and steps.

A slot holds one request; in a step every occupied slot makes one token. A static batch waits for
its longest member before the next batch starts; a continuous one gives a free slot to the next
waiting request at once (Orca, Yu et al., OSDI 2022). `simulate_slots` counts the difference and
`slot_schedule` shows it: who occupied which slot at which step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from course_lib.validation import whole_number


@dataclass(frozen=True)
class SlotUsage:
    """What a schedule cost: steps until the last reply ended, and slot-steps that made no token."""

    token_steps: int
    empty_slot_steps: int


@dataclass(frozen=True)
class SlotInterval:
    """Request number `request` held `slot` in the steps `start_step` to `end_step` - 1."""

    request: int
    slot: int
    start_step: int
    end_step: int


def slot_schedule(reply_lengths: Sequence[int], slots: int, continuous: bool) -> list[SlotInterval]:
    """Give each request a slot, in the order of arrival; all have arrived at step 0.

    Args:
        reply_lengths: tokens of each reply, at least 1 each.
        slots: requests that fit a batch.
        continuous: refill a slot as soon as it is free, rather than when all are.

    Returns:
        One interval for each request, in the order of `reply_lengths`.

    Raises:
        ValueError: a length or `slots` is not a whole number of at least 1.
    """
    slots = whole_number("slots", slots)
    lengths = [
        whole_number(f"reply_lengths[{index}]", length)
        for index, length in enumerate(reply_lengths)
    ]
    free_at = [0] * slots
    schedule = []
    for request, length in enumerate(lengths):
        if continuous:
            slot = free_at.index(min(free_at))
        else:
            slot = request % slots
            if slot == 0:  # a new batch starts when the longest of the last one has ended
                free_at = [max(free_at)] * slots
        start = free_at[slot]
        free_at[slot] = start + length
        schedule.append(SlotInterval(request, slot, start, start + length))
    return schedule


def simulate_slots(reply_lengths: Sequence[int], slots: int, continuous: bool) -> SlotUsage:
    """Count the steps and the empty slots of a schedule; arguments as of `slot_schedule`.

    Raises:
        ValueError: as `slot_schedule`.
    """
    schedule = slot_schedule(reply_lengths, slots, continuous)
    steps = max((interval.end_step for interval in schedule), default=0)
    made = sum(interval.end_step - interval.start_step for interval in schedule)
    return SlotUsage(token_steps=steps, empty_slot_steps=steps * slots - made)
