"""A run of the engine, noted down step by step for the notebooks' pictures.

`record_block_maps` uses no more than a block pool's protocol, so it shows a student's pool as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from course_lib.engine.engine import LLMEngine
from course_lib.engine.request import Request
from course_lib.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class BlockMap:
    """The blocks of a KV cache after a step.

    Args:
        step: counted from 1; 0 is before the first one.
        num_blocks: of the cache, the null block included.
        block_size: tokens in a block.
        owned: request id -> its block table, for those that run.
        cached: request id -> blocks in which its beginning would be found again, for those that
            have ended or were preempted; some of the blocks may be owned.
        num_waiting: requests that have not been admitted, or were preempted.
    """

    step: int
    num_blocks: int
    block_size: int
    owned: Mapping[str, Sequence[int]]
    cached: Mapping[str, Sequence[int]]
    num_waiting: int

    def owners(self, block: int) -> list[str]:
        """The requests whose block table has the block."""
        return [name for name, table in self.owned.items() if block in table]

    def finders(self, block: int) -> list[str]:
        """The requests that no longer run and would find the block again."""
        return [name for name, blocks in self.cached.items() if block in blocks]

    @property
    def num_owned(self) -> int:
        """Blocks that at least one request owns."""
        return len({block for table in self.owned.values() for block in table})

    @property
    def num_cached(self) -> int:
        """Blocks that nobody owns and that would still be found."""
        found = {block for blocks in self.cached.values() for block in blocks}
        return sum(not self.owners(block) for block in found)

    @property
    def num_shared(self) -> int:
        """Blocks with more than one owner."""
        return sum(len(self.owners(block)) > 1 for block in range(self.num_blocks))


def record_block_maps(
    engine: LLMEngine, prompts: Sequence[Any], params: SamplingParams
) -> list[BlockMap]:
    """Serve the prompts to their end and note the block map before and after each step."""
    before = len(engine.scheduler.waiting)
    for index, prompt in enumerate(prompts):
        engine.add_request(f"{index}", prompt, params)
    requests = engine.scheduler.waiting[before:]
    maps = [_block_map(engine, requests, 0)]
    while engine.has_unfinished_requests():
        engine.step()
        maps.append(_block_map(engine, requests, len(maps)))
    return maps


def _block_map(engine: LLMEngine, requests: Sequence[Request], step: int) -> BlockMap:
    owned = {r.request_id: tuple(r.block_ids) for r in requests if r.block_ids}
    cached = {}
    for request in requests:
        if request.block_ids or request.metrics.first_scheduled_time is None:
            continue
        # One token more, since a lookup never covers the last one.
        again = Request("again", [*request.token_ids, 0])
        again.lora_name, again.cache_salt = request.lora_name, request.cache_salt
        cached[request.request_id] = tuple(engine.block_pool.match_prefix(again))
    return BlockMap(
        step,
        engine.block_pool.num_blocks,
        engine.block_pool.block_size,
        owned,
        cached,
        len(engine.scheduler.waiting),
    )
