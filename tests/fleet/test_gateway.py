"""The gateway, with replicas that answer, vanish and drain as they are told."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message

from course_lib.data import DEFAULT_MODEL
from course_lib.fleet.gateway import MAX_ATTEMPTS, Call, Gateway, Head, ReplicaLost, prompt_tokens
from course_lib.model.tokenizer import Tokenizer
from course_lib.serving.errors import ApiError
from course_lib.serving.guard import Guard
from course_lib.serving.metrics import Metrics
from tests.serving.servers import ORDER, load

JSON = Head(200, [(b"content-type", b"application/json"), (b"x-replica", b"one")])
STREAM = Head(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
DRAINING = ApiError(503, "it leaves", code="draining")
FULL = ApiError(503, "it is full", code="max_num_queued_reqs", headers={"Retry-After": "3"})
TOKENIZER = Tokenizer(DEFAULT_MODEL)

#: What a replica says, item by item; an error is raised.
Script = list[Head | bytes | Exception]


class Replicas:
    """The first call is answered by the first script, the second by the second, and so on."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.calls: list[Call] = []
        self.closed = 0

    async def dispatch(self, call: Call) -> AsyncGenerator[Head | bytes]:
        self.calls.append(call)
        try:
            for item in self.scripts.pop(0):
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed += 1


async def scrape() -> dict[str, bytes]:
    """Of two replicas with the same metrics."""
    metrics = Metrics("merchant-chat", 4096)
    metrics.observe_rejection("draining")
    return {"one": metrics.text(), "two": metrics.text()}


def refusal(error: ApiError) -> Script:
    headers = [(n.lower().encode(), v.encode()) for n, v in error.headers.items()]
    return [
        Head(error.status, [*headers, (b"content-type", b"application/json")]),
        json.dumps(error.body).encode(),
    ]


def post(replicas: Replicas, body: object, path: str = "/v1/completions") -> httpx.Response:
    async def ask() -> httpx.Response:
        app = Guard(Gateway(replicas.dispatch, TOKENIZER, scrape), api_key=None)
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.post(f"{path}?a=b", json=body)

    response = asyncio.run(ask())
    assert replicas.closed == len(replicas.calls)
    assert not replicas.scripts
    return response


def events(response: httpx.Response) -> list[str]:
    return [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]


def test_a_call_and_its_answer_pass_unchanged() -> None:
    replicas = Replicas([JSON, b'{"text"', b': "fine"}'])
    response = post(replicas, {"prompt": "Where?"})
    assert (response.status_code, response.json()) == (200, {"text": "fine"})
    assert response.headers["x-replica"] == "one"
    assert response.headers["content-length"] == "16"
    (call,) = replicas.calls
    assert (call.method, call.path, call.query) == ("POST", "/v1/completions", b"a=b")
    assert json.loads(call.body) == {"prompt": "Where?"}
    assert (b"content-type", b"application/json") in call.headers
    assert call.prompt_token_ids == TOKENIZER.encode("Where?")


@pytest.mark.parametrize(
    "loss",
    [[ReplicaLost()], [JSON, ReplicaLost()], [JSON, b"half of", ReplicaLost()]],
    ids=["before the answer", "after its head", "in its middle"],
)
def test_a_whole_answer_is_asked_for_again(loss: Script) -> None:
    response = post(Replicas(loss, loss, [JSON, b"{}"]), {"prompt": "Where?"})
    assert (response.status_code, response.json()) == (200, {})


@pytest.mark.parametrize("loss", [[ReplicaLost()], [STREAM, ReplicaLost()]])
def test_a_stream_that_has_not_begun_is_asked_for_again(loss: Script) -> None:
    response = post(Replicas(loss, [STREAM, b"data: 1\n\n", b"data: [DONE]\n\n"]), {"prompt": "x"})
    assert events(response) == ["1", "[DONE]"]


def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    replicas = Replicas([STREAM, b"data: 1\n\n", ReplicaLost()])
    *pieces, last, done = events(post(replicas, {"prompt": "x", "stream": True}))
    assert (pieces, done) == (["1"], "[DONE]")
    error = json.loads(last)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("server_error", "replica_lost")


def test_a_stream_that_fails_in_any_other_way_does_not_end_silently_either() -> None:
    replicas = Replicas([STREAM, b"data: 1\n\n", RuntimeError("a secret of the server")])
    *pieces, last, done = events(post(replicas, {"prompt": "x", "stream": True}))
    assert (pieces, done) == (["1"], "[DONE]")
    assert json.loads(last)["error"]["message"] == "the server failed on this request"


def test_what_a_draining_replica_hands_back_goes_to_another() -> None:
    response = post(Replicas(refusal(DRAINING), [JSON, b"{}"]), {"prompt": "x"})
    assert (response.status_code, response.json()) == (200, {})


def test_other_refusals_are_for_the_client() -> None:
    response = post(Replicas(refusal(FULL)), {"prompt": "x"})
    assert (response.status_code, response.json()) == (503, FULL.body)
    assert response.headers["retry-after"] == "3"
    response = post(Replicas([FULL]), {"prompt": "x"})  # by the dispatcher itself
    assert (response.status_code, response.json()) == (503, FULL.body)


def test_a_request_that_takes_each_replica_with_it_is_given_up() -> None:
    response = post(Replicas(*[[ReplicaLost()] for _ in range(MAX_ATTEMPTS)]), {"prompt": "x"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "replica_lost"


def test_the_router_gets_the_prompt_that_the_replica_computes() -> None:
    def tokens_of(body: object, path: str = "/v1/completions") -> list[int]:
        return prompt_tokens(TOKENIZER, path, json.dumps(body).encode())

    chat = tokens_of({"messages": ORDER}, "/v1/chat/completions")
    assert chat == load().chat_prompt(ORDER)["prompt_token_ids"]
    assert tokens_of({"prompt": "Where is it?"}) == TOKENIZER.encode("Where is it?")
    assert tokens_of({"prompt": [5, 6, 7]}) == [5, 6, 7]
    assert tokens_of({"prompt": ["one", "two"]}) == TOKENIZER.encode("one")
    assert tokens_of({"prompt": [["Where"], "x"]}) == []  # the replica will refuse it
    assert tokens_of({"prompt": "x"}, "/v1/models") == []


def test_the_metrics_are_those_of_all_replicas() -> None:
    async def ask() -> httpx.Response:
        app = Guard(Gateway(Replicas().dispatch, TOKENIZER, scrape), api_key="secret")
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.get("/metrics")

    text = asyncio.run(ask()).text
    found = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "vllm:admission_rejections_total"
    ]
    assert [(sample.labels["instance"], sample.value) for sample in found] == [
        ("one", 1), ("two", 1),
    ]  # fmt: skip
    assert found[0].labels["reason"] == "draining"
    assert text.count("# TYPE vllm:time_to_first_token_seconds histogram") == 1


def test_a_client_that_leaves_ends_the_call() -> None:
    async def scenario() -> None:
        gone, closed = asyncio.Event(), asyncio.Event()

        async def dispatch(_: Call) -> AsyncGenerator[Head | bytes]:
            try:
                yield STREAM
                yield b"data: 1\n\n"
                gone.set()
                await asyncio.get_running_loop().create_future()
            finally:
                closed.set()

        messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_: Message) -> None: ...

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        app: Callable = Guard(Gateway(dispatch, TOKENIZER, scrape), api_key=None)
        await asyncio.wait_for(app(scope, receive, send), 60)
        assert closed.is_set()

    asyncio.run(scenario())
