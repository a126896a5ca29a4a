"""An OpenAI-compatible server that generates nothing and does what a test tells it to.

It is a real server on a real socket, in a thread. `StubServer.requests` holds what came in.
"""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

MODEL = "stub-model"


@dataclass
class Behaviour:
    """What the stub does with a request; each test changes what it is about."""

    first_token_s: float = 0.0
    token_s: float = 0.0
    usage: bool = True
    final_event: bool = True  # finish_reason and [DONE]
    break_after: int | None = None  # tokens, then the connection breaks
    error_after: int | None = None  # tokens, then an error event
    garbage: bool = False  # an event that is no JSON
    silent: bool = False  # no text, but a proper end
    refuse: list[int] = field(default_factory=list)  # statuses of the next requests, then 200
    refusal: str = "the queue is full"
    retry_after: str | None = "0"
    hang: bool = False  # no reply at all
    models: bool = True
    api_key: str | None = None
    tokens_per_chunk: int = 1


class StubServer:
    """Use it in a `with`; `url` is where it listens."""

    def __init__(self, **behaviour: Any) -> None:
        self.behaviour = Behaviour(**behaviour)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(self._app(), log_level="critical", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))

    def __enter__(self) -> "StubServer":
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            self._thread.join(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            wanted = self.behaviour.api_key
            if wanted and request.headers.get("authorization") != f"Bearer {wanted}":
                return JSONResponse({"error": {"message": "no key"}}, 401)
            listed = [{"id": MODEL}] if self.behaviour.models else []
            return JSONResponse({"data": listed})

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            return await self._answer(request, chat=False)

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            return await self._answer(request, chat=True)

        return app

    async def _answer(self, request: Request, chat: bool) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        do = self.behaviour
        if do.refuse:
            error = {"message": do.refusal, "type": "overloaded", "code": "queue_full"}
            headers = {} if do.retry_after is None else {"Retry-After": do.retry_after}
            return JSONResponse({"error": error}, do.refuse.pop(0), headers=headers)
        if do.hang:
            await asyncio.sleep(60)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return StreamingResponse(self._events(body, chat), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], chat: bool) -> AsyncIterator[str]:
        try:
            async for event in self._choices(body, chat):
                yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"
        finally:
            self.in_flight -= 1

    async def _choices(self, body: dict[str, Any], chat: bool) -> AsyncIterator[Any]:
        do = self.behaviour
        if chat:
            yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        if do.garbage:
            yield "{this is no JSON"
        await asyncio.sleep(do.first_token_s)
        for token in range(0, body["max_tokens"], do.tokens_per_chunk):
            if token == do.break_after:
                raise ConnectionAbortedError("as the test asked")
            if token == do.error_after:
                yield {"error": {"message": "the engine failed", "type": "EngineError"}}
                break
            text = "" if do.silent else " word"
            choice = {"delta": {"content": text}} if chat else {"text": text}
            yield {"choices": [{"index": 0, **choice, "finish_reason": None}]}
            await asyncio.sleep(do.token_s)
        if do.final_event:
            choice = {"delta": {}} if chat else {"text": ""}
            yield {"choices": [{"index": 0, **choice, "finish_reason": "length"}]}
        if do.usage and body.get("stream_options", {}).get("include_usage"):
            prompt = body["messages"][0]["content"] if chat else body["prompt"]
            size = len(prompt.split() if isinstance(prompt, str) else prompt)
            tokens = {"prompt_tokens": size, "completion_tokens": body["max_tokens"]}
            yield {"choices": [], "usage": tokens}
        if do.final_event:
            yield "[DONE]"
