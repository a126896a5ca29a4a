"""Decode steps over kept tensors give what eager steps give.

In the first tests a graph is a function that runs again on the same tensors and overwrites its last
result, as a graph would. Then come those of the CPU, and at the end, on a GPU, CUDA graphs.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from course_lib import LLM, SamplingParams
from course_lib.engine.decode_graphs import MAX_CPU_SIZE, DecodeGraphs, cuda_graph_sizes
from course_lib.engine.runner import ModelRunner
from course_lib.model.decoder import StepInputs
from kernels import cpu
from kernels.paged_attention import paged_attention_reference
from tests.checkpoints import random_model, save

CPU = torch.device("cpu")
REASON = cpu.why_not(torch.float32)

compiled = pytest.mark.skipif(
    REASON is not None or torch.cuda.is_available(), reason=REASON or "is about engines on a CPU"
)


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (16, [1, 2, 4, 8, 16]),
        (21, [1, 2, 4, 8, 16, 21]),
        (64, [1, 2, 4, 8, 16, 32, 48, 64]),
    ],
)
def test_the_ladder_ends_at_the_largest_batch(max_num_seqs: int, sizes: list[int]) -> None:
    assert cuda_graph_sizes(max_num_seqs) == sizes


# One step.


class RecordedSteps:
    """A forward pass that keeps copies of what it is given."""

    def __init__(self) -> None:
        self.steps: list[dict[str, list]] = []
        self.addresses: set[tuple[int, ...]] = set()

    def __call__(self, step: StepInputs) -> torch.Tensor:
        tensors = {
            "token_ids": step.token_ids,
            "positions": step.positions,
            "slot_mapping": step.slot_mapping,
            "block_tables": step.plan.block_tables,
            "context_lens": step.plan.context_lens,
            "query_start_loc": step.plan.query_start_loc,
        }
        self.steps.append({name: tensor.tolist() for name, tensor in tensors.items()})
        self.addresses.add((len(step.token_ids), *(t.data_ptr() for t in tensors.values())))
        return step.token_ids[:, None].float()


@pytest.fixture
def recorded() -> tuple[RecordedSteps, DecodeGraphs]:
    forward = RecordedSteps()
    graphs = DecodeGraphs(forward, [1, 2, 4, 6], 3, CPU, capture=lambda run: run)
    return forward, graphs


def step_of(tokens: list[int], width: int = 3) -> dict[str, np.ndarray]:
    """Arguments of `run`: request i has position 10 + i and the blocks 3i + 1, 3i + 2, ..."""
    n = len(tokens)
    return {
        "token_ids": np.array(tokens),
        "positions": np.arange(n) + 10,
        "slot_mapping": np.arange(n) * 100 + 50,
        "block_tables": (np.arange(n)[:, None] * 3 + np.arange(width) + 1).astype(np.int32),
    }


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 6])
def test_a_step_runs_on_the_next_rung_and_returns_its_own_rows(
    recorded: tuple[RecordedSteps, DecodeGraphs], num: int
) -> None:
    forward, graphs = recorded
    result = graphs.run(**step_of(list(range(70, 70 + num))))
    assert result.flatten().tolist() == list(range(70, 70 + num))
    size = {1: 1, 2: 2, 3: 4, 4: 4, 5: 6, 6: 6}[num]
    [step] = forward.steps
    assert len(step["token_ids"]) == size
    assert step["positions"][:num] == list(range(10, 10 + num))
    assert step["slot_mapping"][:num] == [50 + 100 * i for i in range(num)]
    assert step["context_lens"][:num] == list(range(11, 11 + num))
    assert step["block_tables"][:num] == [[3 * i + 1, 3 * i + 2, 3 * i + 3] for i in range(num)]
    assert step["query_start_loc"] == list(range(size + 1))


def test_padding_is_one_token_in_the_null_block_whatever_was_there_before(
    recorded: tuple[RecordedSteps, DecodeGraphs],
) -> None:
    forward, graphs = recorded
    graphs.run(**step_of([70, 71, 72, 73, 74, 75]))
    graphs.run(**step_of([80, 81, 82, 83, 84]))
    graphs.run(**step_of([90, 91, 92], width=1))
    for num, step in ((5, forward.steps[1]), (3, forward.steps[2])):
        assert set(step["token_ids"][num:]) == {0}
        assert set(step["positions"][num:]) == {0}
        assert set(step["slot_mapping"][num:]) == {0}
        assert set(step["context_lens"][num:]) == {1}
        assert {table[0] for table in step["block_tables"][num:]} == {0}


def test_a_rung_always_reads_the_same_tensors(
    recorded: tuple[RecordedSteps, DecodeGraphs],
) -> None:
    forward, graphs = recorded
    for num in (1, 6, 3, 2, 5, 4, 1, 6):
        graphs.run(**step_of([7] * num))
    assert len(forward.addresses) == len(graphs.sizes)


# The whole engine.


def overwriting(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Like a graph: what a run returned is overwritten by the next one."""
    result = run().clone()

    def replay() -> torch.Tensor:
        result.copy_(run())
        return result

    return replay


