"""Whatever arrives, however small the cache: the books balance and every reply is right.

`check_batch` and `check_books` in `fakes` hold the invariants; they run in every step.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from course_lib.engine.request import Request
from tests.engine.fakes import VOCAB_SIZE, FakeEngine, check_books

PREFIXES = [[], [1] * 5, [1] * 12, [1, 2, 3, 4, 5, 6, 7, 8]]
tokens = st.lists(st.integers(0, 2), max_size=12)
names = st.sampled_from([None, "a", "b"])


class ServingMachine(RuleBasedStateMachine):
    """Requests of all kinds arrive and are aborted, steps run and fail, in any order."""

    @initialize(
        num_blocks=st.integers(3, 14) | st.integers(15, 40),
        block_size=st.integers(1, 8),
        num_drafts=st.sampled_from([0, 0, 1, 3]),
        enable_prefix_caching=st.booleans() | st.just(True),
        max_model_len=st.sampled_from([20, 1000]),
        max_num_seqs=st.sampled_from([1, 3, 8]),
        max_num_batched_tokens=st.sampled_from([1, 3, 6, 10, 30]),
        max_loras=st.sampled_from([None, 1]),
    )
    def start(self, **config) -> None:
        self.engine = FakeEngine(**config)

    @rule(
        num_requests=st.integers(1, 4),
        prefix=st.sampled_from(PREFIXES),
        rest=tokens,
        max_tokens=st.none() | st.integers(1, 12),
        priority=st.sampled_from([0, 0, 1]),
        lora_name=names,
        cache_salt=names,
        eos=st.none() | st.integers(0, VOCAB_SIZE - 1),
    )
    def arrive(self, num_requests, prefix, rest, max_tokens, eos, **options) -> None:
        prompt = ([*prefix, *rest] or [0])[: self.engine.longest - 1]
        for _ in range(num_requests):
            self.engine.add(prompt, max_tokens, eos_token_ids=[eos], **options)

    @rule(num_steps=st.integers(1, 5))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.step()

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.scheduler.finish(self._any_request(data))

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def abort_while_a_step_runs(self, data: st.DataObject) -> None:
        batch = self.engine.schedule()
        result = self.engine.executor.execute(batch)
        self.engine.scheduler.finish(self._any_request(data))
        self.engine.update(batch, result)

    @rule()
    def fail_in_a_step(self) -> None:
        self.engine.schedule()
        self.engine.scheduler.reset_prefix_cache()
        check_books(self.engine)

    def _any_request(self, data: st.DataObject) -> Request:
        return data.draw(st.sampled_from(self.engine.requests))

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            num_requests = len(self.engine.requests)
            self.engine.run(max_steps=self.engine.longest * num_requests**2)


TestServing = ServingMachine.TestCase
TestServing.settings = settings(
    max_examples=250, stateful_step_count=30, report_multiple_bugs=False
)
