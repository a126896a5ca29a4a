"""Continuous batching: which tokens of which requests does the next step compute?

There is no prefill phase and no decode phase. Each step has a budget of tokens, and each request
takes as many of its not yet computed tokens as fit (Orca, OSDI 2022; chunked prefill, Sarathi,
2023). A decode is a request with one token left to compute, a prefix hit one with fewer.

The protocol of a part that replaces `Scheduler`: a class derived from `SchedulerBase`, which keeps
the books, with its own `schedule`.
"""

from course_lib.engine.batch import ScheduledBatch, ScheduledRequest
from course_lib.engine.request import Request
from course_lib.engine.scheduler_base import SchedulerBase


class Scheduler(SchedulerBase):
    """Decides each step's batch, by the rules of vLLM's scheduler."""

    def schedule(self) -> ScheduledBatch:
        """Fill the next step: running requests first, then waiting ones in order."""
        scheduled, preempted = self._schedule_running()
        budget = self.max_num_batched_tokens - sum(entry.num_tokens for entry in scheduled)
        if preempted:  # the cache is full: admitting now would only preempt again
            reason = f"{len(preempted)} preempted for lack of KV blocks"
        else:
            admitted, reason = self._admit_waiting(budget)
            scheduled += admitted
        return self.make_batch(scheduled, preempted, reason)

    def _schedule_running(self) -> tuple[list[ScheduledRequest], list[Request]]:
        budget = self.max_num_batched_tokens
        scheduled: list[ScheduledRequest] = []
        preempted: list[Request] = []
        while len(scheduled) < len(self.running) and budget > 0:
            request = self.running[len(scheduled)]
            start = request.num_computed_tokens
            num_tokens = min(request.num_tokens_with_draft - start, budget)
            while not self.block_pool.allocate(request, num_tokens):
                preempted.append(self.preempt_last())
                if preempted[-1] is request:
                    return scheduled, preempted
            scheduled.append(ScheduledRequest(request, start, num_tokens))
            budget -= num_tokens
        return scheduled, preempted

    def _admit_waiting(self, budget: int) -> tuple[list[ScheduledRequest], str]:
        """Admit in order until one does not fit. Returns the admitted and why it ended."""
        admitted: list[ScheduledRequest] = []
        reason = ""
        index = 0
        while index < len(self.waiting):
            if len(self.running) >= self.max_num_seqs:
                return admitted, f"max_num_seqs {self.max_num_seqs} reached"
            if budget <= 0:
                return admitted, f"max_num_batched_tokens {self.max_num_batched_tokens} used up"
            request = self.waiting[index]
            if self._held_back_by_lora_limit(request):
                reason = f"max_loras {self.max_loras} reached"
                index += 1  # no barrier to those behind it
                continue
            prefix_blocks = self.match_prefix(request)
            if not self.block_pool.can_admit(request, prefix_blocks):
                return admitted, f"KV cache full, usage {self.block_pool.usage:.2f}"
            start = len(prefix_blocks) * self.block_pool.block_size
            num_tokens = min(request.num_tokens - start, budget)
            self.block_pool.allocate(request, num_tokens, prefix_blocks)
            self.admit(request, start)
            admitted.append(ScheduledRequest(request, start, num_tokens))
            budget -= num_tokens
        return admitted, reason

    def _held_back_by_lora_limit(self, request: Request) -> bool:
        if self.max_loras is None or request.lora_name is None:
            return False
        loras = {r.lora_name for r in self.running if r.lora_name is not None}
        return len(loras) >= self.max_loras and request.lora_name not in loras