def with_graphs(llm: LLM) -> list[int]:
    """Give the engine graphs. Returns a list that grows by the batch size of each replay."""
    runner = llm.llm_engine.executor
    assert isinstance(runner, ModelRunner)
    max_blocks = -(-llm.llm_engine.max_model_len // runner.block_size)
    with torch.inference_mode():
        runner.graphs = DecodeGraphs(
            runner._forward,
            cuda_graph_sizes(llm.llm_engine.config.max_num_seqs),
            max_blocks,
            runner.device,
            overwriting,
        )
    sizes: list[int] = []
    run = runner.graphs.run

    def counted(*arrays: np.ndarray) -> torch.Tensor:
        sizes.append(len(arrays[0]))
        return run(*arrays)

    runner.graphs.run = counted
    return sizes


@pytest.fixture(scope="module", params=["mistral-sliding-window", "qwen3"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    model = random_model(request.param, num_hidden_layers=2)
    yield save(model, tmp_path_factory.mktemp(request.param))


OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 8,
    "max_model_len": 80,
    "max_num_seqs": 7,
    "paged_attention": paged_attention_reference,
}
ON_CPU = {name: value for name, value in OPTIONS.items() if name != "paged_attention"}


def some_prompts(lens: list[int]) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(97) for _ in range(length)] for length in lens]


def generate(llm: LLM, num_tokens: list[int], **options: Any) -> list[list[int]]:
    """Prompts of mixed lengths, of which each gets another number of tokens."""
    prompts = some_prompts([5, 1, 16, 9, 30, 8, 2, 17, 24, 3, 7][: len(num_tokens)])
    params = [SamplingParams(max_tokens=n, ignore_eos=True, **options) for n in num_tokens]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_requests_join_and_leave(checkpoint: Path, options: dict[str, Any]) -> None:
    """Batch sizes on the rungs 1, 2, 4, 7 and between them."""
    num_tokens = [4, 9, 12, 3, 26, 30, 8, 14, 8, 29, 20]
    llm = LLM(checkpoint, **OPTIONS)
    expected = generate(llm, num_tokens, **options)
    sizes = with_graphs(llm := LLM(checkpoint, **OPTIONS))
    assert generate(llm, num_tokens, **options) == expected
    assert set(sizes) >= {1, 2, 4, 7} and set(sizes) & {3, 5, 6}
    assert generate(llm, num_tokens, **options) == expected  # with a warm prefix cache


def test_preemption_and_chunks(checkpoint: Path) -> None:
    options = {**OPTIONS, "num_gpu_blocks_override": 1 + 12, "max_num_batched_tokens": 11}
    num_tokens = [30] * 7
    expected = generate(LLM(checkpoint, **OPTIONS), num_tokens, temperature=0)
    sizes = with_graphs(llm := LLM(checkpoint, **options))
    assert generate(llm, num_tokens, temperature=0) == expected
    assert llm.llm_engine.scheduler.stats.num_preemptions > 0
    assert len(set(sizes)) > 2


def test_only_steps_of_nothing_but_decodes_are_graphs(checkpoint: Path) -> None:
    sizes = with_graphs(llm := LLM(checkpoint, **OPTIONS))
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    engine.add_request("a", [1, 2, 3], params)
    replays = []
    for step in range(7):
        if step == 3:
            engine.add_request("b", [4, 5], params)
        if engine.has_unfinished_requests():
            engine.step()
        replays.append(list(sizes))
        sizes.clear()
    assert replays == [[], [1], [1], [], [2], [2], [1]]


def test_a_last_chunk_of_one_token_is_a_decode_too(checkpoint: Path) -> None:
    options = {**OPTIONS, "max_num_batched_tokens": 8}
    expected = LLM(checkpoint, **options).generate(some_prompts([17]), use_tqdm=False)
    sizes = with_graphs(llm := LLM(checkpoint, **options))
    got = llm.generate(some_prompts([17]), use_tqdm=False)
    assert got[0].outputs[0].token_ids == expected[0].outputs[0].token_ids
    assert len(sizes) == len(got[0].outputs[0].token_ids)


