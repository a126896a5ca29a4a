"""How many blocks the KV cache gets: computed on a CPU, measured on a GPU."""

import gc
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from course_lib import LLM
from course_lib.engine.config import EngineConfig
from course_lib.engine.kv_cache import (
    CPU_KV_CACHE_BYTES,
    cpu_kv_cache_bytes,
    make_kv_cache,
    num_blocks_for,
    run_largest_step,
)
from course_lib.model.attention import AttentionMetadata, TorchAttention, TritonAttention
from course_lib.model.config import ModelConfig
from course_lib.model.decoder import Decoder
from course_lib.sizing.catalog import CATALOG_DIR, find_model
from course_lib.sizing.memory import kv_capacity, peak_activations_gb
from kernels.runtime import INTERPRETED
from tests.checkpoints import random_model, save


@pytest.mark.parametrize(
    ("budget", "blocks"),
    [(0, 1), (-5, 1), (99, 1), (100, 2), (1999, 20), (2000, 21), (10**9, 21)],
)
def test_blocks_are_what_the_budget_pays_for_but_no_more_than_can_be_used(
    budget: int, blocks: int
) -> None:
    """Blocks of 100 bytes, 4 requests of 5 blocks, and the null block."""
    assert num_blocks_for(budget, 100, 4, 5) == blocks


@given(
    st.integers(-(10**9), 10**12),
    st.integers(1, 10**8),
    st.integers(1, 1000),
    st.integers(1, 1000),
)
def test_blocks_never_cost_more_than_the_budget(
    budget: int, block_bytes: int, max_num_seqs: int, blocks_per_request: int
) -> None:
    usable = num_blocks_for(budget, block_bytes, max_num_seqs, blocks_per_request) - 1
    assert 0 <= usable <= max_num_seqs * blocks_per_request
    assert usable * block_bytes <= max(0, budget)
    if usable < max_num_seqs * blocks_per_request:
        assert (usable + 1) * block_bytes > budget


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("llama", num_hidden_layers=2), tmp_path_factory.mktemp("kv-cache"))


def test_on_a_cpu_weights_and_cache_share_the_utilization(directory: Path) -> None:
    model = LLM(directory, max_model_len=64).llm_engine.model_config
    plenty = cpu_kv_cache_bytes(EngineConfig(directory), model, torch.float32)
    little = EngineConfig(directory, gpu_memory_utilization=1e-4)
    scarce = cpu_kv_cache_bytes(little, model, torch.float32)
    assert scarce < plenty <= CPU_KV_CACHE_BYTES
    half = cpu_kv_cache_bytes(little, model, torch.float16)
    assert half - scarce == 2 * model.num_parameters


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is measured instead")
def test_a_cpu_engine_has_the_blocks_of_its_longest_batch(directory: Path) -> None:
    engine = LLM(directory, max_model_len=50, block_size=8, max_num_seqs=6).llm_engine
    assert engine.block_pool.num_blocks == engine.executor.num_blocks == 6 * 7 + 1
    assert engine.kv_cache_tokens == 6 * 7 * 8


@pytest.mark.parametrize(
    "backend",
    [
        TorchAttention,
        pytest.param(
            TritonAttention,
            marks=pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here"),
        ),
    ],
)
@pytest.mark.parametrize(
    ("batched_tokens", "model_len", "max_num_seqs", "lens", "sampled"),
    [
        (20, 8, 4, [8, 8, 4], 4),
        (16, 8, 99, [8, 8], 16),  # no more requests than tokens
        (7, 64, 3, [7], 3),
    ],
)
def test_the_largest_step_is_as_large_as_the_engine_allows(
    directory: Path,
    backend: type,
    batched_tokens: int,
    model_len: int,
    max_num_seqs: int,
    lens: list[int],
    sampled: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = LLM(
        directory, max_model_len=64, dtype="float32", num_gpu_blocks_override=9
    ).llm_engine.executor.decoder.cpu()
    decoder.rope = decoder.rope.cpu()
    attention = backend(torch.device("cpu"))
    plans: list[AttentionMetadata] = []
    rows: list[int] = []
    plan, logits = attention.plan, decoder.logits
    monkeypatch.setattr(attention, "plan", lambda m: plans.append(m) or plan(m))
    monkeypatch.setattr(decoder, "logits", lambda h: rows.append(len(h)) or logits(h))
    config = EngineConfig(
        directory,
        block_size=4,
        max_num_batched_tokens=batched_tokens,
        max_num_seqs=max_num_seqs,
    )
    run_largest_step(decoder, attention, config, model_len)
    [metadata] = plans
    assert np.diff(metadata.query_start_loc).tolist() == metadata.context_lens.tolist() == lens
    assert metadata.block_tables.shape == (len(lens), -(-max(lens) // 4))
    assert rows == [sampled]


# On a GPU.


def save_zeros(name: str, directory: Path) -> Path:
    """A checkpoint of a model of the catalogue whose weights are all zero."""
    shape = yaml.safe_load((CATALOG_DIR / "models.yaml").read_text())[name]["config"]
    config = AutoConfig.for_model(**shape, rms_norm_eps=1e-5)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {
        name: torch.zeros(parameter.shape, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("utilization", [0.9, 0.5])
def test_on_a_gpu_the_capacity_is_the_one_predicted(utilization: float, tmp_path: Path) -> None:
    """By the sizing calculator, from the memory that the GPU has and others have taken."""
    directory = save_zeros("Llama-3.2-1B", tmp_path)
    gc.collect()
    torch.cuda.empty_cache()
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    others = total - free
    engine = LLM(directory, gpu_memory_utilization=utilization, max_num_seqs=64).llm_engine
    model = find_model("Llama-3.2-1B")
    predicted = kv_capacity(
        model,
        (total - others / utilization) / 1e9,
        utilization,
        activations_gb=peak_activations_gb(model, 2048, 64),
    )
    assert abs(engine.kv_cache_tokens / predicted.tokens - 1) < 0.03
    in_use = total - torch.cuda.mem_get_info()[0]
    assert in_use < utilization * total + 2**30  # graphs come on top
    del engine
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about the memory of a CPU")
def test_on_a_cpu_pages_take_memory_only_when_they_are_written(directory: Path) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    config = ModelConfig.from_pretrained(directory)
    decoder = Decoder(config, 64, torch.bfloat16, torch.device("cpu"))
    before = resident_bytes()
    cache = make_kv_cache(decoder, 2**16, 16)
    keys, values = cache[-1]
    total = len(cache) * 2 * keys.nbytes
    assert keys.shape == values.shape == (2**16, 16, config.num_kv_heads, config.head_dim)
    assert keys.dtype == torch.bfloat16 and total > 10**8
    assert resident_bytes() - before < total / 10
    keys[5] = 1.0
    assert keys[5].all() and not keys[4].any() and not values[5].any()
