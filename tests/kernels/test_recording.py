"""Calls that were recorded are made again, and nothing else."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kernels import cpu
from kernels.cpu.recording import record

REASON = cpu.why_not(torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

WEIGHT = torch.linspace(0.5, 1.5, 16)


def norm(x: torch.Tensor) -> torch.Tensor:
    return cpu.rms_norm(x, WEIGHT, 1e-6)[0]


def test_a_replay_computes_with_what_the_inputs_hold_then() -> None:
    x = torch.randn(3, 16)
    replay = record(lambda: norm(norm(x)))
    for _ in range(3):
        x.normal_()
        assert torch.equal(replay(), norm(norm(x)))


def test_tensors_between_two_calls_are_kept() -> None:
    x = torch.randn(3, 16)
    replay = record(lambda: norm(norm(x)))
    gc.collect()
    others = [torch.full((3, 16), float("nan")) for _ in range(100)]  # would take free memory
    assert torch.equal(replay(), norm(norm(x)))
    assert all(other.isnan().all() for other in others)


def test_calls_of_other_threads_and_of_later_are_not_recorded() -> None:
    x, elsewhere, later = torch.randn(3, 3, 16)

    def run() -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            outputs.append(pool.submit(norm, elsewhere).result())
        return norm(x)

    outputs: list[torch.Tensor] = []
    replay = record(run)
    outputs.append(norm(later))
    for output in outputs:
        output.zero_()
    assert replay().any() and not any(output.any() for output in outputs)


def test_a_recording_that_fails_leaves_nothing_behind() -> None:
    def fails() -> torch.Tensor:
        norm(x)
        raise ZeroDivisionError

    x = torch.randn(3, 16)
    with pytest.raises(ZeroDivisionError):
        record(fails)
    assert torch.equal(record(lambda: norm(x))(), norm(x))


def test_a_recording_within_another_belongs_to_itself() -> None:
    x = torch.randn(3, 16)
    inner = []

    def run() -> torch.Tensor:
        inner.append(record(lambda: norm(x)))
        return norm(x)

    outer = record(run)
    x.normal_()
    assert torch.equal(outer(), norm(x)) and torch.equal(inner[0](), norm(x))
