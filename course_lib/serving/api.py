"""OpenAI's HTTP API over the engine, so that stock clients work unmodified.

`create_app` makes the FastAPI application of one `Replica`. A request is checked, rendered to
tokens, admitted, and then streams from the engine; a client that goes away takes its request with
it. Whatever goes wrong is answered in OpenAI's error shape.
"""

import asyncio
import hmac
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from course_lib.engine.llm import LLM
from course_lib.engine.outputs import CompletionOutput, RequestOutput
from course_lib.engine.sampling_params import SamplingParams
from course_lib.serving import responses
from course_lib.serving.admission import AdmissionDecision, AdmissionPolicy, Arrival
from course_lib.serving.async_llm import AsyncLLM, EngineError
from course_lib.serving.lifecycle import DrainingError, DrainPolicy, Lifecycle, ReplicaState
from course_lib.serving.metrics import Metrics
from course_lib.serving.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingBody,
    TokenizeRequest,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Largest request body.
MAX_BODY_BYTES = 4 * 2**20


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = responses.error_body(message, kind, code, param)
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}

    def response(self) -> Response:
        """For a request whose answer has not begun."""
        return JSONResponse(self.body, self.status, self.headers)


@dataclass
class Replica:
    """One engine and all that stands between it and its clients.

    Args:
        llm: the model.
        name: the model's name in the API.
        admission: who gets in.
        drain_policy: who may finish when the replica leaves.
        api_key: clients must show it, if there is one.
    """

    llm: LLM
    name: str
    admission: AdmissionPolicy = field(default_factory=AdmissionPolicy)
    drain_policy: DrainPolicy = field(default_factory=lambda: DrainPolicy(30.0, 5.0))
    api_key: str | None = None

    def __post_init__(self) -> None:
        engine = self.llm.llm_engine
        self.metrics = Metrics(self.name, engine.max_model_len)
        self.engine = AsyncLLM(engine, self.metrics.observe_step)
        self.metrics.watch(self.engine)
        self.lifecycle = Lifecycle(self.engine, self.drain_policy)
        self.defaults = self.llm.get_default_sampling_params()
        self.created = int(time.time())
        self._ids = itertools.count()

    def new_id(self, prefix: str) -> str:
        """A name for a request."""
        return f"{prefix}-{self.created:x}-{next(self._ids)}"

    def check_model(self, model: str | None) -> None:
        """Only the model that is loaded can be asked for: nothing is loaded by name or path."""
        if model is not None and model != self.name:
            raise ApiError(
                404,
                f"there is no model {model!r} here; this server has {self.name!r}",
                code="model_not_found",
                param="model",
            )

    def admit(self, prompts: Sequence[list[int]], params: SamplingParams, arrival: Arrival) -> int:
        """The scheduler's priority for an admitted request.

        Raises:
            ApiError: it can never be served, or not now.
        """
        longest = self.llm.llm_engine.max_model_len
        for prompt in prompts:
            wanted = len(prompt) + (params.max_tokens or 0)
            if wanted > longest:
                raise ApiError(
                    400,
                    f"the prompt has {len(prompt)} tokens and {params.max_tokens} are asked for; "
                    f"together at most {longest} fit the model's context",
                    code="context_length_exceeded",
                )
        self.lifecycle.check_open()
        decision = self.admission.decide(arrival, self.engine.load())
        if not decision.admitted:
            self.metrics.observe_rejection(decision.reason)
            raise _refusal(decision)
        self.metrics.observe_params(params)
        return decision.priority


def _refusal(decision: AdmissionDecision) -> ApiError:
    kind = "rate_limit_error" if decision.status == 429 else "overloaded_error"
    return ApiError(
        decision.status,
        decision.message,
        kind=kind,
        code=decision.reason,
        retry_after_s=decision.retry_after_s,
    )


