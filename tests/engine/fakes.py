"""An engine without a model: the real scheduler and block pool, and an executor that keeps books.

What `FakeExecutor` writes into a page is a hash of the whole prefix up to that token, and a next
token follows from what it reads back through the block table. So a wrong block table, a stale or
unwritten page or a lost token is found in the step in which it is read. No PyTorch.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from course_lib.engine.batch import ScheduledBatch, ScheduledRequest, StepResult
from course_lib.engine.block_pool import NULL_BLOCK, BlockPool
from course_lib.engine.outputs import RequestOutput
from course_lib.engine.request import Request, RequestStatus
from course_lib.engine.sampling_params import SamplingParams
from course_lib.engine.scheduler import Scheduler

VOCAB_SIZE = 11


def prefix_hashes(request: Request, token_ids: Sequence[int]) -> list[int]:
    """For each token the hash of all up to it: what its keys and values depend on."""
    root = zlib.crc32(repr((request.lora_name, request.cache_salt)).encode())
    return list(accumulate(token_ids, lambda prefix, token: hash((prefix, token)), initial=root))[
        1:
    ]


def next_token(prefix_hash: int) -> int:
    return prefix_hash % VOCAB_SIZE


def reply_alone(request: Request, longest: int) -> list[int]:
    """What the request gets when nobody else is there. Longest: tokens of prompt and reply."""
    params, token_ids = request.sampling_params, list(request.prompt_token_ids)
    while True:
        token_ids.append(next_token(prefix_hashes(request, token_ids)[-1]))
        reply = token_ids[request.num_prompt_tokens :]
        ended = token_ids[-1] in request.eos_token_ids
        if ended or len(reply) == params.max_tokens or len(token_ids) == longest:
            return reply


class FakeExecutor:
    """Pages of a KV cache, and the model that reads and writes them."""

    def __init__(self, block_pool: BlockPool, num_drafts: int = 0) -> None:
        self.block_pool = block_pool
        self.num_drafts = num_drafts
        self.pages: dict[tuple[int, int], int] = {}  # (block, offset) -> hash of the prefix
        self.hash_to_prefix: dict[bytes, int] = {}

    def slot(self, request: Request, position: int) -> tuple[int, int]:
        block_size = self.block_pool.block_size
        return request.block_ids[position // block_size], position % block_size

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """All writes come before all reads, as in each layer of a model."""
        written = Counter(slot for entry in batch.scheduled for slot in self._write(entry))
        assert max(written.values(), default=1) == 1
        sampled = [self._sample(entry) for entry in batch.scheduled]
        drafts = [
            self._draft(entry.request, tokens)
            for entry, tokens in zip(batch.scheduled, sampled, strict=True)
        ]
        return StepResult(sampled, draft_token_ids=drafts if self.num_drafts else [])

    def _write(self, entry: ScheduledRequest) -> list[tuple[int, int]]:
        request = entry.request
        token_ids = request.token_ids[: entry.start] + entry.token_ids
        assert len(token_ids) == entry.end, f"{request} computes tokens that it does not have"
        prefixes = prefix_hashes(request, token_ids)
        slots = [self.slot(request, position) for position in range(entry.start, entry.end)]
        assert all(block != NULL_BLOCK for block, _ in slots)
        self.pages.update(zip(slots, prefixes[entry.start :], strict=True))
        return slots

    def read(self, request: Request, token_ids: Sequence[int]) -> list[int | None]:
        """What the pages of the first tokens hold; it must be the request's own prefix."""
        found = [self.pages.get(self.slot(request, i)) for i in range(len(token_ids))]
        assert found == prefix_hashes(request, token_ids), f"{request} reads pages not its own"
        return found

    def _sample(self, entry: ScheduledRequest) -> list[int]:
        """One token, and one more for each draft token that was the right one."""
        request = entry.request
        drafts = request.draft_token_ids[: entry.num_draft_tokens]
        found = self.read(request, (request.token_ids + drafts)[: entry.end])
        if not entry.samples:
            return []
        tokens: list[int] = []
        for index in range(entry.num_draft_tokens + 1):
            tokens.append(next_token(found[request.num_tokens - 1 + index]))
            if drafts[index : index + 1] != tokens[-1:]:
                break
        return tokens

    def _draft(self, request: Request, new_tokens: list[int]) -> list[int]:
        """Guesses, about two thirds of them right."""
        token_ids = request.token_ids + new_tokens
        for _ in range(self.num_drafts if new_tokens else 0):
            prefix = prefix_hashes(request, token_ids)[-1]
            wrong = prefix // VOCAB_SIZE % 3 == 0
            token_ids.append((next_token(prefix) + wrong) % VOCAB_SIZE)
        return token_ids[request.num_tokens + len(new_tokens) :]

    def check_cached_blocks(self) -> None:
        """Each cached block is written, and equal hashes stand for equal contents."""
        for block_hash, block in self.block_pool.cached_blocks.items():
            prefix = self.pages[block, self.block_pool.block_size - 1]
            assert self.hash_to_prefix.setdefault(block_hash, prefix) == prefix


