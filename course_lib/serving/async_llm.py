"""The engine in a thread of its own, for callers on an event loop.

A step keeps the processor busy, so it never runs on the event loop. Commands travel to the engine's
thread through an inbox that is read between steps, outputs travel back to the loop once a step.
That is also what makes an abort safe: it takes effect between two steps, never within one.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from course_lib.engine.engine import LLMEngine, Prompt
from course_lib.engine.outputs import RequestOutput
from course_lib.engine.sampling_params import RequestOutputKind, SamplingParams
from course_lib.serving.admission import EngineLoad

logger = logging.getLogger(__name__)

#: Called on the engine's thread after each step, with the tokens it computed and its outputs.
StepListener = Callable[[int, list[RequestOutput]], None]


class EngineError(RuntimeError):
    """A step failed; the requests that were in flight have got no more tokens."""


class AsyncLLM:
    """Streams of outputs from an engine that steps on its own.

    Args:
        engine: from `start` on it belongs to the thread.
        on_step: hears of each step.
    """

    def __init__(self, engine: LLMEngine, on_step: StepListener | None = None) -> None:
        self.engine = engine
        self._on_step = on_step
        self._inbox: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        # Belongs to the loop: where the outputs of each request go, and what has been queued but
        # not yet read from the inbox, with its arrival.
        self._streams: dict[str, asyncio.Queue[RequestOutput | Exception]] = {}
        self._unread: dict[str, tuple[float, int]] = {}
        self._tokens_to_go: dict[str, int] = {}
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
        for stream in self._streams.values():
            stream.put_nowait(EngineError("the server is shutting down"))

    @property
    def num_unfinished(self) -> int:
        """Requests that somebody waits for."""
        return len(self._streams)

    def load(self) -> EngineLoad:
        """How busy the engine is. The lists are the thread's, so this may be a step behind."""
        scheduler, now = self.engine.scheduler, self.engine.clock()
        waiting = [(r.metrics.arrival_time, r.num_prompt_tokens) for r in list(scheduler.waiting)]
        waiting += list(self._unread.values())
        return EngineLoad(
            num_running=len(scheduler.running),
            max_num_seqs=scheduler.max_num_seqs,
            num_waiting=len(waiting),
            num_waiting_tokens=sum(tokens for _, tokens in waiting),
            oldest_waiting_age_s=max((now - arrival for arrival, _ in waiting), default=0.0),
            kv_cache_usage=self.engine.block_pool.usage,
        )

    def unfinished_request_ids(self) -> list[str]:
        """Requests that somebody waits for."""
        return list(self._streams)

    def remaining_s(self) -> dict[str, float]:
        """Seconds that each request still needs if it takes its longest reply.

        Tokens to go times the pace of the last steps; a waiting request's time in the queue comes
        on top and is not known.
        """
        return {
            request_id: tokens * self._seconds_per_step
            for request_id, tokens in self._tokens_to_go.items()
        }

    async def generate(
        self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0
    ) -> AsyncGenerator[RequestOutput]:
        """Yield what is new after each step, until the request has finished.

        Leaving the iteration early, also by cancellation, aborts the request.

        Raises:
            ValueError: the engine cannot serve it.
            EngineError: the engine failed on the way.
        """
        stream: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        arrival = self.engine.clock()
        params = replace(params, output_kind=RequestOutputKind.DELTA)
        self._streams[request_id] = stream
        self._unread[request_id] = (arrival, _num_tokens(prompt))
        self._tokens_to_go[request_id] = params.max_tokens or self.engine.max_model_len
        finished = False
        try:
            self._send(lambda: self._add(request_id, prompt, params, arrival, priority))
            while not finished:
                item = await stream.get()
                if isinstance(item, Exception):
                    finished = True
                    raise item
                finished = item.finished
                self._tokens_to_go[request_id] -= max(len(c.token_ids) for c in item.outputs)
                yield item
        finally:
            del self._streams[request_id], self._tokens_to_go[request_id]
            self._unread.pop(request_id, None)
            if not finished:
                self._send(lambda: self.engine.abort_request(request_id))

    def fail(self, request_id: str, error: Exception) -> None:
        """End a request with an error for the one who waits for it."""
        if request_id in self._streams:
            self._streams[request_id].put_nowait(error)
            self._send(lambda: self.engine.abort_request(request_id))

    def _send(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    # From here on, the engine's thread.

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self._stopping or self.engine.has_unfinished_requests()):
                    self._wake.wait()
                commands, self._inbox = self._inbox, []
            if self._stopping:
                return
            for command in commands:
                command()
            if self.engine.has_unfinished_requests():
                self._step()

    def _add(
        self, request_id: str, prompt: Prompt, params: SamplingParams, arrival: float, priority: int
    ) -> None:
        try:
            self.engine.add_request(
                request_id, prompt, params, arrival_time=arrival, priority=priority
            )
        except ValueError as error:
            self._to_loop(self._deliver, [(request_id, error)])
        self._to_loop(self._mark_read, request_id)

    def _step(self) -> None:
        stats, start = self.engine.scheduler.stats, self.engine.clock()
        before = stats.num_scheduled_tokens
        try:
            outputs = self.engine.step()
        except Exception as error:  # no traceback: logs do not show the server's files
            logger.error("a step failed with %s; its requests are aborted", type(error).__name__)
            failed = self.engine.unfinished_request_ids()
            self.engine.abort_request(failed)
            failure = EngineError("the engine failed while it computed this request")
            self._to_loop(self._deliver, [(request_id, failure) for request_id in failed])
            return
        step_s = self.engine.clock() - start
        self._seconds_per_step += (step_s - self._seconds_per_step) / 16
        if self._on_step is not None:
            self._on_step(stats.num_scheduled_tokens - before, outputs)
        if outputs:
            self._to_loop(self._deliver, [(output.request_id, output) for output in outputs])

    def _to_loop(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    # Back on the loop.

    def _deliver(self, items: list[tuple[str, RequestOutput | Exception]]) -> None:
        for request_id, item in items:
            if request_id in self._streams:  # nobody waits for an aborted one
                self._streams[request_id].put_nowait(item)

    def _mark_read(self, request_id: str) -> None:
        self._unread.pop(request_id, None)


def _num_tokens(prompt: Prompt) -> int:
    tokens = prompt.get("prompt_token_ids", ()) if isinstance(prompt, dict) else prompt
    return len(tokens)
