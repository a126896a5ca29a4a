"""OpenAI's HTTP API over the engine, so that stock clients work unmodified.

`create_app` makes the FastAPI application of one `Replica`. A request is checked, rendered to
tokens, admitted, and then streams from the engine.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from course_lib.engine.engine import Prompt
from course_lib.engine.llm import LLM
from course_lib.engine.sampling_params import SamplingParams
from course_lib.serving.admission import AdmissionPolicy
from course_lib.serving.admission_base import AdmissionBase, Arrival
from course_lib.serving.answers import Answer, ChatAnswer, CompletionAnswer
from course_lib.serving.async_llm import AsyncLLM
from course_lib.serving.errors import ERROR_RESPONSES, ApiError, add_error_handlers
from course_lib.serving.guard import Guard
from course_lib.serving.lifecycle import DrainingError, DrainPolicy, Lifecycle, ReplicaState
from course_lib.serving.metrics import Metrics
from course_lib.serving.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    TokenizeRequest,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")


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
    admission: AdmissionBase = field(default_factory=AdmissionPolicy)
    drain_policy: DrainPolicy = field(default_factory=lambda: DrainPolicy(30.0, 5.0))
    api_key: str | None = None

    def __post_init__(self) -> None:
        engine = self.llm.llm_engine
        self.tokenizer = self.llm.get_tokenizer()
        self.max_model_len = engine.max_model_len
        self.metrics = Metrics(self.name, engine.max_model_len)
        self.engine = AsyncLLM(engine, self.metrics)
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
                f"there is no model {model[:200]!r} here; this server has {self.name!r}",
                code="model_not_found",
                param="model",
            )

    async def chat_tokens(
        self, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """The prompt that a conversation becomes."""
        as_dicts = [message.as_dict() for message in messages]
        prompt = await _in_thread(self.llm.chat_prompt, as_dicts, add_generation_prompt)
        return prompt["prompt_token_ids"]

    def room(self, prompts: Sequence[list[int]]) -> int:
        """Tokens of a reply that fit the model's context behind the longest of the prompts.

        Raises:
            ApiError: a prompt is empty or leaves no room.
        """
        if not all(prompts):
            raise ApiError(400, "the prompt is empty; give at least one token", param="prompt")
        longest = max(map(len, prompts))
        if longest >= self.max_model_len:
            raise self._too_long(f"the prompt has {longest} tokens")
        return self.max_model_len - longest

    def _too_long(self, what: str) -> ApiError:
        return ApiError(
            400,
            f"{what}; prompt and reply together may have {self.max_model_len}, the model's context",
            code="context_length_exceeded",
        )

    def admit(self, prompts: Sequence[list[int]], params: SamplingParams, arrival: Arrival) -> int:
        """The scheduler's priority for an admitted request.

        Raises:
            ApiError: it can never be served, or not now.
        """
        longest, max_tokens = max(map(len, prompts)), params.max_tokens or 0
        if longest + max_tokens > self.max_model_len:
            raise self._too_long(f"the prompt has {longest} tokens and max_tokens is {max_tokens}")
        try:
            self.lifecycle.check_open()
        except DrainingError:
            self.metrics.observe_rejection("draining")
            raise
        decision = self.admission.decide(arrival, self.engine.load(arrival.priority_class))
        if not decision.admitted:
            self.metrics.observe_rejection(decision.reason)
            raise ApiError(
                decision.status,
                decision.message,
                kind="rate_limit_error" if decision.status == 429 else "overloaded_error",
                code=decision.reason,
                headers={"Retry-After": str(decision.retry_after_s)},
            )
        self.metrics.observe_params(params)
        return decision.priority


def create_app(replica: Replica, warm_up_prompts: Sequence[Prompt] = ()) -> FastAPI:
    """The application of one replica. It becomes ready once the prompts have run."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        replica.engine.start()
        warm_up = asyncio.create_task(replica.lifecycle.warm_up(warm_up_prompts))
        yield
        warm_up.cancel()
        replica.engine.stop()

    app = FastAPI(title="gpu-serving-labs", lifespan=lifespan, responses=ERROR_RESPONSES)
    app.add_middleware(Guard, api_key=replica.api_key)
    add_error_handlers(app)
    _add_model_routes(app, replica)
    _add_text_routes(app, replica)
    _add_operation_routes(app, replica)
    return app


