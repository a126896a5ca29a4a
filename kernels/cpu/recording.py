"""Calls of kernels, and lists of calls that are made again.

    replay = record(lambda: decoder(step, kv_cache, attention))
    hidden = replay()  # after the contents of the step's tensors have changed

What a step of one size calls, and with which tensors, is the same every time if its inputs stay
where they are. For small steps most of the time is Python's, between the calls; a list of them
has none of that. It is to a CPU what a CUDA graph is to a GPU.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar

import torch

from kernels.cpu.build import kernels

#: A kernel, pointers and numbers to call it with, and the tensors that these point into, which must
#: not be given back.
Call = tuple[Callable[..., None], tuple[int | float | None, ...], object]

#: The calls of the recording that is going on in this thread, if there is one.
_recording: ContextVar[list[Call] | None] = ContextVar("recording", default=None)


def call(name: str, tensors: Sequence[torch.Tensor | None], *numbers: float) -> None:
    """Call a kernel of the first tensor's dtype: pointers first, then numbers."""
    assert tensors[0] is not None
    function = kernels()[name, tensors[0].dtype]
    arguments = (*[None if t is None else t.data_ptr() for t in tensors], *numbers)
    function(*arguments)
    calls = _recording.get()
    if calls is not None:
        calls.append((function, arguments, tensors))


def record(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Run something once, and make of it a function that makes the same calls again.

    Between the calls there must be nothing that computes: what PyTorch's operations did is not
    repeated. The function returns the same tensor each time, with other contents.
    """
    calls: list[Call] = []
    token = _recording.set(calls)
    try:
        result = run()
    finally:
        _recording.reset(token)

    def replay() -> torch.Tensor:
        for function, arguments, _ in calls:
            function(*arguments)
        return result

    return replay
