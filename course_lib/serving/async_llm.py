"""The engine in a thread of its own, for callers on an event loop.

A step keeps the processor busy, so it never runs on the event loop. Commands travel to the engine's
thread through an inbox that is read between steps, outputs travel back to the loop once a step.
That is also what makes an abort safe: it takes effect between two steps, never within one.
"""

import asyncio
import heapq
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from course_lib.engine.engine import LLMEngine, Prompt
from course_lib.engine.outputs import RequestOutput
from course_lib.engine.request import RequestStatus
from course_lib.engine.sampling_params import RequestOutputKind, SamplingParams
from course_lib.serving.admission_base import EngineLoad, PriorityClass

logger = logging.getLogger(__name__)


class EngineError(RuntimeError):
    """A step failed; the requests that were in flight have got no more tokens."""


class Listener(Protocol):
    """Hears on the engine's thread what becomes of the requests."""

    def observe_step(self, num_tokens: int, outputs: list[RequestOutput]) -> None:
        """A step has computed so many tokens, and this came out."""

    def observe_loss(self, reason: str) -> None:
        """A request ended before its last token: "abort" or "error"."""


@dataclass
class _Stream:
    """A request that somebody waits for. Belongs to the loop."""

    arrival_time: float
    num_prompt_tokens: int
    num_sequences: int
    tokens_to_go: int
    priority_class: PriorityClass
    in_engine: bool = False  # the thread has read it from the inbox
    outputs: asyncio.Queue[RequestOutput | Exception] = field(default_factory=asyncio.Queue)