def _add_model_routes(app: FastAPI, replica: Replica) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """One or several replies to a conversation."""
        replica.check_model(body.model)
        tokens = await replica.chat_tokens(body.messages)
        params = _checked(body.params, replica.room([tokens]), replica.defaults)
        answer_id = replica.new_id("chatcmpl")
        answer = ChatAnswer(answer_id, replica.name, body, [tokens], params, replica.tokenizer)
        return await _answer(replica, answer, request)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continuations of one or several prompts."""
        replica.check_model(body.model)
        prompts = [
            await _in_thread(replica.tokenizer.encode, prompt)
            if isinstance(prompt, str)
            else prompt
            for prompt in body.prompts
        ]
        params = _checked(body.params, replica.room(prompts), replica.defaults)
        answer_id = replica.new_id("cmpl")
        answer = CompletionAnswer(answer_id, replica.name, body, prompts, params, replica.tokenizer)
        return await _answer(replica, answer, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is loaded."""
        card = {
            "id": replica.name,
            "object": "model",
            "created": replica.created,
            "owned_by": "gpu-serving-labs",
            "max_model_len": replica.max_model_len,
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
            tokens = await replica.chat_tokens(body.messages, body.add_generation_prompt)
        else:
            encode = replica.tokenizer.encode
            tokens = await _in_thread(encode, body.prompt, body.add_special_tokens)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": replica.max_model_len}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of tokens."""
        replica.check_model(body.model)
        vocab_size = replica.llm.llm_engine.model_config.vocab_size
        if any(token >= vocab_size for token in body.tokens):
            raise ApiError(400, f"tokens go from 0 to {vocab_size - 1}", param="tokens")
        return {"prompt": await _in_thread(replica.tokenizer.decode, body.tokens, False)}


def _add_operation_routes(app: FastAPI, replica: Replica) -> None:
    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """Whether the process and its engine live."""
        return Response(status_code=200 if replica.engine.is_alive else 503)

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

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(replica.metrics.text(), media_type="text/plain; version=0.0.4")


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Between text and tokens, off the event loop; what the caller did wrong becomes a 400."""
    return await asyncio.to_thread(_checked, function, *arguments)


def _checked(function: Callable[..., T], *arguments: Any) -> T:
    try:
        return function(*arguments)
    except ValueError as error:
        raise ApiError(400, str(error)) from None


async def _answer(replica: Replica, answer: Answer, request: Request) -> Response:
    """Run the prompts; the status is decided by the first output."""
    body, params, num_sequences = answer.body, answer.params, answer.params.n * len(answer.prompts)
    arrival = Arrival(
        tenant=request.headers.get("x-tenant", "default")[:200],
        priority_class=body.priority_class,
        prompt_tokens=sum(map(len, answer.prompts)),
        max_tokens=(params.max_tokens or 0) * num_sequences,
        num_sequences=num_sequences,
    )
    priority = replica.admit(answer.prompts, params, arrival)
    outputs = answer.outputs(replica.engine, priority)
    try:
        first = await anext(outputs)
    except ValueError as error:  # the engine cannot serve it
        raise ApiError(400, str(error)) from None
    if body.stream:
        return _EventStream(answer.events(first, outputs))
    return JSONResponse(await answer.whole(first, outputs))


class _EventStream(Response):
    """Server-sent events, each chunk written as it comes; the end, whatever it is, closes them."""

    def __init__(self, chunks: AsyncGenerator[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self.chunks = chunks
        self.init_headers(
            {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.chunks) as chunks:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