def create_app(replica: Replica, warm_up_prompts: Sequence[Any] = ()) -> FastAPI:
    """The application of one replica. It becomes ready once the prompts have run."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        replica.engine.start()
        warm_up = asyncio.create_task(replica.lifecycle.warm_up(warm_up_prompts))
        yield
        warm_up.cancel()
        replica.engine.stop()

    app = FastAPI(title="gpu-serving-labs", lifespan=lifespan)
    app.add_middleware(Guard, api_key=replica.api_key)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(DrainingError, _on_draining)
    app.add_exception_handler(EngineError, _on_engine_error)
    _add_model_routes(app, replica)
    _add_text_routes(app, replica)
    _add_operation_routes(app, replica)
    return app


def _add_model_routes(app: FastAPI, replica: Replica) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """One or several replies to a conversation."""
        replica.check_model(body.model)
        messages = [message.as_dict() for message in body.messages]
        prompt = await _render(replica.llm.chat_prompt, messages)
        tokens = prompt["prompt_token_ids"]
        room = max(1, replica.llm.llm_engine.max_model_len - len(tokens))
        params = _checked(body.params, room, replica.defaults)
        return await _answer(_ChatAnswer(replica, body, [tokens], params), request)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continuations of one or several prompts."""
        replica.check_model(body.model)
        prompts = [
            await _render(replica.llm.get_tokenizer().encode, prompt)
            if isinstance(prompt, str)
            else prompt
            for prompt in body.prompts
        ]
        if not all(prompts):
            raise ApiError(400, "the prompt is empty; give at least one token", param="prompt")
        longest = max(map(len, prompts))
        room = max(1, replica.llm.llm_engine.max_model_len - longest)
        params = _checked(body.params, room, replica.defaults)
        return await _answer(_CompletionAnswer(replica, body, prompts, params), request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is loaded."""
        card = {
            "id": replica.name,
            "object": "model",
            "created": replica.created,
            "owned_by": "gpu-serving-labs",
            "max_model_len": replica.llm.llm_engine.max_model_len,
        }
        return {"object": "list", "data": [card]}


def _add_text_routes(app: FastAPI, replica: Replica) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a prompt or of a conversation."""
        replica.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages")
        if body.messages is not None:
            messages = [message.as_dict() for message in body.messages]
            prompt = await _render(replica.llm.chat_prompt, messages, body.add_generation_prompt)
            tokens = prompt["prompt_token_ids"]
        else:
            encode = replica.llm.get_tokenizer().encode
            tokens = await _render(encode, body.prompt, body.add_special_tokens)
        longest = replica.llm.llm_engine.max_model_len
        return {"tokens": tokens, "count": len(tokens), "max_model_len": longest}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of tokens."""
        replica.check_model(body.model)
        vocab_size = replica.llm.llm_engine.model_config.vocab_size
        if any(token >= vocab_size for token in body.tokens):
            raise ApiError(400, f"tokens go from 0 to {vocab_size - 1}", param="tokens")
        decode = replica.llm.get_tokenizer().decode
        return {"prompt": await _render(decode, body.tokens, False)}


def _add_operation_routes(app: FastAPI, replica: Replica) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether the process lives."""
        return Response(status_code=200)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether the replica belongs in the rotation."""
        state = replica.lifecycle.state
        return JSONResponse({"status": state.value}, 200 if state is ReplicaState.READY else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The course's version."""
        from importlib.metadata import version as installed

        return {"version": installed("gpu-serving-labs")}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(replica.metrics.text(), media_type="text/plain; version=0.0.4")


async def _render(function: Any, *arguments: Any) -> Any:
    """Text to tokens, off the event loop; what the caller did wrong becomes a 400."""
    try:
        return await asyncio.to_thread(function, *arguments)
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def _checked(make: Any, *arguments: Any) -> SamplingParams:
    try:
        return make(*arguments)
    except ValueError as error:
        raise ApiError(400, str(error)) from None


# An answer, whole or streamed.


class _Answer:
    """What both endpoints share: prompts through the engine, pieces of choices out of it."""

    prefix: str
    kind: str

    def __init__(
        self,
        replica: Replica,
        body: SamplingBody,
        prompts: list[list[int]],
        params: SamplingParams,
    ) -> None:
        self.replica, self.body = replica, body
        self.prompts, self.params = prompts, params
        self.id = replica.new_id(self.prefix)
        self.num_completion_tokens = self.num_cached_tokens = 0
        self.head = {
            "id": self.id,
            "object": self.kind,
            "created": int(time.time()),
            "model": replica.name,
        }

    async def outputs(self, priority: int) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """What is new of each prompt, with the prompt's index."""
        if len(self.prompts) == 1:
            async with aclosing(self._stream(0, priority)) as stream:
                async for output in stream:
                    yield 0, output
            return
        merged: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue()

        async def forward(index: int) -> None:
            try:
                async with aclosing(self._stream(index, priority)) as stream:
                    async for output in stream:
                        merged.put_nowait((index, output))
                merged.put_nowait((index, None))
            except Exception as error:
                merged.put_nowait((index, error))

        tasks = [asyncio.create_task(forward(index)) for index in range(len(self.prompts))]
        try:
            running = len(tasks)
            while running:
                index, item = await merged.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield index, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stream(self, index: int, priority: int) -> AsyncGenerator[RequestOutput]:
        prompt = {"prompt_token_ids": self.prompts[index], "cache_salt": self.body.cache_salt}
        request_id = f"{self.id}-{index}"
        finished = False
        try:
            stream = self.replica.engine.generate(request_id, prompt, self.params, priority)
            async with aclosing(stream):
                async for output in stream:
                    finished = output.finished
                    yield output
        except ValueError as error:  # the engine cannot serve it
            finished = True
            raise ApiError(400, str(error)) from None
        except (DrainingError, EngineError):
            finished = True
            self.replica.metrics.observe_loss(request_id, "error")
            raise
        finally:
            if not finished:
                self.replica.metrics.observe_loss(request_id, "abort")

    def count(self, output: RequestOutput) -> None:
        """Keep the usage."""
        self.num_completion_tokens += sum(len(piece.token_ids) for piece in output.outputs)
        if output.finished:
            self.num_cached_tokens += output.num_cached_tokens

    @property
    def usage(self) -> responses.Json:
        """Tokens so far."""
        num_prompt_tokens = sum(map(len, self.prompts))
        return responses.usage(
            num_prompt_tokens, self.num_completion_tokens, self.num_cached_tokens
        )

    def whole(self, outputs: list[tuple[int, RequestOutput]]) -> responses.Json:
        """The body of an answer that is not streamed."""
        pieces: dict[tuple[int, int], list[CompletionOutput]] = {}
        firsts: dict[int, RequestOutput] = {}
        for prompt_index, output in outputs:
            self.count(output)
            firsts.setdefault(prompt_index, output)
            for piece in output.outputs:
                pieces.setdefault((prompt_index, piece.index), []).append(piece)
        choices = [
            self.choice(self.choice_index(i, j), responses.merge(found), firsts[i])
            for (i, j), found in sorted(pieces.items())
        ]
        return {**self.head, "choices": choices, "usage": self.usage}

    def choice_index(self, prompt_index: int, index: int) -> int:
        """Choices are numbered through all prompts."""
        return prompt_index * self.params.n + index

    def choice(
        self, index: int, completion: CompletionOutput, first: RequestOutput
    ) -> responses.Json:
        """A finished choice. `first` is the prompt's first output, which has its logprobs."""
        raise NotImplementedError

    def piece(self, index: int, piece: CompletionOutput, output: RequestOutput) -> responses.Json:
        """What is new of a choice, for the stream."""
        raise NotImplementedError

    def opening(self) -> list[responses.Json]:
        """Choices of events before the first token."""
        return []

    async def events(
        self, first: tuple[int, RequestOutput], rest: AsyncGenerator[tuple[int, RequestOutput]]
    ) -> AsyncGenerator[bytes]:
        """The stream, from its first output on. It always ends with a final event."""
        try:
            async with aclosing(rest):
                for choice in self.opening():
                    yield responses.event({**self.head, "choices": [choice]})
                for event in self._events(*first):
                    yield event
                async for index, output in rest:
                    for event in self._events(index, output):
                        yield event
        except (ApiError, DrainingError, EngineError) as error:
            yield responses.event(_as_api_error(error).body)
        else:
            if self.body.include_usage:
                yield responses.event({**self.head, "choices": [], "usage": self.usage})
        yield responses.DONE

    def _events(self, prompt_index: int, output: RequestOutput) -> list[bytes]:
        self.count(output)
        return [
            responses.event(
                {
                    **self.head,
                    "choices": [
                        self.piece(self.choice_index(prompt_index, piece.index), piece, output)
                    ],
                }
            )
            for piece in output.outputs
            if piece.token_ids or piece.finish_reason is not None
        ]


class _ChatAnswer(_Answer):
    prefix, kind = "chatcmpl", "chat.completion"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.body.stream:
            self.head["object"] = "chat.completion.chunk"

    def _logprobs(self, piece: CompletionOutput) -> responses.Json | None:
        if piece.logprobs is None:
            return None
        return responses.chat_logprobs(piece.token_ids, piece.logprobs, self.params.logprobs or 0)

    def choice(
        self, index: int, completion: CompletionOutput, first: RequestOutput
    ) -> responses.Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self._logprobs(completion),
            "finish_reason": completion.finish_reason,
        }

    def opening(self) -> list[responses.Json]:
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(self.params.n)
        ]

    def piece(self, index: int, piece: CompletionOutput, output: RequestOutput) -> responses.Json:
        return {
            "index": index,
            "delta": {"content": piece.text},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }


