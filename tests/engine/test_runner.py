"""The model runner: block ids are checked before the device sees them, and the host waits once."""

import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from course_lib import LLM, SamplingParams
from course_lib.engine.batch import ScheduledRequest
from course_lib.engine.block_pool import BlockPool
from course_lib.engine.request import Request
from course_lib.engine.runner import build_inputs
from tests.checkpoints import random_model, save


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("llama", num_hidden_layers=1), tmp_path_factory.mktemp("runner"))


@pytest.mark.parametrize("wrong", [-1, 17, 10**6])
@pytest.mark.parametrize("backend", ["TORCH_SDPA", "TRITON_ATTN"])
def test_a_block_that_does_not_exist_is_named(directory: Path, wrong: int, backend: str) -> None:
    """Here the block pool puts one in the third place of a table."""

    class WrongPool(BlockPool):
        def allocate(self, request: Request, *args: Any) -> bool:
            given = super().allocate(request, *args)
            self.right = request.block_ids[2]
            request.block_ids[2] = wrong
            return given

        def free(self, request: Request) -> None:
            if request.block_ids:
                request.block_ids[2] = self.right
            super().free(request)

    llm = LLM(
        directory,
        block_pool=WrongPool,
        block_size=4,
        max_model_len=64,
        num_gpu_blocks_override=17,
        attention_backend=backend,
    )
    before = [tensor.clone() for tensor in llm.llm_engine.executor.kv_cache[0]]
    message = f"of request '0' names block {wrong}, but the cache has blocks 0 to 16; the block po"
    with pytest.raises(ValueError, match=re.escape(message)):
        llm.generate([list(range(11))], SamplingParams(max_tokens=3), use_tqdm=False)
    for tensor, copy in zip(llm.llm_engine.executor.kv_cache[0], before, strict=True):
        assert torch.equal(tensor, copy)  # nothing ran


def test_a_step_has_the_same_types_in_every_thread() -> None:
    """A server steps in a thread of its own, where numpy 2.1 promotes otherwise."""
    request = Request("0", list(range(20)))
    request.block_ids = [3, 1]
    entries = [ScheduledRequest(request, 0, 20)]
    with ThreadPoolExecutor(1) as thread:
        inputs = thread.submit(build_inputs, entries, 16).result()
    for array in (inputs.token_ids, inputs.positions, inputs.slot_mapping):
        assert array.dtype == np.int64
    assert inputs.slot_mapping.tolist() == [*range(48, 64), *range(16, 20)]


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 7, "min_p": 0.01},
        {
            "temperature": 1.0,
            "repetition_penalty": 1.2,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.1,
            "logit_bias": {3: 1.0},
            "min_tokens": 20,
            "stop_token_ids": [5],
        },
    ],
    ids=["greedy", "drawn", "penalised"],
)
def test_on_a_gpu_the_host_waits_once_a_step(
    directory: Path, options: dict[str, Any], enforce_eager: bool
) -> None:
    llm = LLM(
        directory,
        max_model_len=64,
        num_gpu_blocks_override=65,
        max_num_seqs=4,
        enforce_eager=enforce_eager,
    )
    engine = llm.llm_engine
    for i in range(3):
        engine.add_request(str(i), [1, 2, 3 + i], SamplingParams(max_tokens=40, **options))
    for _ in range(3):
        engine.step()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    assert len(waits) == 1, [f"{w.filename}:{w.lineno}" for w in waits]
    engine.abort_request(["0", "1", "2"])
