"""Each sampling option against an independent expression (transformers' logits processors, or a few
lines of numpy), and what holds of a request's tokens whatever else the engine does.
"""

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from course_lib import LLM, RequestOutput, SamplingParams
from course_lib.engine.request import Request
from course_lib.engine.sampler import sample, uniform
from tests.checkpoints import random_model, save

VOCAB_SIZE = 40
NUM_DRAWS = 4000


def request_of(
    params: SamplingParams,
    prompt: tuple[int, ...] = (0,),
    output: tuple[int, ...] = (),
    seed: int | None = None,
    eos_token_ids: tuple[int, ...] = (),
) -> Request:
    """A request that has generated `output` so far."""
    request = Request("r", prompt, params, seed=seed, eos_token_ids=eos_token_ids)
    request.token_ids += output
    return request


def random_logits(seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * spread


def draws(logits: torch.Tensor, params: SamplingParams, **state: Any) -> np.ndarray:
    """How often each token comes, over `NUM_DRAWS` seeds."""
    requests = [request_of(params, seed=seed, **state) for seed in range(NUM_DRAWS)]
    tokens, _ = sample(logits.repeat(NUM_DRAWS, 1), requests)
    return np.bincount(tokens, minlength=VOCAB_SIZE)


def assert_drawn_from(counts: np.ndarray, probs: np.ndarray) -> None:
    """Nothing outside the support, and frequencies by a chi-square statistic on merged cells."""
    assert counts[probs == 0].sum() == 0
    common = probs * NUM_DRAWS >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(probs[common], probs[~common].sum()) * NUM_DRAWS
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    # The statistic has mean `freedom` and variance `2 * freedom`; the seeds are fixed.
    assert statistic <= freedom + 5 * math.sqrt(2 * max(1, freedom))


def warped(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """Probabilities by transformers, in vLLM's order: temperature, min_p, top_k, top_p."""
    scores, ids = logits[None].double(), torch.zeros(1, 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": -1},
        {"top_k": 10**6},
        {"top_p": 0.6},
        {"top_p": 0.95},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.8},
        {"temperature": 2.5, "min_p": 0.15, "top_k": 12},
        {"temperature": 0.8, "min_p": 0.05, "top_k": 10, "top_p": 0.7},
    ],
    ids=str,
)
def test_draws_follow_the_distribution_of_transformers(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    logits = random_logits()
    assert_drawn_from(draws(logits, params), warped(logits, params))


def test_the_draws_of_one_request_at_its_positions_follow_the_distribution_too() -> None:
    logits, params = random_logits(), SamplingParams(temperature=0.8)
    requests = [request_of(params, output=(0,) * n, seed=5) for n in range(NUM_DRAWS)]
    tokens, _ = sample(logits.repeat(NUM_DRAWS, 1), requests)
    counts = np.bincount(tokens, minlength=VOCAB_SIZE)
    assert_drawn_from(counts, warped(logits, params))


def test_greedy_takes_the_largest_and_no_filter_changes_that() -> None:
    logits = torch.stack([random_logits(seed) for seed in range(20)])
    params = SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.2)
    tokens, _ = sample(logits.clone(), [request_of(params) for _ in range(20)])
    assert tokens == logits.argmax(-1).tolist()


def test_a_lower_temperature_approaches_greedy() -> None:
    logits = random_logits()
    counts = draws(logits, SamplingParams(temperature=1e-4))
    assert counts[logits.argmax()] == NUM_DRAWS


@given(
    penalty=st.floats(0.5, 2.0),
    prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=6),
    output=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6),
    seed=st.integers(0, 100),
)
def test_repetition_penalty_is_that_of_transformers(
    penalty: float, prompt: list[int], output: list[int], seed: int
) -> None:
    logits = random_logits(seed)
    known = torch.tensor([prompt + output])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(known, logits[None].clone())[0]
    params = SamplingParams(temperature=0, repetition_penalty=penalty)
    assert_changed_to(logits, expected, params, tuple(prompt), tuple(output))


@given(
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=6),
    output=st.lists(st.integers(0, 8), max_size=12),
    seed=st.integers(0, 100),
)
def test_presence_and_frequency_count_the_output_as_openai_documents(
    presence: float, frequency: float, prompt: list[int], output: list[int], seed: int
) -> None:
    """logit - count * frequency_penalty - (count > 0) * presence_penalty; the prompt is free."""
    logits = random_logits(seed)
    expected = logits.clone()
    for token, count in Counter(output).items():
        expected[token] -= count * frequency + presence
    params = SamplingParams(temperature=0, presence_penalty=presence, frequency_penalty=frequency)
    assert_changed_to(logits, expected, params, tuple(prompt), tuple(output))


