"""Greedy float32 tokens equal those of transformers' `generate`, whatever the engine does inside:
mixed prompt lengths in one batch, preemption, chunked prefill, a warm prefix cache.
"""

import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from course_lib import LLM, SamplingParams
from tests.checkpoints import FAMILIES, greedy_tokens, random_model, save

PROMPT_LENS = [1, 7, 8, 9, 33, 16, 64, 40]
NUM_TOKENS = 20
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A checkpoint, prompts of mixed lengths with a shared beginning, and the tokens expected."""
    model = random_model(request.param)
    directory = save(model, tmp_path_factory.mktemp(request.param))
    rng = random.Random(request.param)
    beginning = [rng.randrange(97) for _ in range(24)]
    prompts = []
    for length in PROMPT_LENS:
        own = [rng.randrange(97) for _ in range(length)]
        prompts.append((beginning + own)[:length] if length > 30 else own)
    return directory, prompts, [greedy_tokens(model, p, NUM_TOKENS) for p in prompts]


def generated(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("block_size", [8, 16])
def test_one_batch_cold_and_warm(case, block_size: int) -> None:
    directory, prompts, expected = case
    llm = LLM(directory, dtype="float32", block_size=block_size)
    assert generated(llm, prompts) == expected
    stats = llm.llm_engine.scheduler.stats
    hits = stats.prefix_cache_hits
    assert generated(llm, prompts) == expected
    assert stats.prefix_cache_hits > hits


@pytest.mark.parametrize("block_size", [8, 16])
def test_small_cache_and_budget(case, block_size: int) -> None:
    """A cache that cannot hold the batch and a budget that cuts prompts into chunks of 11."""
    directory, prompts, expected = case
    llm = LLM(
        directory,
        dtype="float32",
        block_size=block_size,
        max_model_len=96,
        num_gpu_blocks_override=1 + 112 // block_size,
        max_num_batched_tokens=11,
    )
    assert generated(llm, prompts) == expected
    assert llm.llm_engine.scheduler.stats.num_preemptions > 0
    assert generated(llm, prompts) == expected


def test_without_prefix_caching(case) -> None:
    directory, prompts, expected = case
    llm = LLM(directory, dtype="float32", enable_prefix_caching=False, max_num_batched_tokens=50)
    assert generated(llm, prompts) == expected
    assert generated(llm, prompts) == expected
    assert llm.llm_engine.scheduler.stats.prefix_cache_hits == 0


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model: PreTrainedModel = random_model("llama")
    directory = save(model, tmp_path, max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    prompt = list(range(20))
    expected = greedy_tokens(model, prompt, NUM_TOKENS)
    assert generated(LLM(directory, dtype="float32"), [prompt]) == [expected]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_logprobs_are_close(tmp_path: Path, dtype: str) -> None:
    """In 16 bit tokens may differ at ties, so the prompt's logprobs are compared."""
    model = random_model("qwen3")
    directory = save(model, tmp_path)
    prompt = [random.Random(1).randrange(97) for _ in range(50)]
    with torch.no_grad():
        reference = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    output = LLM(directory, dtype=dtype).generate([prompt], params, use_tqdm=False)[0]
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    got = [p[t].logprob for p, t in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    want = [float(reference[i, token]) for i, token in enumerate(prompt[1:])]
    assert max(abs(g - w) for g, w in zip(got, want, strict=True)) < 0.3
