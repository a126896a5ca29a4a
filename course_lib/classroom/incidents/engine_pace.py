"""How fast the engine is on one core of this machine: conditions for it are sized by that."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from course_lib.classroom.incidents.conditions import BLOCK_SIZE, Pace
from course_lib.data import DEFAULT_MODEL
from course_lib.engine.config import EngineConfig
from course_lib.engine.engine import LLMEngine
from course_lib.fleet.calibration import ComputingClock, calibrate

SEATS = ((5, 6), (4, 8))
#: Tokens before the one that is decoded, in a typical request: these are read too.
CONTEXT_TOKENS = 128


@cache
def engine_pace() -> Pace:
    """Of the model that ships, in float32 on one core of this machine: measured, once."""
    full = max(max(seats) for seats in SEATS)
    with one_core():
        engine = LLMEngine(
            EngineConfig(
                DEFAULT_MODEL, max_model_len=1024, block_size=BLOCK_SIZE, max_num_seqs=full
            ),
            clock=ComputingClock(),
        )
        measured = calibrate(engine, max_users=full, max_prompt_tokens=256).step_time
    decode_s = measured.decode_request_s + CONTEXT_TOKENS * measured.context_token_s
    return Pace(
        step_s=measured.step_s,
        decode_s=decode_s,
        prefill_token_s=measured.prefill_token_s,
        chat_tokens=(16, 48),
        reply_tokens=(20, 36),
        max_model_len=2200,
        seats=SEATS,
        long_tokens=((1500, 2000), (2400, 3200)),
    )


@contextmanager
def one_core() -> Iterator[None]:
    """PyTorch and the kernels compute in one thread meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
