"""Answers to the exercises of A1: right ones in several styles, and wrong ones of typical kinds."""

from course_lib.engine.batch import ScheduledBatch, ScheduledRequest
from course_lib.engine.scheduler_base import SchedulerBase
from course_lib.sizing.batching import SlotUsage


def slots_step_by_step(reply_lengths, slots, continuous):
    """Right: one step after another, as a machine would."""
    waiting, left, steps, empty = list(reply_lengths), [0] * slots, 0, 0
    while waiting or any(left):
        if continuous or not any(left):
            left = [n or (waiting.pop(0) if waiting else 0) for n in left]
        steps += 1
        empty += left.count(0)
        left = [max(0, n - 1) for n in left]
    return SlotUsage(steps, empty)


def slots_by_arithmetic(reply_lengths, slots, continuous):
    """Right: when is each slot free again?"""
    if continuous:
        ends = [0] * slots
        for length in reply_lengths:
            first = ends.index(min(ends))
            ends[first] += length
        steps = max(ends)
    else:
        steps = 0
        for begin in range(0, len(reply_lengths), slots):
            steps += max(reply_lengths[begin : begin + slots])
    return SlotUsage(token_steps=steps, empty_slot_steps=steps * slots - sum(reply_lengths))


def slots_always_static(reply_lengths, slots, continuous):
    return slots_by_arithmetic(reply_lengths, slots, False)


def slots_round_robin(reply_lengths, slots, continuous):
    if not continuous:
        return slots_by_arithmetic(reply_lengths, slots, False)
    steps = max(sum(reply_lengths[slot::slots]) for slot in range(slots))
    return SlotUsage(steps, steps * slots - sum(reply_lengths))


def slots_longest_first(reply_lengths, slots, continuous):
    order = sorted(reply_lengths, reverse=True)
    return slots_by_arithmetic(order, slots, continuous)


def slots_without_the_missing_ones(reply_lengths, slots, continuous):
    """A last batch that is not full: its missing replies leave slots empty, too."""
    usage = slots_by_arithmetic(reply_lengths, slots, continuous)
    if continuous:
        return usage
    empty = 0
    for begin in range(0, len(reply_lengths), slots):
        batch = reply_lengths[begin : begin + slots]
        empty += sum(max(batch) - length for length in batch)
    return SlotUsage(usage.token_steps, empty)