class AsyncLLM:
    """Streams of outputs from an engine that steps on its own.

    Args:
        engine: from `start` on it belongs to the thread.
        listener: hears of each step.
    """

    def __init__(self, engine: LLMEngine, listener: Listener | None = None) -> None:
        self.engine = engine
        self._listener = listener
        self._inbox: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, _Stream] = {}
        self._seconds_per_step = 0.0  # a moving average

    def start(self) -> None:
        """Begin to step; call it on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in. Requests that are not done get an error."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._deliver([(name, EngineError("the engine has stopped")) for name in self._streams])

    @property
    def is_alive(self) -> bool:
        """Whether requests are being computed."""
        return self._thread.is_alive() and not self._stopping

    @property
    def num_unfinished(self) -> int:
        """Requests that somebody waits for."""
        return len(self._streams)

    def load(self, priority_class: PriorityClass = "interactive") -> EngineLoad:
        """How busy the engine is for a request of that class.

        To a batch request only batch requests are in the queue: the interactive ones go before it
        anyway, and a queue that is full of them must not keep it out for ever. The lists are the
        thread's, so this may be a step behind.
        """
        scheduler, now = self.engine.scheduler, self.engine.clock()
        waiting = list(scheduler.waiting)
        unread = [stream for stream in self._streams.values() if not stream.in_engine]
        # One that was preempted has had its turn; it waits for blocks, not in the queue.
        arrivals = [r.metrics.arrival_time for r in waiting if r.status is RequestStatus.WAITING]
        arrivals += [stream.arrival_time for stream in unread]
        if priority_class == "batch":
            waiting = [request for request in waiting if self._is_batch(request.request_id)]
            unread = [stream for stream in unread if stream.priority_class == "batch"]
        return EngineLoad(
            num_running=len(scheduler.running),
            max_num_seqs=scheduler.max_num_seqs,
            num_waiting=len(waiting) + sum(stream.num_sequences for stream in unread),
            num_waiting_tokens=sum(request.num_prompt_tokens for request in waiting)
            + sum(stream.num_prompt_tokens * stream.num_sequences for stream in unread),
            oldest_waiting_age_s=now - min(arrivals, default=now),
            kv_cache_usage=self.engine.block_pool.usage,
        )

    def _is_batch(self, request_id: str) -> bool:
        # The engine numbers the completions of a request: "0_name", "1_name".
        stream = self._streams.get(request_id) or self._streams.get(request_id.partition("_")[2])
        return stream is not None and stream.priority_class == "batch"

    def unfinished_request_ids(self) -> list[str]:
        """Requests that somebody waits for."""
        return list(self._streams)

    def remaining_s(self) -> dict[str, float]:
        """Seconds that each request still needs if it takes its longest reply.

        Each takes a slot in the order of arrival, as soon as one is free, and moves on by a token
        a step, at the pace of the last steps.
        """
        slots = [0] * self.engine.scheduler.max_num_seqs  # when each is free, in steps
        remaining_s = {}
        for request_id, stream in self._streams.items():
            for _ in range(stream.num_sequences):
                end = slots[0] + stream.tokens_to_go
                heapq.heapreplace(slots, end)
            remaining_s[request_id] = end * self._seconds_per_step
        return remaining_s

    async def generate(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        priority: int = 0,
        priority_class: PriorityClass = "interactive",
    ) -> AsyncGenerator[RequestOutput]:
        """Yield what is new after each step, until the request has finished.

        Leaving the iteration early, also by cancellation, aborts the request.

        Args:
            request_id: unique among unfinished requests.
            prompt: text or tokens.
            params: options.
            priority: the scheduler's; smaller is served first.
            priority_class: what `load` counts it as while it waits.

        Raises:
            ValueError: the engine cannot serve it.
            EngineError: the engine failed on the way.
        """
        if not self.is_alive:
            raise EngineError("the engine has stopped")
        if request_id in self._streams:
            raise ValueError(f"request id {request_id!r} is in use; give each request its own")
        params = replace(params, output_kind=RequestOutputKind.DELTA)
        stream = _Stream(
            arrival_time=self.engine.clock(),
            num_prompt_tokens=_num_tokens(prompt),
            num_sequences=params.n,
            tokens_to_go=params.max_tokens or self.engine.max_model_len,
            priority_class=priority_class,
        )
        self._streams[request_id] = stream
        finished = False
        try:
            self._send(lambda: self._add(request_id, prompt, params, stream, priority))
            while not finished:
                item = await stream.outputs.get()
                if isinstance(item, Exception):
                    finished = True
                    raise item
                finished = item.finished
                stream.tokens_to_go -= max(len(piece.token_ids) for piece in item.outputs)
                yield item
        finally:
            del self._streams[request_id]
            if not finished:
                self._send(lambda: self._abort(request_id, "abort"))

    def fail(self, request_id: str, error: Exception) -> None:
        """End a request with an error for the one who waits for it."""
        if request_id in self._streams:
            self._deliver([(request_id, error)])
            self._send(lambda: self._abort(request_id, "error"))

    def _send(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _deliver(self, items: list[tuple[str, RequestOutput | Exception]]) -> None:
        for request_id, item in items:
            stream = self._streams.get(request_id)
            if stream is not None:  # nobody waits for an aborted one
                stream.outputs.put_nowait(item)

    # From here on, the engine's thread.

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (
                        self._inbox or self._stopping or self.engine.has_unfinished_requests()
                    ):
                        self._wake.wait()
                    commands, self._inbox = self._inbox, []
                if self._stopping:
                    return
                for command in commands:
                    command()
                if self.engine.has_unfinished_requests():
                    self._step()
        except Exception as error:  # the books are broken, as by a part with a mistake
            logger.error("the engine has stopped with %s", _describe(error))
            self._stopping = True
            self._to_loop(self.stop)

    def _add(
        self, request_id: str, prompt: Prompt, params: SamplingParams, stream: _Stream, rank: int
    ) -> None:
        try:
            self.engine.add_request(
                request_id, prompt, params, arrival_time=stream.arrival_time, priority=rank
            )
        except ValueError as error:
            self._to_loop(self._deliver, [(request_id, error)])
        stream.in_engine = True

    def _abort(self, request_id: str, reason: str) -> None:
        if request_id in self.engine.unfinished_request_ids():
            self.engine.abort_request(request_id)
            if self._listener is not None:
                self._listener.observe_loss(reason)

    def _step(self) -> None:
        stats, start = self.engine.scheduler.stats, self.engine.clock()
        before = stats.num_scheduled_tokens
        try:
            outputs = self.engine.step()
        except Exception as error:
            logger.error("a step failed with %s; its requests end here", _describe(error))
            failure = EngineError("the engine failed while it computed this request")
            failed = self.engine.unfinished_request_ids()
            for request_id in failed:
                self._abort(request_id, "error")
            self._to_loop(self._deliver, [(request_id, failure) for request_id in failed])
            return
        step_s = self.engine.clock() - start
        weight = 1 / 16 if self._seconds_per_step else 1.0
        self._seconds_per_step += weight * (step_s - self._seconds_per_step)
        if self._listener is not None:
            self._listener.observe_step(stats.num_scheduled_tokens - before, outputs)
        if outputs:
            self._to_loop(self._deliver, [(output.request_id, output) for output in outputs])

    def _to_loop(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _num_tokens(prompt: Prompt) -> int:
    tokens = prompt.get("prompt_token_ids", ()) if isinstance(prompt, dict) else prompt
    return len(tokens)


def _describe(error: Exception) -> str:
    """Kind of an error and the function it was raised in; logs do not show the server's files."""
    traceback, function = error.__traceback__, ""
    while traceback is not None:
        function, traceback = traceback.tb_frame.f_code.co_qualname, traceback.tb_next
    return f"{type(error).__name__} in {function}"
