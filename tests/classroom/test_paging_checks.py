"""The checks of B2 name the mistake, and what they let pass serves as the engine's own does."""

import random

import pytest

from course_lib import LLM, SamplingParams
from course_lib.classroom.checks import CheckFailed, check
from course_lib.classroom.exercises import b2
from course_lib.classroom.parts import load_object
from course_lib.data import DEFAULT_MODEL
from course_lib.engine.block_pool import BlockPool
from tests.classroom import answers_b2 as answers
from tests.classroom.hints import hint_shown

HINTS = [
    ("B2.1", answers.accounting_rounds_down, "round up"),
    ("B2.1", answers.accounting_of_the_sum, "round up for each one"),
    ("B2.1", answers.accounting_avoided_in_blocks, "times tokens_per_block"),
    ("B2.1", answers.accounting_lets_requests_outgrow, "raise a ValueError"),
    ("B2.2", answers.name_without_parent, "parent_hash"),
    ("B2.2", answers.name_without_keys, "extra_keys"),
    ("B2.2", answers.name_of_sorted_tokens, "order of the tokens"),
    ("B2.2", answers.name_without_commas, "separate the tokens"),
    ("B2.2", answers.name_by_python, "cryptographic"),
    ("B2.2", answers.name_in_hex, "digest() gives 32 bytes"),
    ("B2.3", answers.StaleBlockReused, "forget its hash"),
    ("B2.3", answers.CoversTheWholePrompt, "(num_tokens - 1) // block_size"),
    ("B2.3", answers.FirstBlockOnly, "goes on until the first miss"),
    ("B2.3", answers.JumpsOverMisses, "Stop at the first block that is not found"),
    ("B2.3", answers.NoReferenceCounts, "when its last owner is gone"),
    ("B2.3", answers.CountsNoHits, "when its last owner is gone"),
    ("B2.3", answers.HitsCostNothing, "takes it off the free list, so it counts"),
    ("B2.3", answers.BeginningFirst, "the last block first"),
    ("B2.3", answers.EmptyOnesLast, "those come first"),
    ("B2.3", answers.ForgetsAtOnce, "until it is handed out again"),
    ("B2.3", answers.OneBlockTooMany, "exactly full needs no block behind it"),
    ("B2.3", answers.NamesWhatIsNotComputed, "is not full yet"),
    ("B2.3", answers.NamesGuesses, "a guess"),
    ("B2.3", answers.NewestCopyHasTheName, "the copy gets none"),
    ("B2.3", answers.FailsHalfway, "A call that fails changes nothing"),
    ("B2.3", answers.KeepsHitsOnFailure, "A call that fails changes nothing"),
    ("B2.3", answers.RaisesInsteadOfFalse, "return False"),
    ("B2.3", answers.ForgetsTenants, "share nothing"),
    ("B2.3", answers.NamesByTokensAlone, "all that stands before"),
    ("B2.3", answers.UsesTheNullBlock, "null block"),
    ("B2.3", answers.KeepsTheTable, "empties request.block_ids"),
    ("B2.3", answers.AlwaysReuses, "return []"),
]


@pytest.mark.parametrize(
    ("exercise", "answer", "hint"), HINTS, ids=lambda v: getattr(v, "__name__", "")
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_mistake_gets_the_hint_that_fits_it(exercise, answer, hint: str, seed: int) -> None:
    assert hint in hint_shown(exercise, answer, seed)


def test_the_message_tells_the_calls_and_shows_tokens_block_by_block() -> None:
    with pytest.raises(CheckFailed) as failure:
        check("B2.3", answers.StaleBlockReused, seed=1)
    _, difference, calls, *_ = str(failure.value).splitlines()
    assert "expected [1, 2, 3], got [1, 2, 3, 4]" in difference
    assert calls.startswith("Calls before, with 4 blocks of 4 tokens: a has 1111 2222 3333 4444; ")
    assert "free(a); b has 5;" in calls


def test_the_engines_own_parts_keep_the_rules_that_the_checks_ask_for() -> None:
    for seed in range(5):
        for exercise in b2.EXERCISES:
            exercise.verify(load_object(exercise.reference), random.Random(seed))


@pytest.mark.parametrize("block_pool", answers.RIGHT["B2.3"])
def test_a_right_pool_serves_the_same_tokens_when_the_cache_is_crowded(block_pool) -> None:
    rng = random.Random(9)
    beginning = [rng.randrange(500, 1000) for _ in range(20)]
    prompts = [[*beginning, *(rng.randrange(500, 1000) for _ in range(8))] for _ in range(6)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    options = {"dtype": "float32", "max_model_len": 96, "num_gpu_blocks_override": 14}
    results = []
    for pool in (BlockPool, block_pool):
        llm = LLM(DEFAULT_MODEL, block_pool=pool, block_size=8, **options)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        results.append(([o.outputs[0].token_ids for o in outputs], llm.llm_engine.scheduler.stats))
    assert results[0] == results[1]
    assert results[0][1].num_preemptions > 0