def slots_rounded_mean(reply_lengths, slots, continuous):
    steps = -(-sum(reply_lengths) // slots)
    return SlotUsage(steps, steps * slots - sum(reply_lengths))


def slots_constant(reply_lengths, slots, continuous):
    return SlotUsage(10, 2) if continuous else SlotUsage(13, 8)


def slots_bare_tuple(reply_lengths, slots, continuous):
    usage = slots_by_arithmetic(reply_lengths, slots, continuous)
    return usage.token_steps, usage.empty_slot_steps


class PlainScheduler(SchedulerBase):
    """Right: two loops in one method."""

    def schedule(self) -> ScheduledBatch:
        shares, evicted, budget = [], [], self.max_num_batched_tokens
        for request in list(self.running):
            if request in evicted or budget == 0:
                continue
            wanted = min(budget, request.num_tokens_with_draft - request.num_computed_tokens)
            while request not in evicted and not self.block_pool.allocate(request, wanted):
                evicted.append(self.preempt_last())
            if request not in evicted:
                shares.append(ScheduledRequest(request, request.num_computed_tokens, wanted))
                budget -= wanted
        while self.may_admit(evicted, budget):
            newcomer = self.waiting[0]
            hits = self.match_prefix(newcomer)
            if not self.block_pool.can_admit(newcomer, hits):
                break
            begin = len(hits) * self.block_pool.block_size
            wanted = min(budget, newcomer.num_tokens - begin)
            self.block_pool.allocate(newcomer, wanted, hits)
            self.admit(newcomer, begin)
            shares.append(ScheduledRequest(newcomer, begin, wanted))
            budget -= wanted
        return self.make_batch(shares, evicted)

    def may_admit(self, evicted, budget) -> bool:
        return (
            not evicted
            and bool(self.waiting)
            and budget > 0
            and len(self.running) < self.max_num_seqs
        )


class SmallStepsScheduler(SchedulerBase):
    """Right: many small methods and state that lives for one step."""

    def schedule(self) -> ScheduledBatch:
        self.left = self.max_num_batched_tokens
        self.shares: list[ScheduledRequest] = []
        self.victims = []
        position = 0
        while position < len(self.running) and self.left:
            if self.keep_running(self.running[position]):
                position += 1
        while not self.victims and self.left and self.let_one_in():
            pass
        return self.make_batch(self.shares, self.victims, "see the shares")

    def keep_running(self, request) -> bool:
        todo = request.num_tokens_with_draft - request.num_computed_tokens
        if self.block_pool.allocate(request, min(todo, self.left)):
            self.give(request, request.num_computed_tokens, min(todo, self.left))
            return True
        self.victims.append(self.preempt_last())
        return False

    def let_one_in(self) -> bool:
        if not self.waiting or len(self.running) == self.max_num_seqs:
            return False
        request = self.waiting[0]
        blocks = self.match_prefix(request)
        if not self.block_pool.can_admit(request, blocks):
            return False
        start = self.block_pool.block_size * len(blocks)
        count = min(request.num_tokens - start, self.left)
        self.block_pool.allocate(request, count, blocks)
        self.admit(request, start)
        self.give(request, start, count)
        return True

    def give(self, request, start, count) -> None:
        self.shares.append(ScheduledRequest(request, start, count))
        self.left -= count


class AdmitsWhilePreempting(PlainScheduler):
    def may_admit(self, evicted, budget) -> bool:
        return super().may_admit([], budget)


class StaticBatches(PlainScheduler):
    """A new batch only when the last one is through."""

    def schedule(self) -> ScheduledBatch:
        self.closed = bool(self.running)
        return super().schedule()

    def may_admit(self, evicted, budget) -> bool:
        return not self.closed and super().may_admit(evicted, budget)


class OneSeatTooMany(PlainScheduler):
    def may_admit(self, evicted, budget) -> bool:
        return (
            not evicted
            and bool(self.waiting)
            and budget > 0
            and len(self.running) <= self.max_num_seqs
        )


class NewcomersFirst(SmallStepsScheduler):
    def schedule(self) -> ScheduledBatch:
        self.left, self.shares, self.victims = self.max_num_batched_tokens, [], []
        runners = list(self.running)
        while self.left and self.let_one_in():
            pass
        for request in runners:
            while self.left and request in self.running and not self.keep_running(request):
                pass
        return self.make_batch(self.shares, self.victims)


class BudgetForEachRequest(SmallStepsScheduler):
    def give(self, request, start, count) -> None:
        super().give(request, start, count)
        self.left = self.max_num_batched_tokens


class ForgetsThePrefix(SmallStepsScheduler):
    """Takes the cached blocks but computes everything again."""

    def let_one_in(self) -> bool:
        if not self.waiting or len(self.running) == self.max_num_seqs:
            return False
        request = self.waiting[0]
        if not self.block_pool.can_admit(request):
            return False
        count = min(request.num_tokens, self.left)
        self.block_pool.allocate(request, count)
        self.admit(request)
        self.give(request, 0, count)
        return True


class AdmitsWhatFitsInPart(SmallStepsScheduler):
    """Only asks for room for the first chunk."""

    def let_one_in(self) -> bool:
        if not self.waiting or len(self.running) == self.max_num_seqs:
            return False
        request = self.waiting[0]
        blocks = self.match_prefix(request)
        start = self.block_pool.block_size * len(blocks)
        count = min(request.num_tokens - start, self.left)
        if not self.block_pool.allocate(request, count, blocks):
            return False
        self.admit(request, start)
        self.give(request, start, count)
        return True


class SkipsWhoDoesNotFit(SmallStepsScheduler):
    """Lets smaller ones overtake."""

    def let_one_in(self) -> bool:
        for request in list(self.waiting):
            if len(self.running) < self.max_num_seqs and self.block_pool.can_admit(request):
                rest = [r for r in self.waiting if r is not request]
                self.waiting = [request]
                try:
                    return super().let_one_in()
                finally:
                    self.waiting = sorted(self.waiting + rest, key=lambda r: r.order)
        return False


class CounterStandsStill(PlainScheduler):
    def make_batch(self, scheduled, preempted, reason="") -> ScheduledBatch:
        return ScheduledBatch(scheduled, preempted)


class ReturnsAList(PlainScheduler):
    def schedule(self):
        return super().schedule().scheduled


class GivesUpInsteadOfPreempting(SchedulerBase):
    def schedule(self) -> ScheduledBatch:
        shares = []
        for request in list(self.running):
            if self.block_pool.allocate(request, 1):
                shares.append(ScheduledRequest(request, request.num_computed_tokens, 1))
        return self.make_batch(shares, [])


RIGHT = {
    "A1.1": [slots_step_by_step, slots_by_arithmetic],
    "A1.2": [PlainScheduler, SmallStepsScheduler],
}
WRONG = {
    "A1.1": [
        slots_always_static,
        slots_round_robin,
        slots_longest_first,
        slots_without_the_missing_ones,
        slots_rounded_mean,
        slots_constant,
        slots_bare_tuple,
    ],
    "A1.2": [
        AdmitsWhilePreempting,
        StaticBatches,
        OneSeatTooMany,
        NewcomersFirst,
        BudgetForEachRequest,
        ForgetsThePrefix,
        AdmitsWhatFitsInPart,
        SkipsWhoDoesNotFit,
        CounterStandsStill,
        ReturnsAList,
        GivesUpInsteadOfPreempting,
        slots_constant,
    ],
}
