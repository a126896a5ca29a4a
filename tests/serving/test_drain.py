"""SIGTERM under load, to `course serve` as a process of its own: no answer is lost or cut."""

import asyncio
import json
import signal
import socket
import time
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.serving.servers import (
    MODEL,
    ServeProcess,
    assert_shows_no_internals,
    events,
    wait_until,
)


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> str:
    """What became of a request, in a word. A cut or hanging one fails the test."""
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        await answer.aread()
    if answer.status_code == 503:
        assert answer.json()["error"]["code"] == "draining"
        assert int(answer.headers["retry-after"]) >= 1
        return "told at once"
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        assert answer.json()["usage"]["completion_tokens"] == body["max_tokens"]
        return "finished"
    *chunks, last = events(answer)
    assert last == "[DONE]"
    if "error" in chunks[-1]:
        assert chunks[-1]["error"]["code"] == "draining"
        return "told in the stream"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert sum(bool(chunk["choices"]) for chunk in chunks) == body["max_tokens"]
    return "finished"


async def drain_under_load(server: ServeProcess, lengths: list[int]) -> Counter[str]:
    """Send requests of these lengths, every other one streamed; SIGTERM when all are in."""
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        tasks = []
        for index, length in enumerate(lengths):
            body = {
                "model": MODEL, "prompt": f"Order {index}", "max_tokens": length,
                "ignore_eos": True, "stream": bool(index % 2),
            }  # fmt: skip
            tasks.append(asyncio.create_task(ask(client, server.url, body)))
            await asyncio.sleep(0.02)  # so that they arrive in this order
        await asyncio.sleep(0.5)
        server.terminate()
        await asyncio.sleep(0.1)
        # Out of the rotation, and nothing new is taken.
        try:
            ready = await client.get(f"{server.url}/ready")
            assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
            assert await ask(client, server.url, {"prompt": "a", "max_tokens": 1}) == "told at once"
        except httpx.ConnectError:  # everything was done already
            assert all(task.done() for task in tasks)
        return Counter(await asyncio.gather(*tasks))


@pytest.mark.slow
def test_what_fits_the_time_finishes() -> None:
    with ServeProcess("--drain", "60", "--max-num-seqs", "8") as server:
        outcome = asyncio.run(drain_under_load(server, [100] * 24))
        assert outcome == {"finished": 24}
        assert server.wait() == 0
        assert_shows_no_internals(server.output)


@pytest.mark.slow
def test_what_does_not_fit_is_told_at_once_and_the_rest_finishes() -> None:
    with ServeProcess("--drain", "15", "--max-num-seqs", "8") as server:
        start = time.monotonic()
        lengths = [150] * 6 + [4000] * 20
        outcome = asyncio.run(drain_under_load(server, lengths))
        assert sum(outcome.values()) == len(lengths)
        assert outcome["finished"] == 6, outcome
        # Those that wait have got no token, so they can be told by the status even when streamed.
        assert outcome["told at once"] >= 15 and outcome["told in the stream"] >= 1, outcome
        assert server.wait() == 0
        assert time.monotonic() - start < 30
        assert_shows_no_internals(server.output)


@pytest.mark.slow
def test_nobody_holds_up_the_end() -> None:
    """Half a body, a silent connection and an answer that is not read end with the drain."""
    with ServeProcess("--drain", "3") as server:
        host, port = server.url.removeprefix("http://").split(":")
        address = (host, int(port))
        body = json.dumps(
            {"prompt": "a", "max_tokens": 3000, "ignore_eos": True, "stream": True, "n": 8}
        ).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += b"content-length: %d\r\n\r\n" % len(body)
        with (
            socket.create_connection(address) as half,
            socket.create_connection(address),
            socket.create_connection(address) as stalled,
        ):
            half.sendall(head + body[:20])
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            stalled.sendall(head + body)
            time.sleep(0.5)
            server.terminate()
            start = time.monotonic()
            half.settimeout(30)
            answer = b"".join(iter(lambda: half.recv(4096), b""))
            assert answer.startswith(b"HTTP/1.1 503") and b"shutting down" in answer
            assert server.wait(30) == 0
            assert time.monotonic() - start < 15
        assert_shows_no_internals(server.output)


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once() -> None:
    with ServeProcess("--drain", "100000") as server:
        body = {"prompt": "a", "max_tokens": 3900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            next(answer.iter_bytes())
            server.terminate()
            wait_until(lambda: server.status("/ready") == 503)
            assert server.process.poll() is None
            start = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            server.wait(10)
            assert time.monotonic() - start < 5
        assert_shows_no_internals(server.output)


@pytest.mark.slow
def test_an_idle_server_ends_with_0_on_ctrl_c() -> None:
    with ServeProcess() as server:
        assert server.status("/ready") == server.status("/health") == 200
        server.process.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        assert_shows_no_internals(server.output)
