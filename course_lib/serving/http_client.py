"""A small HTTP/1.1 client on asyncio, for replies that stream.

The load generator shares its cores with the server that it measures, and measures times between
tokens. This reads a chunk in a third of the processor time that a general HTTP library takes, and
needs nothing installed. It knows no proxies, redirects or compression; TLS it does.

    client = HttpClient("http://127.0.0.1:8000")
    async with client.request("GET", "/v1/models") as response:
        print(response.status, await response.read())
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

#: Replies to requests that never stream are read to the end; more than this is no such reply.
MAX_READ_BYTES = 16 * 2**20


class ConnectionBroken(ConnectionError):
    """The server ended the connection before its reply was complete, or it does not speak HTTP."""


@dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: bool = False

    @property
    def is_open(self) -> bool:
        return not (self.writer.transport.is_closing() or self.reader.at_eof())


@dataclass
class Response:
    """Status and headers that have come; the body is still to be read.

    Args:
        status: such as 200.
        headers: by name in lower case.
    """

    status: int
    headers: Mapping[str, str]
    _reader: asyncio.StreamReader = field(repr=False)
    _complete: bool = False

    async def blocks(self) -> AsyncIterator[bytes]:
        """The body in pieces, each as soon as it is there.

        Raises:
            ConnectionBroken: the body ends early or is not framed as HTTP says.
        """
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            while size := await self._chunk_size():
                yield (await _exactly(self._reader, size + 2))[:-2]
            while (await self._reader.readline()).strip():  # trailers
                pass
        elif (length := self.headers.get("content-length")) is not None:
            remaining = _whole(length, 10)
            while remaining:
                block = await self._reader.read(min(remaining, 2**16))
                if not block:
                    raise ConnectionBroken("the connection ended in the middle of the reply")
                remaining -= len(block)
                yield block
        else:  # the end of the connection is the end of the body
            while block := await self._reader.read(2**16):
                yield block
        self._complete = True

    async def read(self) -> bytes:
        """The whole body, of a reply that does not stream.

        Raises:
            ConnectionBroken: it ends early, or is longer than `MAX_READ_BYTES`.
        """
        body = bytearray()
        async for block in self.blocks():
            body += block
            if len(body) > MAX_READ_BYTES:
                raise ConnectionBroken(f"a reply of more than {MAX_READ_BYTES} bytes")
        return bytes(body)

    async def _chunk_size(self) -> int:
        line = await self._reader.readline()
        if not line:
            raise ConnectionBroken("the connection ended in the middle of the reply")
        return _whole(line.split(b";")[0].decode("latin-1"), 16)

    @property
    def _reusable(self) -> bool:
        framed = "transfer-encoding" in self.headers or "content-length" in self.headers
        return self._complete and framed and self.headers.get("connection", "").lower() != "close"


class HttpClient:
    """Connections to one server; those that are idle are used again.

    Args:
        url: `http://` or `https://`, host, port and what comes before each path.

    Raises:
        ValueError: the URL is of another kind.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ValueError(f"url must be like http://127.0.0.1:8000, got {url!r}")
        self._host = parts.hostname
        self._tls = parts.scheme == "https"
        self._port = port or (443 if self._tls else 80)
        self._netloc = parts.netloc
        self._base_path = parts.path.rstrip("/")
        self._idle: list[_Connection] = []

    @asynccontextmanager
    async def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> AsyncIterator[Response]:
        """Send a request and wait for the head of its reply.

        Raises:
            OSError: there is no connection, or it broke; `ConnectionBroken` says how.
        """
        head = [f"{method} {self._base_path}{path} HTTP/1.1", f"host: {self._netloc}"]
        head += [f"{name}: {value}" for name, value in (headers or {}).items()]
        head += [f"content-length: {len(body)}", "", ""]
        message = "\r\n".join(head).encode("latin-1") + body
        connection, response = await self._exchange(message)
        try:
            yield response
        finally:
            if response._reusable and connection.is_open:
                connection.used = True
                self._idle.append(connection)
            else:
                connection.writer.close()

    async def _exchange(self, message: bytes) -> tuple[_Connection, Response]:
        while True:
            connection = await self._connect()
            try:
                connection.writer.write(message)
                await connection.writer.drain()
                return connection, await _read_head(connection.reader)
            except BaseException as error:
                connection.writer.close()
                # A server may close an idle connection just when it is used again.
                if not (connection.used and isinstance(error, ConnectionError)):
                    raise

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
            connection.writer.close()
        return _Connection(
            *await asyncio.open_connection(self._host, self._port, ssl=self._tls or None)
        )

    async def close(self) -> None:
        """End the idle connections."""
        for connection in self._idle:
            connection.writer.close()
        self._idle.clear()


async def _read_head(reader: asyncio.StreamReader) -> Response:
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            what = "no HTTP" if error.partial else "no reply"
            raise ConnectionBroken(f"the connection ended with {what} from the server") from None
        except asyncio.LimitOverrunError:
            raise ConnectionBroken("the head of the reply does not end") from None
        first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        words = first.split(None, 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1."):
            raise ConnectionBroken(f"the server answered {first[:60]!r}, which is not HTTP/1")
        status = _whole(words[1], 10)
        if status >= 200:  # those before are interim
            break
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Response(status, headers, reader)


async def _exactly(reader: asyncio.StreamReader, size: int) -> bytes:
    try:
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError:
        raise ConnectionBroken("the connection ended in the middle of the reply") from None


def _whole(text: str, base: int) -> int:
    try:
        value = int(text, base)
    except ValueError:
        value = -1
    if value < 0:
        raise ConnectionBroken(f"{text[:20]!r} stands where HTTP has a number")
    return value