def assert_changed_to(
    logits: torch.Tensor,
    expected: torch.Tensor,
    params: SamplingParams,
    prompt: tuple[int, ...],
    output: tuple[int, ...],
) -> None:
    """The sampler changes logits in place: compare what it left, and the token it took."""
    company = random_logits(99)
    rows = torch.stack([company, logits, company])
    plain = request_of(SamplingParams(temperature=0))
    tokens, _ = sample(rows, [plain, request_of(params, prompt, output), plain])
    torch.testing.assert_close(rows[1], expected)
    torch.testing.assert_close(rows[0], company)
    assert rows[1][tokens[1]] == rows[1].max()


def test_penalties_act_before_the_draw_and_after_logit_bias() -> None:
    """Bias first, so a penalty divides the biased logit, as in vLLM."""
    logits = torch.zeros(VOCAB_SIZE)
    logits[3] = 1.0
    params = SamplingParams(logit_bias={3: 3.0}, repetition_penalty=2.0)
    expected = torch.zeros(VOCAB_SIZE)
    expected[3] = (1.0 + 3.0) / 2
    counts = draws(logits, params, prompt=(3,))
    assert_drawn_from(counts, expected.double().softmax(-1).numpy())


def test_logit_bias_is_added_and_100_decides() -> None:
    logits = random_logits()
    bias = {5: 1.5, 7: -100.0, 9: 2.0}
    expected = logits.double()
    for token, value in bias.items():
        expected[token] += value
    counts = draws(logits, SamplingParams(logit_bias=bias))
    assert_drawn_from(counts, expected.softmax(-1).numpy())
    greedy = SamplingParams(temperature=0, logit_bias={11: 100})
    assert sample(logits[None].clone(), [request_of(greedy)])[0] == [11]


def test_min_tokens_forbids_every_end_until_then() -> None:
    logits = torch.zeros(VOCAB_SIZE)
    logits[[1, 2, 3]] = 20.0  # two end-of-sequence tokens and a stop token, nearly certain
    params = SamplingParams(min_tokens=2, stop_token_ids=[3], max_tokens=9)
    for output, may_end in [((), False), ((5,), False), ((5, 5), True)]:
        counts = draws(logits, params, output=output, eos_token_ids=(1, 2))
        assert (counts[[1, 2, 3]].sum() > 0) == may_end


def test_min_tokens_leaves_an_ignored_end_of_sequence_token_alone() -> None:
    logits = torch.zeros(VOCAB_SIZE)
    logits[1] = 20.0
    params = SamplingParams(min_tokens=2, ignore_eos=True, temperature=0)
    assert sample(logits[None], [request_of(params, eos_token_ids=(1,))])[0] == [1]


def test_options_of_one_row_do_not_change_another() -> None:
    """A row's token is the same alone and beside rows that use every option."""
    everything = SamplingParams(
        top_k=5, top_p=0.5, min_p=0.1, logit_bias={1: 50}, repetition_penalty=1.5, logprobs=3
    )
    for seed in range(200):
        logits = random_logits(seed)
        plain = request_of(SamplingParams(), seed=seed)
        alone, _ = sample(logits[None].clone(), [plain])
        rows = torch.stack([random_logits(1), logits, random_logits(2)])
        company, _ = sample(
            rows, [request_of(everything, seed=1), plain, request_of(everything, seed=2)]
        )
        assert company[1] == alone[0]


def test_a_row_without_top_p_keeps_its_whole_tail_beside_rows_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The likeliest token's probability rounds to 1, and the draw falls on the very last one."""
    monkeypatch.setattr("course_lib.engine.sampler.uniform", lambda seed, index: 1 - 2**-52)
    logits = torch.full((1, VOCAB_SIZE), -20.0)
    logits[0, 0] = 0.0
    plain, nucleus = request_of(SamplingParams()), request_of(SamplingParams(top_p=0.5))
    assert sample(logits.clone(), [plain])[0] == [VOCAB_SIZE - 1]
    assert sample(logits.repeat(2, 1), [plain, nucleus])[0] == [VOCAB_SIZE - 1, 0]