class FakeEngine:
    """Scheduler, block pool and fake executor on a clock that counts the steps."""

    def __init__(
        self,
        *,
        num_blocks: int = 9,
        block_size: int = 4,
        num_drafts: int = 0,
        enable_prefix_caching: bool = True,
        max_model_len: int = 1000,
        **limits: int | None,
    ) -> None:
        self.time = 0.0
        self.pool = BlockPool(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self.scheduler = Scheduler(
            self.pool, max_model_len=max_model_len, clock=lambda: self.time, **limits
        )
        self.executor = FakeExecutor(self.pool, num_drafts)
        self.requests: list[Request] = []
        self.longest = min(max_model_len, (num_blocks - 1) * block_size)

    def add(self, prompt: Sequence[int], max_tokens: int | None = 4, **options: object) -> Request:
        request = Request(
            f"r{len(self.requests)}",
            prompt,
            SamplingParams(temperature=0, max_tokens=max_tokens),
            arrival_time=self.time,
            **options,
        )
        self.scheduler.add_request(request)
        self.requests.append(request)
        return request

    def step(self) -> ScheduledBatch:
        """One step. Returns what was scheduled."""
        batch = self.schedule()
        self.update(batch, self.executor.execute(batch))
        return batch

    def schedule(self) -> ScheduledBatch:
        self.time += 1
        computed = {request: request.num_computed_tokens for request in self.scheduler.running}
        batch = self.scheduler.schedule()
        check_batch(self.scheduler, batch, computed)
        return batch

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[RequestOutput]:
        outputs = self.scheduler.update(batch, result)
        check_books(self)
        return outputs

    def run(self, max_steps: int = 1000) -> None:
        """Steps until all requests have ended; then nothing is owned, and replies are right."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished_requests():
                break
            self.step()
        assert not self.scheduler.has_unfinished_requests(), f"not done in {max_steps} steps"
        assert self.pool.usage == 0
        self.check_replies()

    def check_replies(self) -> None:
        for request in self.requests:
            alone = reply_alone(request, self.longest)
            if request.status is RequestStatus.ABORTED:
                alone = alone[: request.num_output_tokens]
            assert request.output_token_ids == alone


def check_batch(scheduler: Scheduler, batch: ScheduledBatch, computed: dict[Request, int]) -> None:
    """A batch keeps the limits and continues where each request stood."""
    assert batch.scheduled or not scheduler.has_unfinished_requests()
    assert batch.num_tokens <= scheduler.max_num_batched_tokens
    assert len(scheduler.running) <= scheduler.max_num_seqs
    loras = {request.lora_name for request in scheduler.running} - {None}
    assert scheduler.max_loras is None or len(loras) <= scheduler.max_loras
    requests = [entry.request for entry in batch.scheduled]
    assert len(set(requests)) == len(requests)
    for entry in batch.scheduled:
        assert entry.request in scheduler.running
        assert entry.num_tokens >= 1
        assert 0 <= entry.num_draft_tokens < entry.num_tokens
        assert entry.end == entry.request.num_computed_tokens
        assert entry.end < scheduler.max_request_tokens
        assert entry.start == computed.get(entry.request, entry.start)


def check_books(engine: FakeEngine) -> None:
    """What must hold of the block pool and the queues after every step."""
    pool, scheduler = engine.pool, engine.scheduler
    tables = [request.block_ids for request in scheduler.running]
    owners = Counter(block for table in tables for block in table)
    assert NULL_BLOCK not in owners
    assert pool.ref_counts == [owners[block] for block in range(pool.num_blocks)]
    assert sorted([*pool.free_blocks, *owners]) == list(range(1, pool.num_blocks))
    hashed = {h: block for block, h in enumerate(pool.block_hashes) if h is not None}
    assert pool.cached_blocks == hashed
    assert len(hashed) == sum(h is not None for h in pool.block_hashes)
    engine.executor.check_cached_blocks()

    place_of: dict[int, tuple[int, int]] = {}  # block -> its index in tables, hash of its prefix
    for request in scheduler.running:
        assert request.status is RequestStatus.RUNNING
        known = request.token_ids[: request.num_computed_tokens]
        assert len(known) == request.num_computed_tokens < request.num_tokens
        engine.executor.read(request, known)
        assert len(set(request.block_ids)) == len(request.block_ids)
        prefixes = prefix_hashes(request, request.token_ids)
        for index, block in enumerate(request.block_ids):
            if owners[block] > 1:
                place = (index, prefixes[(index + 1) * pool.block_size - 1])
                assert place_of.setdefault(block, place) == place
    for request in scheduler.waiting:
        assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        assert request.num_computed_tokens == 0
    for request in set(engine.requests) - set(scheduler.running):
        assert request.block_ids == []
    for queue in (scheduler.waiting, scheduler.running):
        assert queue == sorted(queue, key=lambda request: request.order)