class _CompletionAnswer(_Answer):
    prefix, kind = "cmpl", "text_completion"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._num_chars: dict[int, int] = {}  # of each choice, sent so far

    def choice(
        self, index: int, completion: CompletionOutput, first: RequestOutput
    ) -> responses.Json:
        return {
            "index": index,
            "text": self._echo(index) + completion.text,
            "logprobs": self._logprobs(index, completion, first, echoed=True),
            "finish_reason": completion.finish_reason,
        }

    def piece(self, index: int, piece: CompletionOutput, output: RequestOutput) -> responses.Json:
        is_first = index not in self._num_chars
        logprobs = self._logprobs(index, piece, output, echoed=is_first)
        text = (self._echo(index) if is_first else "") + piece.text
        self._num_chars[index] = self._num_chars.get(index, 0) + len(text)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    def _echo(self, index: int) -> str:
        """The prompt's text, if it was asked for."""
        assert isinstance(self.body, CompletionRequest)
        if not self.body.echo:
            return ""
        prompt = self.body.prompts[index // self.params.n]
        if isinstance(prompt, str):
            return prompt
        return self._decode(prompt)

    def _logprobs(
        self, index: int, piece: CompletionOutput, output: RequestOutput, echoed: bool
    ) -> responses.Json | None:
        if piece.logprobs is None:
            return None
        token_ids: list[int] = piece.token_ids
        logprobs: list[Any] = list(piece.logprobs)
        if echoed and output.prompt_logprobs:
            token_ids = [*output.prompt_token_ids, *token_ids]
            logprobs = [*output.prompt_logprobs, *logprobs]
        offset = self._num_chars.get(index, 0)
        return responses.completion_logprobs(
            token_ids,
            logprobs,
            self.params.logprobs or 0,
            offset,
            lambda token: self._decode([token]),
        )

    def _decode(self, tokens: list[int]) -> str:
        return self.replica.llm.get_tokenizer().decode(tokens, False)


async def _answer(answer: _Answer, request: Request) -> Response:
    """Run the prompts; the status is decided by the first output."""
    replica, body = answer.replica, answer.body
    arrival = Arrival(
        tenant=request.headers.get("x-tenant", "default")[:200],
        priority_class="batch" if body.is_batch else "interactive",
        prompt_tokens=sum(map(len, answer.prompts)),
        max_tokens=(answer.params.max_tokens or 0) * answer.params.n * len(answer.prompts),
    )
    priority = replica.admit(answer.prompts, answer.params, arrival)
    outputs = answer.outputs(priority)
    if not body.stream:

        async def collect() -> list[tuple[int, RequestOutput]]:
            async with aclosing(outputs):
                return [item async for item in outputs]

        return JSONResponse(answer.whole(await _unless_gone(request, collect())))

    async def begin() -> tuple[int, RequestOutput]:
        return await anext(outputs)

    first = await _unless_gone(request, begin())
    return StreamingResponse(answer.events(first, outputs), media_type="text/event-stream")


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away first."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# What goes wrong.


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DrainingError):
        return ApiError(
            503, str(error), kind="overloaded_error", code="draining",
            retry_after_s=error.retry_after_s,
        )  # fmt: skip
    return ApiError(503, str(error), kind="server_error", code="engine_error", retry_after_s=1)


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_draining(_: Request, error: Exception) -> Response:
    return _as_api_error(error).response()