def test_the_null_block_is_all_that_padding_touches(checkpoint: Path) -> None:
    caches = []
    for graphs in (False, True):
        llm = LLM(checkpoint, **OPTIONS, num_gpu_blocks_override=40)
        if graphs:
            with_graphs(llm)
        generate(llm, [4, 9, 12, 3, 16, 20, 8], temperature=0)
        caches.append(llm.llm_engine.executor.kv_cache)
    for eager, replayed in zip(*caches, strict=True):
        for want, got in zip(eager, replayed, strict=True):
            torch.testing.assert_close(got[1:], want[1:])
            assert got[0].any() and not want[0].any()


# On a CPU with compiled kernels.


@compiled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family", ["llama", "llama-biases", "qwen2", "qwen3", "mistral-sliding-window"]
)
def test_recorded_calls(family: str, dtype: str, tmp_path: Path) -> None:
    """The tokens of eager steps, also while requests join and leave and are preempted."""
    checkpoint = save(random_model(family, num_hidden_layers=2), tmp_path)
    options: dict[str, Any] = {**ON_CPU, "dtype": dtype, "num_gpu_blocks_override": 41}
    num_tokens = [4, 9, 12, 3, 26, 30, 8, 14, 8, 29, 20]
    for changes in ({}, {"num_gpu_blocks_override": 13}, {"max_num_seqs": 3}):
        eager = LLM(checkpoint, **{**options, **changes}, enforce_eager=True)
        assert eager.llm_engine.executor.graphs is None
        expected = generate(eager, num_tokens, temperature=0)
        llm = LLM(checkpoint, **{**options, **changes})
        assert generate(llm, num_tokens, temperature=0) == expected
        assert generate(llm, num_tokens, temperature=0) == expected


@compiled
def test_small_batches_are_recorded_when_they_first_occur(checkpoint: Path) -> None:
    llm = LLM(checkpoint, **{**ON_CPU, "max_num_seqs": 40})
    graphs = llm.llm_engine.executor.graphs
    assert list(graphs.sizes) == list(range(1, MAX_CPU_SIZE + 1)) and not graphs._replays
    generate(llm, [5] * 3, temperature=0)
    assert set(graphs._replays) == {3}
    generate(llm, [5] * (MAX_CPU_SIZE + 1), temperature=0)
    assert set(graphs._replays) == {3}


@compiled
def test_what_is_not_all_compiled_kernels_is_not_recorded(checkpoint: Path, tmp_path: Path) -> None:
    for options in (
        {"paged_attention": paged_attention_reference},
        {"attention_backend": "TORCH_SDPA"},
    ):
        assert LLM(checkpoint, **ON_CPU, **options).llm_engine.executor.graphs is None
    odd = save(random_model("llama", intermediate_size=33), tmp_path)
    assert LLM(odd, **ON_CPU).llm_engine.executor.graphs is None


# On a GPU.


@pytest.mark.gpu
def test_real_graphs(checkpoint: Path) -> None:
    """The tokens of eager steps, with requests that join and leave and are preempted."""
    options = {**OPTIONS, "num_gpu_blocks_override": 41}
    del options["paged_attention"]
    num_tokens = [4, 9, 12, 3, 26, 30, 8, 14, 8, 29, 20]
    eager = LLM(checkpoint, **options, enforce_eager=True)
    assert eager.llm_engine.executor.graphs is None
    expected = generate(eager, num_tokens, temperature=0)
    for changes in ({}, {"num_gpu_blocks_override": 13}, {"max_num_batched_tokens": 9}):
        llm = LLM(checkpoint, **{**options, **changes})
        assert llm.llm_engine.executor.graphs.sizes == [1, 2, 4, 7]
        assert generate(llm, num_tokens, temperature=0) == expected
        assert generate(llm, num_tokens, temperature=0) == expected


@pytest.mark.gpu
def test_only_a_backend_that_is_safe_to_record_gets_graphs(checkpoint: Path) -> None:
    options = {**OPTIONS, "num_gpu_blocks_override": 41}
    of_function = LLM(checkpoint, **options)
    assert of_function.llm_engine.executor.graphs is None
    del options["paged_attention"]
    of_torch = LLM(checkpoint, **options, attention_backend="TORCH_SDPA")
    assert of_torch.llm_engine.executor.graphs is None
