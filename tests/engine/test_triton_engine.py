"""The whole engine on the course's kernels gives the tokens of the engine on PyTorch operations.

Interpreted where there is no GPU, so with few tokens; compiled and with CUDA graphs on one.
"""

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from course_lib import LLM, SamplingParams
from course_lib.data import DEFAULT_MODEL
from kernels.paged_attention import paged_attention
from kernels.runtime import INTERPRETED
from tests.checkpoints import FAMILIES, random_model, save

interpreted_only = pytest.mark.skipif(
    not INTERPRETED, reason="kernels are compiled in this process; the GPU tests cover them"
)


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def tokens_of(llm: LLM, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    outputs = llm.generate(prompts, greedy(num_tokens), use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def make_llm(model: Path, backend: str, **options: Any) -> LLM:
    options = {"dtype": "float32", "max_model_len": 64, "block_size": 8, **options}
    return LLM(model, attention_backend=backend, num_gpu_blocks_override=65, **options)


@interpreted_only
@pytest.mark.slow
def test_the_shipped_model_in_chunks_and_from_the_prefix_cache() -> None:
    prompts = [[17, 300, 41, 5, 999, 1200, 7, 64, 2], [17, 300, 41, 5, 8]]
    replies = []
    for backend in ("TORCH_SDPA", "TRITON_ATTN"):
        llm = make_llm(DEFAULT_MODEL, backend, block_size=4, max_num_batched_tokens=6)
        cold = tokens_of(llm, prompts, 4)
        stats = llm.llm_engine.scheduler.stats
        hits = stats.prefix_cache_hits
        warm = tokens_of(llm, prompts[:1], 4)
        assert stats.prefix_cache_hits == hits + 8
        assert warm == cold[:1]
        replies.append(cold)
    assert replies[0] == replies[1]


@interpreted_only
@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama3-rope-scaling", "mistral-sliding-window", "qwen2", "qwen3"]
)
def test_every_family(family: str, tmp_path: Path) -> None:
    directory = save(random_model(family, num_hidden_layers=2), tmp_path)
    rng = random.Random(family)
    prompts = [[rng.randrange(97) for _ in range(length)] for length in (19, 1, 8)]
    expected = tokens_of(make_llm(directory, "TORCH_SDPA"), prompts, 6)
    assert tokens_of(make_llm(directory, "TRITON_ATTN"), prompts, 6) == expected


@interpreted_only
def test_the_public_function_as_a_part_of_the_engine() -> None:
    """As a student's kernel is passed in; it checks its arguments, contiguous ones among them."""
    prompts = [[17, 300, 41, 5, 999], [7]]
    options = {"max_model_len": 64, "num_gpu_blocks_override": 9}
    expected = tokens_of(LLM(DEFAULT_MODEL, **options), prompts, 2)
    assert tokens_of(
        LLM(DEFAULT_MODEL, paged_attention=paged_attention, **options), prompts, 2
    ) == (expected)


# On a GPU.

#: Contexts of more than 512 tokens are split among programs.
PROMPT_LENS = [1, 7, 16, 17, 33, 100, 300, 64, 3, 50, 470]


@pytest.fixture
def gpu() -> Iterator[None]:
    """Memory of engines that are no longer used is given back around the test."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


def gpu_llm(model: Path, backend: str, **options: Any) -> LLM:
    options = {"dtype": "float32", "max_model_len": 512, **options}
    return LLM(model, attention_backend=backend, num_gpu_blocks_override=513, **options)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("family", ["merchant-chat", *sorted(FAMILIES)])
def test_on_a_gpu_every_family_with_and_without_graphs(
    family: str, tmp_path: Path, gpu: None
) -> None:
    shipped = family == "merchant-chat"
    model = DEFAULT_MODEL if shipped else save(random_model(family), tmp_path)
    rng = random.Random(family)
    prompts = [[rng.randrange(97) for _ in range(length)] for length in PROMPT_LENS]
    if shipped:
        prompts.append([rng.randrange(97) for _ in range(1100)])
    longest = {"max_model_len": 2048 if shipped else 512}
    expected = tokens_of(gpu_llm(model, "TORCH_SDPA", **longest), prompts, 24)
    for options in (
        {},
        {"enforce_eager": True},
        {"max_num_batched_tokens": 60, "max_num_seqs": 5},
    ):
        llm = gpu_llm(model, "TRITON_ATTN", **longest, **options)
        assert (llm.llm_engine.executor.graphs is None) == ("enforce_eager" in options)
        assert tokens_of(llm, prompts, 24) == expected  # cold
        assert tokens_of(llm, prompts, 24) == expected  # from the prefix cache


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_on_a_gpu_sixteen_bit_stays_close(dtype: str, gpu: None) -> None:
    if dtype == "bfloat16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bfloat16 arithmetic")
    rng = random.Random(0)
    prompts = [[rng.randrange(2000) for _ in range(length)] for length in PROMPT_LENS]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)

    def logprobs(backend: str, dtype: str) -> torch.Tensor:
        """Of each token of the prompts, given those before it."""
        llm = gpu_llm(DEFAULT_MODEL, backend, dtype=dtype, enable_prefix_caching=False)
        found = []
        for output in llm.generate(prompts, params, use_tqdm=False):
            for token, entries in zip(
                output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
            ):
                found.append(entries[token].logprob)
        return torch.tensor(found)

    exact = logprobs("TORCH_SDPA", "float32")
    got = logprobs("TRITON_ATTN", dtype)
    assert (got - exact).abs().mean() < (0.02 if dtype == "float16" else 0.1)


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_are_the_default(gpu: None) -> None:
    engine = LLM(DEFAULT_MODEL, max_model_len=64, num_gpu_blocks_override=9).llm_engine
    assert engine.attention.name == "TRITON_ATTN"
    assert engine.dtype == torch.float16
    assert engine.executor.graphs is not None
