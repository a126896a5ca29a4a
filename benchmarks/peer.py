"""One engine in a process of its own, for `benchmarks/engine.py`: loads, runs, prints one line.

    python benchmarks/peer.py ENGINE FOLDER DTYPE cpu|cuda W1,W3

ENGINE is `ours`, `vllm`, `transformers` or `transformers-continuous`. The line is JSON: `ready_s`
from the start of the process to the first token, `peak_memory_gib` of the process, and for each
workload its output tokens a second. It runs in the course's environment or in that of the peers,
and imports only the engine that it is about.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A script's own folder is searched first, and there `kernels.py` would hide the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.workloads import MAX_MODEL_LEN, Workload, version_of, workloads

#: Prompts and, for each, the tokens to generate.
Generate = Callable[[list[list[int]], list[int]], Any]

STATIC_BATCH = 16
CONTINUOUS = {"page_size": 256, "num_blocks": 64, "max_batch_tokens": 512}


def vllm_style(
    llm_class: Any, params_class: Any, folder: str, shared_prefix: bool, device: str, **options: Any
) -> Generate:
    """Our `LLM` and vLLM's take the same arguments; each gets those that suit it best."""
    llm = llm_class(
        folder,
        max_model_len=MAX_MODEL_LEN[device],
        enable_prefix_caching=shared_prefix,
        load_format="auto" if has_weights(folder) else "dummy",
        **options,
    )

    def generate(prompts: list[list[int]], output_tokens: list[int]) -> None:
        params = [
            params_class(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in output_tokens
        ]
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    return generate


def has_weights(folder: str) -> bool:
    """Otherwise they are drawn at random: a large model need not be on disk."""
    return any(Path(folder).glob("*.safetensors"))


def ours(folder: str, dtype: str, device: str, shared_prefix: bool) -> Generate:
    from course_lib import LLM, SamplingParams

    size = 32 if shared_prefix else 16
    return vllm_style(
        LLM, SamplingParams, folder, shared_prefix, device, dtype=dtype, block_size=size
    )


def vllm(folder: str, dtype: str, device: str, shared_prefix: bool) -> Generate:
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    os.environ |= {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # two processes would share the cores
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"block_size": 32} if device == "cpu" else {}
    return vllm_style(
        LLM, SamplingParams, folder, shared_prefix, device, dtype=dtype, skip_tokenizer_init=True,
        **options,
    )  # fmt: skip


def load_transformers(folder: str, dtype: str, device: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if has_weights(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        return model.to(device).eval()
    with torch.device(device):
        config = AutoConfig.from_pretrained(folder)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def transformers(folder: str, dtype: str, device: str, shared_prefix: bool) -> Generate:
    """Static batches, left-padded, sorted by length so that little is padded.

    Each batch runs to its longest reply; only the tokens that were asked for count.
    """
    import torch

    model = load_transformers(folder, dtype, device)

    def generate(prompts: list[list[int]], output_tokens: list[int]) -> None:
        order = sorted(range(len(prompts)), key=lambda i: output_tokens[i])
        for first in range(0, len(order), STATIC_BATCH):
            chosen = order[first : first + STATIC_BATCH]
            width = max(len(prompts[i]) for i in chosen)
            ids = torch.zeros(len(chosen), width, dtype=torch.int64, device=device)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            longest = max(output_tokens[i] for i in chosen)
            model.generate(
                ids, attention_mask=mask, do_sample=False, min_new_tokens=longest,
                max_new_tokens=longest, pad_token_id=0,
            )  # fmt: skip

    return generate


def transformers_continuous(folder: str, dtype: str, device: str, shared_prefix: bool) -> Generate:
    """Its continuous batching, which makes the batches itself.

    On a CPU it is several times faster with a small KV cache than with the one that it chooses; of
    three sizes that were tried `CONTINUOUS` was the fastest.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = load_transformers(folder, dtype, device)
    options: dict[str, Any] = {
        "generation_config": GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        "continuous_batching_config": (
            ContinuousBatchingConfig(**CONTINUOUS) if device == "cpu" else None
        ),
    }

    def generate(prompts: list[list[int]], output_tokens: list[int]) -> None:
        with model.continuous_batching_context_manager(**options) as manager:
            for prompt, count in zip(prompts, output_tokens, strict=True):
                manager.add_request(prompt, max_new_tokens=count)
            left = len(prompts)
            while left:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching has stopped")
                left -= result is not None and result.is_finished()

    return generate


ENGINES: dict[str, Callable[[str, str, str, bool], Generate]] = {
    "ours": ours,
    "vllm": vllm,
    "transformers": transformers,
    "transformers-continuous": transformers_continuous,
}


def seconds_since_start() -> float:
    """Since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


def peak_memory_gib() -> float:
    """Of this process. `getrusage` would begin with what the one that started it held."""
    [line] = [s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s]
    return int(line.split()[1]) / 2**20


def rate(generate: Generate, workload: Workload) -> float:
    """Output tokens/s."""
    start = time.perf_counter()
    generate(workload.prompts, workload.output_tokens)
    return sum(workload.output_tokens) / (time.perf_counter() - start)


def main(engine: str, folder: str, dtype: str, device: str, names: str) -> None:
    vocab_size = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    todo = workloads(vocab_size, device, names.split(","))
    generate = ENGINES[engine](folder, dtype, device, todo[0].shared_prefix)
    generate([[1, 2, 3]], [1])
    result: dict[str, Any] = {"ready_s": seconds_since_start()}
    for workload in todo:
        if not engine.startswith("transformers"):  # it keeps nothing from one batch to the next
            rate(generate, workload.with_other_tokens(vocab_size))  # memory is touched, caches fill
        result[workload.name] = rate(generate, workload)
    result["peak_memory_gib"] = peak_memory_gib()
    result["version"] = "" if engine == "ours" else version_of(engine.split("-")[0])
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
