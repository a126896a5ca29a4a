"""The door of a real fleet: one address before many replicas, and no accepted request is lost.

`Gateway` is an ASGI application. It hands each request to a replica through `dispatch`, whatever
that is made of. If the replica dies or drains before the client has got anything, the request is
sent again, so that whole answers always arrive. A stream that has begun cannot begin anew; it ends
with an error event.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from course_lib.model.tokenizer import Tokenizer
from course_lib.serving import responses
from course_lib.serving.errors import ApiError, as_api_error
from course_lib.serving.protocol import ChatCompletionRequest, CompletionRequest

logger = logging.getLogger(__name__)

#: A request that has taken so many replicas with it is not given to another one.
MAX_ATTEMPTS = 5

#: Headers of one connection only (RFC 9110, 7.6.1), and those that each server writes itself.
_NOT_FORWARDED = {
    b"connection", b"content-length", b"date", b"keep-alive", b"server", b"te", b"trailer",
    b"transfer-encoding", b"upgrade",
}  # fmt: skip

Headers = list[tuple[bytes, bytes]]


class ReplicaLost(Exception):
    """The replica that had the request is gone, and the rest of its answer with it."""


@dataclass(frozen=True)
class Call:
    """A request on its way to a replica.

    Args:
        method: such as POST.
        path: of the URL.
        query: of the URL.
        headers: by name in lower case.
        body: whole.
        arrived_s: when it came to the gateway, by the wall clock, which machines share.
        prompt_token_ids: for the router; empty if it has no prompt.
    """

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    arrived_s: float
    prompt_token_ids: Sequence[int] = field(default=(), repr=False)


@dataclass(frozen=True)
class Head:
    """How an answer begins; what follows are the blocks of its body."""

    status: int
    headers: Headers

    @property
    def is_stream(self) -> bool:
        """Whether its body is made of events."""
        return any(n == b"content-type" and b"event-stream" in v for n, v in self.headers)


Answer = AsyncGenerator[Head | bytes]


class Gateway:
    """An ASGI application that forwards to replicas.

    Args:
        dispatch: gives a call to a replica; its answer is a `Head`, then blocks. It raises
            `ReplicaLost` where the replica is gone, and `ApiError` where nobody takes the call.
        tokenizer: of the model, for the router.
        scrape: gives what `/metrics` of each replica says, by its name.
    """

    def __init__(
        self,
        dispatch: Callable[[Call], Answer],
        tokenizer: Tokenizer,
        scrape: Callable[[], Awaitable[Mapping[str, bytes]]],
    ) -> None:
        self.dispatch = dispatch
        self.tokenizer = tokenizer
        self.scrape = scrape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. `Guard` stands before it, so the body comes whole and bounded."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        body = (await receive())["body"]
        if scope["path"] == "/metrics":
            text = merged(await self.scrape())
            await Response(text, media_type="text/plain; version=0.0.4")(scope, receive, send)
            return
        arrived_s = time.time()
        tokens = await asyncio.to_thread(prompt_tokens, self.tokenizer, scope["path"], body)
        headers = [(n, v) for n, v in scope["headers"] if n not in _NOT_FORWARDED]
        call = Call(
            scope["method"], scope["path"], scope["query_string"], headers, body, arrived_s, tokens
        )
        for _ in range(MAX_ATTEMPTS):
            if await self._answered(call, send):
                return
        raise ApiError(
            503,
            f"{MAX_ATTEMPTS} replicas were lost one after the other with this request",
            kind="server_error",
            code="replica_lost",
        )

    async def _answered(self, call: Call, send: Send) -> bool:
        """Whether the client has its answer; if not, nothing has been sent to it."""
        async with aclosing(self.dispatch(call)) as answer:
            try:
                head = await anext(answer)
                assert isinstance(head, Head)
                if head.is_stream:
                    block = await anext(answer)
                else:
                    block = b"".join([part async for part in answer if isinstance(part, bytes)])
            except ReplicaLost:
                return False
            if _is_draining(head, block):
                return False
            await send(_start(head, block))
            if head.is_stream:
                await _forward(block, answer, send)
            else:
                await send({"type": "http.response.body", "body": block, "more_body": False})
        return True


async def _forward(first: Head | bytes, answer: Answer, send: Send) -> None:
    """The rest of a stream. If it breaks, an error event tells so: there is no silent end."""
    await send({"type": "http.response.body", "body": first, "more_body": True})
    try:
        async for block in answer:
            await send({"type": "http.response.body", "body": block, "more_body": True})
    except Exception as error:
        end = responses.event(_lost(error).body) + responses.DONE
        await send({"type": "http.response.body", "body": end, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _lost(error: Exception) -> ApiError:
    if not isinstance(error, ReplicaLost):
        logger.error("a stream broke with %s", type(error).__name__)
        return as_api_error(error)
    message = "the replica was lost in the middle of this answer; send the request again"
    return ApiError(503, message, kind="server_error", code="replica_lost")


def _start(head: Head, block: Head | bytes) -> Message:
    headers = [(n, v) for n, v in head.headers if n not in _NOT_FORWARDED]
    if not head.is_stream:
        assert isinstance(block, bytes)
        headers.append((b"content-length", str(len(block)).encode()))
    return {"type": "http.response.start", "status": head.status, "headers": headers}


def _is_draining(head: Head, block: Head | bytes) -> bool:
    """Whether a replica that leaves has handed the request back."""
    if head.status != 503 or not isinstance(block, bytes):
        return False
    try:
        return json.loads(block)["error"]["code"] == "draining"
    except (ValueError, TypeError, KeyError):
        return False


def merged(texts: Mapping[str, bytes]) -> bytes:
    """The metrics of all replicas as one text, in which the label `instance` says whose each is.

    A Prometheus that scrapes the gateway keeps the label with `honor_labels: true`.
    """
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            all_of_it = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                labels = {**sample.labels, "instance": replica}
                all_of_it.add_sample(sample.name, labels, sample.value)
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self.families = families

    def collect(self) -> list[Metric]:
        return self.families


def prompt_tokens(tokenizer: Tokenizer, path: str, body: bytes) -> list[int]:
    """The prompt as the replica will see it, the first one of several.

    Empty where there is none, or where the replica is going to refuse it.
    """
    try:
        if path == "/v1/chat/completions":
            messages = ChatCompletionRequest.model_validate_json(body).messages
            text = tokenizer.apply_chat_template([message.as_dict() for message in messages])
            return tokenizer.encode(text, add_special_tokens=False)
        if path == "/v1/completions":
            first = CompletionRequest.model_validate_json(body).prompts[0]
            return tokenizer.encode(first) if isinstance(first, str) else first
    except ValueError:
        pass
    return []


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
