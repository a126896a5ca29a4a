"""Oracles of notebook A1, continuous batching."""

import heapq
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from course_lib.classroom.checks import Exercise, Mismatch, compare
from course_lib.classroom.plots.differences import plot_schedules
from course_lib.classroom.stands import SchedulerStand, stand_beside
from course_lib.engine.scheduler_base import SchedulerBase
from course_lib.sizing.batching import SlotUsage


def verify_simulate_slots(answer: Callable[..., Any], rng: random.Random) -> None:
    """Against closed forms: chunk maxima for static batches, a heap of free times otherwise."""
    cases = [([8, 2, 5, 3], 2), ([4, 4, 4], 3), ([7], 3), ([1, 9, 1, 1], 1)]
    for _ in range(40):
        lengths = [rng.randint(1, 20) for _ in range(rng.randint(1, 15))]
        cases.append((lengths, rng.randint(1, 6)))
    for lengths, slots in cases:
        for continuous in (False, True):
            steps = (
                _continuous_steps(lengths, slots) if continuous else _static_steps(lengths, slots)
            )
            expected = SlotUsage(steps, slots * steps - sum(lengths))
            where = f"simulate_slots({lengths}, slots={slots}, continuous={continuous})"
            compare(answer(list(lengths), slots, continuous), expected, where)


def _static_steps(lengths: list[int], slots: int) -> int:
    return sum(max(lengths[i : i + slots]) for i in range(0, len(lengths), slots))


def _continuous_steps(lengths: list[int], slots: int) -> int:
    free_at = [0] * slots
    for length in lengths:
        heapq.heapreplace(free_at, free_at[0] + length)
    return max(free_at)


@dataclass
class _Account:
    """What the oracle knows of a request."""

    name: str
    order: tuple[int, float, int]
    tokens: list[int]
    ends_at: int  # tokens, prompt and reply
    computed: int = 0
    blocks: int = 0

    @property
    def known(self) -> int:
        return len(self.tokens)


