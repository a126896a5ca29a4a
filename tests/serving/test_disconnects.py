"""Clients that go away at any moment leave nothing behind: no block, no request, no trace."""

import asyncio
import json
import random
from collections.abc import Iterator

import httpx
import pytest

from course_lib.serving.admission import AdmissionPolicy
from course_lib.serving.scrape import scrape
from course_lib.serving.server import BackgroundServer
from tests.serving.servers import MODEL, idle, load, serving, wait_until

NUM_DISCONNECTS = 1000
USERS = 32


@pytest.fixture(scope="module")
def server() -> Iterator[BackgroundServer]:
    # Few slots, so that many go away while they wait; none is refused.
    with serving(
        load(max_num_seqs=8, num_gpu_blocks_override=600),
        admission=AdmissionPolicy(max_num_queued_reqs=1000),
    ) as server:
        yield server


def message(rng: random.Random) -> bytes:
    """A request that would take long: chat or completion, streamed or not, one or several."""
    chat, stream = rng.random() < 0.5, rng.random() < 0.6
    body = {"model": MODEL, "max_tokens": rng.randint(100, 400), "ignore_eos": True}
    body |= {"stream": stream, "n": rng.choice([1, 1, 1, 2])}
    words = " ".join(rng.choice(["order", "parcel", "refund"]) for _ in range(rng.randint(1, 100)))
    if chat:
        body["messages"] = [{"role": "user", "content": words}]
    else:
        body["prompt"] = [words, "Hello"] if rng.random() < 0.2 else words
    content = json.dumps(body).encode()
    path = "/v1/chat/completions" if chat else "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    if rng.random() < 0.1:
        chunk = f"{len(content):x}\r\n".encode() + content + b"\r\n0\r\n\r\n"
        return (head + "transfer-encoding: chunked\r\n\r\n").encode() + chunk
    return (head + f"content-length: {len(content)}\r\n\r\n").encode() + content


async def leave(url: str, rng: random.Random) -> str:
    """Send a request, or a part of it, read nothing or a part, and close. Says what was done."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = message(rng)
    how = rng.choice(["in the body", "at once", "soon", "later", "mid-stream", "half-closed"])
    try:
        if how == "in the body":
            writer.write(data[: rng.randrange(1, len(data))])
            await asyncio.sleep(rng.random() * 0.02)
            return how
        writer.write(data)
        if how == "soon":
            await asyncio.sleep(rng.random() * 0.05)
        elif how == "later":
            await asyncio.sleep(rng.random() * 0.3)
        elif how == "half-closed":
            writer.write_eof()
            await asyncio.sleep(rng.random() * 0.05)
        elif how == "mid-stream":
            for _ in range(rng.randint(1, 4)):
                try:
                    await asyncio.wait_for(reader.read(rng.choice([1, 300, 4096])), 0.3)
                except TimeoutError:
                    break
        return how
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()  # a reset instead of an orderly end
        else:
            writer.close()


@pytest.mark.slow
def test_a_thousand_random_disconnects_leak_nothing(
    server: BackgroundServer, capfd: pytest.CaptureFixture[str]
) -> None:
    before = scrape(server.url)
    done: dict[str, int] = {}

    async def user(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(NUM_DISCONNECTS // USERS + 1):
            how = await leave(server.url, rng)
            done[how] = done.get(how, 0) + 1

    async def main() -> None:
        await asyncio.gather(*(user(seed) for seed in range(USERS)))

    asyncio.run(main())
    assert sum(done.values()) >= NUM_DISCONNECTS and min(done.values()) > 50, done
    wait_until(lambda: idle(server.url), 30, "no request and no block is left")
    engine = server.replica.engine
    assert engine.num_unfinished == 0
    assert not engine.engine.has_unfinished_requests()
    pool = engine.engine.block_pool
    assert pool.usage == 0 and pool.num_free_blocks == pool.num_blocks - 1
    after = scrape(server.url)
    ended = {
        reason: value - before.by_label("vllm:request_success_total", "finished_reason")[reason]
        for reason, value in after.by_label("vllm:request_success_total", "finished_reason").items()
    }
    assert ended["abort"] > 300 and ended["error"] == 0, ended
    # It still serves.
    body = {"prompt": "Hello", "max_tokens": 3, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    assert answer.json()["usage"]["completion_tokens"] == 3
    output = capfd.readouterr()
    assert "Traceback" not in output.err and "Error" not in output.err, output.err[-3000:]


def test_a_request_that_is_not_streamed_ends_with_its_client(server: BackgroundServer) -> None:
    body = {"prompt": "Hello", "max_tokens": 3000, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.3)
    wait_until(lambda: idle(server.url), 5)


def test_a_client_that_does_not_read_holds_up_nobody(server: BackgroundServer) -> None:
    body = {"prompt": "Hello", "max_tokens": 2000, "ignore_eos": True, "stream": True, "n": 4}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as stalled:
        short = {"prompt": "Hello", "max_tokens": 5, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=short, timeout=30)
        assert answer.status_code == 200
        assert stalled.status_code == 200
    wait_until(lambda: idle(server.url), 10)
