"""What surrounds the application: who may ask, how much, and until when.

The body is read here, whole and bounded, before anything else sees it. From then on a client that
closes its connection takes its request with it, whatever that is doing. No error passes: the
client gets a sentence, and the log gets the kind of the error without the server's files.
"""

import asyncio
import hmac
import logging
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from course_lib.serving.errors import ApiError, as_api_error
from course_lib.serving.lifecycle import DrainingError

logger = logging.getLogger(__name__)

#: Largest request body.
MAX_BODY_BYTES = 4 * 2**20
#: A larger one is read up to here before it is refused: few clients read while they still send.
_MAX_DISCARDED_BYTES = 64 * 2**20


class ClientGone(Exception):
    """The client closed the connection; nobody is left to answer."""


class Guard:
    """The outermost layer of the application.

    Args:
        app: what it guards.
        api_key: must be shown as a bearer token for everything but health and metrics.
        body_timeout_s: for the whole body to arrive.
    """

    OPEN = frozenset({"/health", "/ready", "/metrics", "/version"})

    def __init__(self, app: ASGIApp, api_key: str | None, body_timeout_s: float = 60.0) -> None:
        self.app = app
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()
        self.body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._serve(scope, receive, watched_send)
            return
        except ClientGone:
            return
        except ApiError as error:
            answer = error
        except asyncio.CancelledError:  # the server ends, and this request has kept it too long
            answer = as_api_error(DrainingError(1))
        except Exception as error:
            logger.error("a request failed with %s", type(error).__name__)
            answer = as_api_error(error)
        if not started:
            await answer.response()(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self._check_key(scope["path"], headers)
        try:
            async with asyncio.timeout(self.body_timeout_s):
                body = await _read_body(receive)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {self.body_timeout_s:g} s",
                headers={"Connection": "close"},
            ) from None
        if body and not _is_json(headers.get(b"content-type", b"")):
            raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
        await _unless_gone(receive, self.app(scope, _replay(body), send))

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.expected is None or path in self.OPEN:
            return
        if not hmac.compare_digest(headers.get(b"authorization", b""), self.expected):
            raise ApiError(
                401, "a valid API key is needed: Authorization: Bearer ...",
                kind="authentication_error", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip


async def _read_body(receive: Receive) -> bytes:
    """The whole body, whatever its headers say of its length."""
    parts: list[bytes] = []
    num_bytes = 0
    more = True
    while more and num_bytes <= _MAX_DISCARDED_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        more = message.get("more_body", False)
        num_bytes += len(part)
        if num_bytes <= MAX_BODY_BYTES:
            parts.append(part)
    if num_bytes > MAX_BODY_BYTES:
        raise ApiError(
            413,
            f"the body must be at most {MAX_BODY_BYTES:,} bytes",
            code="body_too_large",
            headers={"Connection": "close"} if more else {},
        )
    return b"".join(parts)


def _is_json(content_type: bytes) -> bool:
    kind = content_type.split(b";")[0].strip().lower()
    return kind == b"application/json" or (
        kind.startswith(b"application/") and kind.endswith(b"+json")
    )


def _replay(body: bytes) -> Receive:
    """`receive` for the application: the body, then nothing. The guard listens from here on."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.get_running_loop().create_future()  # until this request is cancelled
        return messages.pop()

    return receive


async def _unless_gone(receive: Receive, work: Awaitable[None]) -> None:
    """Do `work`; cancel it if the client goes away first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
