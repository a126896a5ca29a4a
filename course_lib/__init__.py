"""A complete mini serving engine for large language models, small enough to read.

    from course_lib import LLM, SamplingParams
    LLM(model="data/models/merchant-chat").generate("Hello", SamplingParams(max_tokens=20))

Names are loaded on first use, so that importing a sub-package does not pull in PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from course_lib.engine.engine import LLMEngine
    from course_lib.engine.llm import LLM
    from course_lib.engine.outputs import CompletionOutput, RequestOutput
    from course_lib.engine.sampling_params import SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "course_lib.engine.llm",
    "LLMEngine": "course_lib.engine.engine",
    "SamplingParams": "course_lib.engine.sampling_params",
    "RequestOutput": "course_lib.engine.outputs",
    "CompletionOutput": "course_lib.engine.outputs",
}

__all__ = ["LLM", "CompletionOutput", "LLMEngine", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'course_lib' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