async def _on_engine_error(_: Request, error: Exception) -> Response:
    return _as_api_error(error).response()


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    api_error = ApiError(error.status_code, str(error.detail))
    api_error.headers = dict(error.headers or {})
    return api_error.response()


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
    message = f"{place}: {first['msg']}" if place else str(first["msg"])
    return ApiError(400, message[:1000], param=place or None).response()


class Guard:
    """The outermost layer: API key, size of the body, and no traceback for anybody.

    Args:
        app: what it guards.
        api_key: must be shown as a bearer token for everything but health and metrics.
    """

    OPEN = frozenset({"/health", "/ready", "/metrics", "/version"})

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app = app
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            self._check(scope["path"], headers)
            limited = _Limited(receive)
            await self.app(scope, limited, watched_send)
        except ApiError as error:
            if not started:
                await error.response()(scope, receive, send)
        except Exception as error:
            logger.error("a request failed with %s", type(error).__name__)
            if not started:
                answer = ApiError(500, "the server failed on this request", kind="server_error")
                await answer.response()(scope, receive, send)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.expected is not None and path not in self.OPEN:
            shown = headers.get(b"authorization", b"")
            if not hmac.compare_digest(shown, self.expected):
                raise ApiError(
                    401, "a valid API key is needed: Authorization: Bearer ...",
                    kind="authentication_error", code="invalid_api_key",
                )  # fmt: skip
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            raise _too_large()


class _Limited:
    """`receive` that stops a body which is longer than allowed, whatever its headers say."""

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self.num_bytes = 0

    async def __call__(self) -> Message:
        message = await self.receive()
        self.num_bytes += len(message.get("body", b""))
        if self.num_bytes > MAX_BODY_BYTES:
            raise _too_large()
        return message


def _too_large() -> ApiError:
    return ApiError(413, f"the body must be at most {MAX_BODY_BYTES} bytes", code="too_large")