class _Oracle:
    """The schedule that the rules demand, from counts alone."""

    def __init__(
        self, *, blocks: int, block_size: int, seqs: int, budget: int, reuse: bool
    ) -> None:
        self.free, self.block_size, self.seqs, self.budget = blocks, block_size, seqs, budget
        self.reuse = reuse
        self.prefixes: set[tuple[int, ...]] = set()  # that some request's full blocks hold
        self.waiting: list[_Account] = []
        self.running: list[_Account] = []

    def step(self) -> tuple[dict[str, tuple[int, int]], list[str]]:
        """Request id -> (first token, number of tokens), and the ids preempted."""
        budget, preempted = self.budget, []
        shares: dict[str, tuple[int, int]] = {}
        self._sort()
        turn = 0
        while turn < len(self.running) and budget:
            account = self.running[turn]
            count = min(account.known - account.computed, budget)
            while self._missing(account, account.computed + count) > self.free:
                victim = self.running.pop()
                self.free += victim.blocks
                victim.blocks = victim.computed = 0
                preempted.append(victim)
                if victim is account:
                    break
            if account in preempted:
                break
            budget -= self._compute(account, count, shares)
            turn += 1
        self.waiting += preempted
        self._sort()
        while self.waiting and budget and not preempted and len(self.running) < self.seqs:
            account = self.waiting[0]
            account.computed = account.blocks = 0
            hit = self._hit(account)
            if self._missing(account, account.known) - hit > self.free:
                break
            account.computed, account.blocks = hit * self.block_size, hit
            self.running.append(self.waiting.pop(0))
            budget -= self._compute(account, min(account.known - account.computed, budget), shares)
        return shares, [account.name for account in preempted]

    def _sort(self) -> None:
        self.waiting.sort(key=lambda a: a.order)
        self.running.sort(key=lambda a: a.order)

    def _missing(self, account: _Account, tokens: int) -> int:
        return -(-tokens // self.block_size) - account.blocks

    def _hit(self, account: _Account) -> int:
        """Blocks of its beginning that are there already; the last token is never among them."""
        hit = 0
        tokens = tuple(account.tokens)
        while self.reuse and (hit + 1) * self.block_size < account.known:
            if tokens[: (hit + 1) * self.block_size] not in self.prefixes:
                break
            hit += 1
        return hit

    def _compute(self, account: _Account, count: int, shares: dict[str, tuple[int, int]]) -> int:
        shares[account.name] = (account.computed, count)
        missing = self._missing(account, account.computed + count)
        self.free -= missing
        account.blocks += missing
        account.computed += count
        tokens = tuple(account.tokens)
        for end in range(self.block_size, account.computed + 1, self.block_size):
            self.prefixes.add(tokens[:end])
        return count

    def book(self, sampled: Sequence[list[int]], shares: Iterable[str]) -> list[str]:
        """Take over the tokens that a step sampled for its shares. Returns who has ended."""
        accounts = {account.name: account for account in self.running}
        ended = []
        for name, tokens in zip(shares, sampled, strict=True):
            account = accounts[name]
            account.tokens += tokens
            if account.known >= account.ends_at:
                ended.append(name)
                self.free += account.blocks
                self.running.remove(account)
        return ended


def verify_scheduler(answer: type[SchedulerBase], rng: random.Random) -> None:
    """Step by step against the oracle: roomy, crowded, with priorities, with shared prefixes."""
    if not (isinstance(answer, type) and issubclass(answer, SchedulerBase)):
        raise Mismatch(f"expected a class derived from SchedulerBase, got {answer!r}")
    for scenario in range(120):
        _run_scenario(
            answer,
            rng,
            blocks=200 if scenario % 4 == 3 else rng.choice((7, 12, 20)),
            priorities=scenario % 3 > 0,
            reuse=scenario % 4 == 3,
        )


def _run_scenario(
    scheduler_class: type[SchedulerBase],
    rng: random.Random,
    *,
    blocks: int,
    priorities: bool,
    reuse: bool,
) -> None:
    block_size, seqs, budget = 4, rng.randint(1, 6), rng.randint(3, 40)
    scheduler = stand_beside(scheduler_class, SchedulerStand)(
        blocks, block_size, reuse=reuse, max_num_seqs=seqs, max_num_batched_tokens=budget
    )
    oracle = _Oracle(blocks=blocks, block_size=block_size, seqs=seqs, budget=budget, reuse=reuse)
    beginning = [rng.randrange(100) for _ in range(12)]
    longest_prompt, last_arrival = rng.choice((6, 25)), rng.choice((3, 15))
    arrivals = {}
    for index in range(rng.randint(2, 12)):
        prompt = [rng.randrange(100) for _ in range(rng.randint(1, longest_prompt))]
        if reuse and rng.random() < 0.7:
            prompt = beginning + prompt
        arrivals[f"r{index}"] = (rng.randint(0, last_arrival), prompt, rng.randint(1, 16))
    history: list[dict[str, tuple[int, int]]] = []
    limits = f"max_num_seqs={seqs}, max_num_batched_tokens={budget}, {blocks} blocks"
    for step in range(1000):
        for index, (name, (at, prompt, max_tokens)) in enumerate(arrivals.items()):
            if at == step:
                priority = rng.randint(0, 2) if priorities else 0
                order = (priority, float(step), index)
                ends_at = min(len(prompt) + max_tokens, blocks * block_size)
                oracle.waiting.append(_Account(name, order, list(prompt), ends_at))
                scheduler.add(name, prompt, max_tokens, arrival_time=float(step), priority=priority)
        if step > last_arrival and not oracle.waiting and not oracle.running:
            return
        was_running = {account.name for account in oracle.running}
        shares, preempted = oracle.step()
        where = f"step {step} ({limits})"
        batch = scheduler.schedule()
        try:
            _compare_batch(batch, shares, preempted, was_running, where)
        except Mismatch as mismatch:
            if isinstance(batch, dict):
                prompts = {name: len(prompt) for name, (_, prompt, _) in arrivals.items()}
                mismatch.picture = partial(
                    plot_schedules, history, shares, _shares_in(batch), prompts
                )
            raise
        history.append(shares)
        known = {account.name: account.known for account in oracle.running}
        sampled = [
            [rng.randrange(100)] if start + count == known[name] else []
            for name, (start, count) in shares.items()
        ]
        ended = oracle.book(sampled, shares)
        got_ended = scheduler.update(sampled)
        if got_ended != ended:
            raise Mismatch(
                f"{where}: expected {ended or 'nobody'} to end, got {got_ended or 'nobody'}",
                "`update` is the base's: write `schedule` only.",
            )


def _shares_in(batch: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: (start, count) for name, start, count, _ in batch["shares"]}


def _compare_batch(
    batch: Any,
    shares: dict[str, tuple[int, int]],
    preempted: list[str],
    was_running: set[str],
    where: str,
) -> None:
    if not isinstance(batch, dict):
        raise Mismatch(
            f"{where}: schedule() returned {batch!r}",
            "End with `return self.make_batch(scheduled, preempted)`.",
        )
    got = _shares_in(batch)
    got_preempted = batch["preempted"]
    if got_preempted != preempted:
        raise Mismatch(
            f"{where}: expected {preempted or 'nobody'} to be preempted, got "
            f"{got_preempted or 'nobody'}",
            "Preempt only when `allocate` returns False, always the last one running, and again "
            "until it succeeds or the request itself was the last.",
        )
    for name, (start, count) in shares.items():
        if name not in got:
            what = "runs already" if name in was_running else "waits and fits"
            raise Mismatch(f"{where}: {name} is not in the batch, though it {what}", _HINTS[what])
        if got[name] != (start, count):
            raise Mismatch(
                f"{where}: expected {name} to compute {count} tokens from {start}, got "
                f"{got[name][1]} from {got[name][0]}",
                "A request gets min(tokens left to compute, budget left), from its first token "
                "that is not computed; every share makes the budget smaller."
                if got[name][0] == start
                else "Start at num_computed_tokens, or behind the prefix blocks for a newcomer, "
                "and end with make_batch, which advances the counter.",
            )
    for name in got:
        if name not in shares:
            raise Mismatch(
                f"{where}: {name} is in the batch but should not be",
                "Nobody is admitted in a step that preempted, beyond max_num_seqs, without budget, "
                "behind one that does not fit, or when its whole known sequence would not fit "
                "(`can_admit`).",
            )
    if list(got) != list(shares):
        raise Mismatch(
            f"{where}: expected the order {list(shares)}, got {list(got)}",
            "First `running`, then `waiting`, each from the front.",
        )
    for name, start, count, computed in batch["shares"]:
        if computed != start + count:
            raise Mismatch(
                f"{where}: num_computed_tokens of {name} is {computed} after schedule(), expected "
                f"{start + count}",
                "End with `return self.make_batch(scheduled, preempted)`.",
            )


_HINTS = {
    "runs already": "Running requests come first, each of them, while there is budget.",
    "waits and fits": "After the running ones, admit from the front of `waiting` while there is "
    "budget, a free seat (max_num_seqs) and room for the whole sequence (`can_admit`).",
}


EXERCISES = (
    Exercise(
        id="A1.1",
        title="static and continuous slots",
        points=2,
        verify=verify_simulate_slots,
        reference="course_lib.sizing.batching:simulate_slots",
        hints=(
            "Static: cut the list into batches of `slots` replies; a batch lasts as long as its "
            "longest reply. Continuous: a free slot takes the next reply at once.",
            "Keep for each slot the step at which it is free again. The next reply goes to the "
            "smallest of these; the last one to become free gives token_steps.",
            "Whatever the mode: empty_slot_steps = slots * token_steps - sum(reply_lengths).",
        ),
    ),
    Exercise(
        id="A1.2",
        title="the scheduler",
        points=5,
        verify=verify_scheduler,
        reference="course_lib.engine.scheduler:Scheduler",
        hints=(
            "Two loops: over `running` (allocate, preempt if that fails), then over `waiting` "
            "(match_prefix, can_admit, allocate, admit), with one budget for both.",
            "First loop: while `allocate(request, n)` is False, call preempt_last(); if it "
            "returned the request itself, the loop is over. Keep the preempted in a list.",
            "Second loop, only if nobody was preempted: stop at max_num_seqs, at budget 0, or at "
            "the first request for which can_admit is False. Its start is "
            "len(prefix_blocks) * block_size.",
        ),
        part="scheduler",
    ),
)