def test_a_row_whose_tokens_are_all_forbidden_harms_nobody() -> None:
    params = SamplingParams(min_tokens=1, stop_token_ids=list(range(VOCAB_SIZE)))
    rows = torch.stack([random_logits(0), random_logits(1)])
    fine = request_of(SamplingParams(), seed=3)
    alone, _ = sample(rows[1:].clone(), [fine])
    tokens, _ = sample(rows, [request_of(params), fine])
    assert 0 <= tokens[0] < VOCAB_SIZE and tokens[1:] == alone


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e308},
        {"temperature": 1e-5},
        {"top_k": 10**400},
        {"top_p": 1e-308},
        {"repetition_penalty": 1e308},
        {"repetition_penalty": 1e-308},
        {"logprobs": 10**400},
        {"seed": 10**400},
        {"min_p": 1e-308, "top_p": 1 - 1e-16, "top_k": 1},
    ],
    ids=lambda options: ", ".join(options),
)
@pytest.mark.parametrize("spread", [0.0, 2.0, 1e4])
def test_extreme_values_give_a_token_and_harm_nobody(
    options: dict[str, Any], spread: float
) -> None:
    request = request_of(SamplingParams(**options), output=(1, 2))
    fine = request_of(SamplingParams(), seed=3)
    rows = torch.stack([random_logits(0, spread), random_logits(1)])
    alone, _ = sample(rows[1:].clone(), [fine])
    tokens, _ = sample(rows, [request, fine])
    assert 0 <= tokens[0] < VOCAB_SIZE and tokens[1:] == alone


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    table = np.array([[uniform(seed, index) for index in range(100)] for seed in range(100)])
    assert table.min() >= 0 and table.max() < 1
    counts, _ = np.histogram(table, bins=20, range=(0, 1))
    assert ((counts - 500) ** 2 / 500).sum() < 19 + 5 * math.sqrt(38)
    for shifted in (table[1:, :-1], table[:-1, 1:], table[1:, 1:], table[:-1, :-1]):
        for other in (table[:-1, :-1], table[1:, 1:]):
            if not np.array_equal(shifted, other):
                correlation = np.corrcoef(shifted.ravel(), other.ravel())[0, 1]
                assert abs(correlation) < 0.05
    assert len({uniform(seed, 0) for seed in (-1, 0, 1, 2**63, -(2**63), 2**64 - 2)}) > 4


def test_logprobs_are_of_the_raw_logits_with_ranks_and_the_chosen_token() -> None:
    logits = random_logits()
    want = logits.double().log_softmax(-1)
    order = want.argsort(descending=True).tolist()
    params = SamplingParams(
        temperature=5.0, logprobs=3, top_p=0.9, logit_bias={4: 8.0}, presence_penalty=2.0
    )
    seen_outside = False
    for seed in range(50):
        request = request_of(params, output=(order[0],), seed=seed)
        tokens, logprobs = sample(logits[None].clone(), [request])
        [position] = logprobs[0]
        assert set(position) == {*order[:3], tokens[0]}
        seen_outside |= tokens[0] not in order[:3]
        for token, entry in position.items():
            assert entry.logprob == pytest.approx(float(want[token]), abs=1e-5)
            assert entry.rank == order.index(token) + 1
    assert seen_outside


def test_logprobs_come_only_to_those_who_ask() -> None:
    params = [SamplingParams(), SamplingParams(logprobs=0), SamplingParams(logprobs=99)]
    requests = [request_of(p) for p in params]
    tokens, logprobs = sample(random_logits().repeat(3, 1), requests)
    assert logprobs[0] == []
    assert list(logprobs[1][0]) == [tokens[1]]
    assert len(logprobs[2][0]) == VOCAB_SIZE


# What follows runs the whole engine.


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def checkpoint(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("llama"))


def load(checkpoint: Path, **options: Any) -> LLM:
    return LLM(checkpoint, **{"dtype": "float32", "max_model_len": 128, "block_size": 8, **options})


def prompts_of(number: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(97) for _ in range(rng.randint(1, 40))] for _ in range(number)]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


SEEDED = SamplingParams(
    temperature=2.0, top_k=60, top_p=0.98, seed=1234, max_tokens=24, ignore_eos=True
)


def test_a_seeded_request_gives_the_same_tokens_whatever_the_engine_does(checkpoint: Path) -> None:
    prompts = prompts_of(21)
    mine = prompts[10]
    llm = load(checkpoint)
    [alone] = tokens_of(llm.generate([mine], SEEDED, use_tqdm=False))
    others = [
        SamplingParams(temperature=i % 3, top_p=0.9 if i % 2 else 1, max_tokens=24, logprobs=2)
        for i in range(20)
    ]
    batch = tokens_of(llm.generate(prompts, [*others[:10], SEEDED, *others[10:]], use_tqdm=False))
    assert batch[10] == alone
    last = [*prompts[:10], *prompts[11:], mine]
    assert tokens_of(llm.generate(last, [*others, SEEDED], use_tqdm=False))[-1] == alone

    tight = load(
        checkpoint,
        num_gpu_blocks_override=18,
        max_num_batched_tokens=7,
        enable_prefix_caching=False,
    )
    outputs = tight.generate(prompts, [*others[:10], SEEDED, *others[10:]], use_tqdm=False)
    assert tokens_of(outputs)[10] == alone
    assert tight.llm_engine.scheduler.stats.num_preemptions > 0

    preempted = [tight.generate([p, mine], [SEEDED] * 2, use_tqdm=False)[1] for p in prompts[:3]]
    assert tokens_of(preempted) == [alone] * 3


