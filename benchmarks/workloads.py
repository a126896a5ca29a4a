"""The models and the requests on which engines are compared.

Models are random checkpoints, written on the spot. All prompts are random tokens, greedy, and
generate exactly the tokens asked for. Imports nothing of the course, so that a peer's environment
can use it.
"""

import json
import random
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.shapes import SHAPES

#: Longest sequence of all workloads, in tokens.
MAX_MODEL_LEN = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True)
class Workload:
    """Requests that come all at once.

    Args:
        name: short.
        prompts: token ids.
        output_tokens: of each request.
        shared_prefix: whether prefix caching is of use.
    """

    name: str
    prompts: list[list[int]]
    output_tokens: list[int]
    shared_prefix: bool = False

    def with_other_tokens(self, vocab_size: int) -> "Workload":
        """The same lengths and the same sharing; what is cached of one is no use to the other."""
        prompts = [[(token + 1) % vocab_size for token in prompt] for prompt in self.prompts]
        return replace(self, prompts=prompts)


def workloads(vocab_size: int, device: str, only: list[str]) -> list[Workload]:
    """Those of these names. On a CPU: W1 a batch, W2 with a common prefix, W3 one stream."""
    made = {}
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    if device == "cuda":
        prompts = [tokens(rng.randint(100, 1024)) for _ in range(256)]
        made["G"] = Workload("G", prompts, [rng.randint(100, 1024) for _ in prompts])
    else:
        prompts = [tokens(rng.randint(32, 256)) for _ in range(64)]
        made["W1"] = Workload("W1", prompts, [rng.randint(16, 128) for _ in prompts])
        prefix = tokens(192)
        made["W2"] = Workload("W2", [prefix + tokens(32) for _ in range(64)], [32] * 64, True)
        made["W3"] = Workload("W3", [tokens(32)], [256])
    return [made[name] for name in only]


def version_of(package: str) -> str:
    """Of what is installed in this environment; vLLM's build for CPUs has a name of its own."""
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def write_checkpoint(shape: str, dtype: str, directory: Path) -> Path:
    """A checkpoint of random weights; needs torch, safetensors and transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = directory / f"{shape}-{dtype}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**SHAPES[shape], "torch_dtype": dtype}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