def test_a_preempted_seeded_request_goes_on_with_the_same_tokens(checkpoint: Path) -> None:
    prompts = prompts_of(6, seed=3)
    params = [SamplingParams(seed=i, max_tokens=40, ignore_eos=True) for i in range(6)]
    roomy = load(checkpoint).generate(prompts, params, use_tqdm=False)
    tight = load(checkpoint, num_gpu_blocks_override=17).generate(prompts, params, use_tqdm=False)
    assert sum(output.metrics.num_preemptions for output in tight) > 1
    assert tokens_of(tight) == tokens_of(roomy)


def test_completions_of_one_prompt_differ_and_repeat_with_a_seed(checkpoint: Path) -> None:
    params = SamplingParams(n=3, seed=5, temperature=2.0, max_tokens=12)
    llm = load(checkpoint)
    [first] = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert [completion.index for completion in first.outputs] == [0, 1, 2]
    assert len(set(map(tuple, tokens_of([first])))) == 3
    [_, again] = llm.generate([[9], [1, 2, 3]], [SamplingParams(), params], use_tqdm=False)
    assert tokens_of([again]) == tokens_of([first])


def test_requests_without_a_seed_differ_and_the_engine_seed_repeats_the_run(
    checkpoint: Path,
) -> None:
    def run(seed: int) -> list[list[int]]:
        llm = load(checkpoint, seed=seed)
        params = SamplingParams(temperature=2.0, max_tokens=12)
        outputs = llm.generate([[1, 2, 3]] * 4, params, use_tqdm=False)
        return tokens_of(outputs) + tokens_of(llm.generate([[1, 2, 3]], params, use_tqdm=False))

    first = run(7)
    assert len(set(map(tuple, first))) == 5
    assert run(7) == first
    assert not set(map(tuple, run(8))) & set(map(tuple, first))


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 5}], ids=str)
def test_prompt_logprobs_equal_those_of_transformers(
    model: PreTrainedModel, checkpoint: Path, options: dict[str, Any]
) -> None:
    """Also where the cache holds the prompt already, and with preemption."""
    prompts = prompts_of(5, seed=4)
    params = SamplingParams(prompt_logprobs=2, max_tokens=30, ignore_eos=True, seed=0)
    llm = load(checkpoint, num_gpu_blocks_override=17, **options)
    for _ in range(2):
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert_prompt_logprobs(model, prompt, output)
    assert llm.llm_engine.scheduler.stats.num_preemptions > 0


def assert_prompt_logprobs(
    model: PreTrainedModel, prompt: list[int], output: RequestOutput
) -> None:
    with torch.inference_mode():
        want = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    got = output.prompt_logprobs
    assert got is not None and len(got) == len(prompt) and got[0] is None
    for position, token in enumerate(prompt[1:], start=1):
        entries, row = got[position], want[position - 1]
        top = row.topk(2).indices.tolist()
        assert entries is not None and set(entries) == {token, *top}
        for t, entry in entries.items():
            assert entry.logprob == pytest.approx(float(row[t]), abs=1e-4)
            assert entry.rank == int((row > row[t]).sum()) + 1


def test_output_logprobs_equal_those_of_transformers(
    model: PreTrainedModel, checkpoint: Path
) -> None:
    """Position by position, the same after chunks and preemption; their sum is cumulative."""
    prompts = prompts_of(5, seed=5)
    params = [
        SamplingParams(logprobs=2, max_tokens=30, seed=i, top_k=20, repetition_penalty=1.3)
        for i in range(5)
    ]
    llm = load(checkpoint, num_gpu_blocks_override=17, max_num_batched_tokens=9)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert llm.llm_engine.scheduler.stats.num_preemptions > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        [completion] = output.outputs
        with torch.inference_mode():
            all_tokens = torch.tensor([prompt + completion.token_ids])
            want = model(all_tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert completion.logprobs is not None
        total = 0.0
        rows = zip(completion.token_ids, completion.logprobs, want, strict=True)
        for token, entries, row in rows:
            assert set(entries) == {token, *row.topk(2).indices.tolist()}
            assert entries[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
            total += float(row[token])
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)
