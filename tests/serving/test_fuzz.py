"""Whatever a client sends gets a sentence in OpenAI's error shape; no 500, no file of the server.

The server is `course serve` as a process, so that its log can be read.
"""

import json
import math
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serving.servers import (
    MODEL,
    ORDER,
    ServeProcess,
    assert_shows_no_internals,
    events,
    idle,
    wait_until,
)

PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": ORDER, "max_tokens": 1},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 1},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [5, 6]},
}
FUZZ = settings(
    max_examples=120,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
    derandomize=True,  # the same every time: a failure is the server's
)


@pytest.fixture(scope="module")
def server() -> Iterator[ServeProcess]:
    with ServeProcess("--max-num-seqs", "16") as server:
        yield server
        # After everything below.
        wait_until(lambda: idle(server.url), what="the engine is idle")
        server.terminate()
        assert server.wait() == 0
        assert_shows_no_internals(server.output)
        assert "failed" not in server.output


@pytest.fixture(scope="module")
def client(server: ServeProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def check(answer: httpx.Response) -> None:
    """A success, or an error with a sentence that shows nothing of the server."""
    assert answer.status_code < 500, answer.text
    assert_shows_no_internals(answer.text)
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert set(answer.json()) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str) and 3 < len(error["message"]) < 1500
        assert isinstance(error["type"], str)


def post(client: httpx.Client, path: str, content: bytes, **headers: str) -> httpx.Response:
    headers = {"content-type": "application/json", **headers}
    return client.post(path, content=content, headers=headers)


JUNK: list[tuple[str, bytes]] = [
    ("nothing", b""),
    ("no JSON", b"hello"),
    ("half", b'{"prompt": "x"'),
    ("two", b"{}{}"),
    ("null", b"null"),
    ("a number", b"7"),
    ("a list", b"[]"),
    ("a text", b'"x"'),
    ("invalid UTF-8", b'{"prompt": "\xff\xfe"}'),
    ("UTF-8 with a mark", b'\xef\xbb\xbf{"prompt": "x"}'),
    ("UTF-16", '{"prompt": 3}'.encode("utf-16")),
    ("NUL", b'{"prompt": "\x00"}'),
    ("NUL, escaped", rb'{"prompt": "\u0000"}'),
    ("lone surrogate", rb'{"prompt": "\ud800"}'),
    ("lone surrogate in a key", rb'{"\udfff": 1}'),
    ("lone surrogate inside", rb'{"messages": [{"role": "user", "content": "a\udc00b"}]}'),
    ("lone surrogate in a bias", rb'{"prompt": "x", "logit_bias": {"\ud800": 1}}'),
    ("lone surrogate as model", rb'{"prompt": "x", "model": "\ud800"}'),
    ("lone surrogate as role", rb'{"messages": [{"role": "\ud800", "content": "a"}]}'),
    ("NaN", b'{"prompt": "x", "temperature": NaN}'),
    ("Infinity", b'{"prompt": "x", "top_p": -Infinity, "messages": []}'),
    ("infinite by its size", b'{"prompt": "x", "temperature": 1e999}'),
    ("a number of 5000 digits", b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}"),
    ("a number of 4000 digits", b'{"prompt": "x", "n": ' + b"9" * 4000 + b"}"),
    ("a seed of 70 bits", b'{"prompt": "x", "seed": %d}' % 2**70),
    ("tokens of 70 bits", b'{"prompt": [%d], "tokens": [%d]}' % (2**70, 2**70)),
    ("negative tokens", b'{"prompt": [-1], "tokens": [-1]}'),
    ("true as a token", b'{"prompt": [true], "tokens": [true]}'),
    ("deep lists", b"[" * 200_000),
    ("deep and closed", b"[" * 50_000 + b"]" * 50_000),
    ("deep objects", b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    ("a deep prompt", b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}"),
    ("the same key twice", b'{"prompt": 1, "prompt": [], "messages": 1, "tokens": 1}'),
    ("many unknown fields", json.dumps({f"f{i}": i for i in range(20_000)}).encode()),
    ("many messages", json.dumps({"messages": ORDER * 2000, "prompt": ["a"] * 2000}).encode()),
    ("a long name", json.dumps({"x" * 100_000: 1}).encode()),
    ("many stops", json.dumps({"prompt": "x", "messages": ORDER, "stop": ["a"] * 999}).encode()),
    ("a path as model", b'{"prompt": "x", "model": "/etc/passwd"}'),
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [name for name, _ in JUNK])
def test_junk_is_refused_with_a_sentence(name: str, path: str, client: httpx.Client) -> None:
    answer = post(client, path, dict(JUNK)[name])
    check(answer)
    if name in ("NUL, escaped", "UTF-8 with a mark") and path in ("/v1/completions", "/tokenize"):
        assert answer.status_code == 200
    else:
        assert answer.status_code in ((400, 404) if "model" in name else (400,)), answer.text


@pytest.mark.parametrize("path", PATHS)
def test_large_bodies_are_refused_however_they_come(
    path: str, client: httpx.Client, server: ServeProcess
) -> None:
    large = b" " * (5 * 2**20)
    check(post(client, path, large))
    assert post(client, path, large).status_code == 413

    def chunks() -> Iterator[bytes]:
        yield from (large[:65536] for _ in range(200))

    answer = client.post(path, content=chunks(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    check(answer)
    # One just below the limit is read.
    answer = post(client, path, b'{"x": "' + b"a" * (4 * 2**20 - 100) + b'"}')
    assert answer.status_code == 400
    check(answer)


@pytest.mark.parametrize("path", PATHS)
def test_chunked_bodies_are_served(path: str, client: httpx.Client) -> None:
    content = json.dumps(VALID[path]).encode()

    def bytewise() -> Iterator[bytes]:
        yield from (content[i : i + 1] for i in range(len(content)))

    answer = client.post(path, content=bytewise(), headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert post(client, path, content).status_code == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json", "\xff"],
)
def test_other_content_types_are_refused(
    path: str, content_type: str, client: httpx.Client
) -> None:
    content = json.dumps(VALID[path]).encode()
    headers = {"content-type": content_type.encode("latin-1")}
    answer = client.post(path, content=content, headers=headers)
    assert answer.status_code == 415
    check(answer)
    for good in ("application/json; charset=utf-8", "Application/JSON"):
        assert post(client, path, content, **{"content-type": good}).status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1e3\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n"
        b"content-length: 6\r\n\r\nhello",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /%00%ff/../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
def test_broken_http_is_refused(data: bytes, server: ServeProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(4096)
    assert answer[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 404"), answer
    assert_shows_no_internals(answer.decode())


def test_odd_headers(client: httpx.Client) -> None:
    content = json.dumps(VALID["/v1/completions"]).encode()
    for headers in (
        {"x-tenant": "t" * 10_000},
        {"x-tenant": "\xe9"},  # RFC 9110 lets bytes above ASCII through, but no control characters
        {"authorization": "Bearer \xff"},
        {"accept": "image/png", "cookie": "a=b"},
    ):
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = client.post(
            "/v1/completions",
            content=content,
            headers={"content-type": "application/json", **encoded},
        )
        assert answer.status_code == 200


odd_values = st.sampled_from(
    ["user", "system", "auto", MODEL, 2**31, -(2**63), 10**30, math.nan, [1], {}]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | odd_values,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = [
    "model", "n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias",
    "seed", "stop", "stream", "stream_options", "user", "service_tier", "metadata", "top_k",
    "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids",
    "include_stop_str_in_output", "skip_special_tokens", "cache_salt", "priority", "logprobs",
    "top_logprobs", "echo", "best_of", "suffix", "tools",
]  # fmt: skip
numbers = st.sampled_from([-1, 0, 1, 2, 20, 0.5, 1e-300, 1e300, 2**31 - 1, 2**31, 2**63, "1", None])


@FUZZ
@given(
    path=st.sampled_from(PATHS),
    more=st.dictionaries(st.sampled_from(FIELDS), numbers | json_values, max_size=3),
    replaced=st.dictionaries(
        st.sampled_from(["messages", "prompt", "tokens", "max_tokens"]), json_values, max_size=1
    ),
)
def test_any_values(
    path: str, more: dict[str, Any], replaced: dict[str, Any], client: httpx.Client
) -> None:
    body = {**VALID[path], **more, **replaced}
    if not isinstance(body.get("max_tokens"), int):  # a reply without a limit takes long
        body["max_tokens"] = 2
    answer = post(client, path, json.dumps(body).encode())
    check(answer)
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert events(answer)[-1] == "[DONE]"


@FUZZ
@given(path=st.sampled_from(PATHS), content=st.binary(max_size=200))
def test_any_bytes(path: str, content: bytes, client: httpx.Client) -> None:
    answer = post(client, path, content)
    check(answer)


@FUZZ
@given(
    path=st.sampled_from(PATHS),
    data=st.data(),
)
def test_broken_copies_of_what_is_right(
    path: str, data: st.DataObject, client: httpx.Client
) -> None:
    content = bytearray(json.dumps(VALID[path]).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    check(post(client, path, bytes(content)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_by_its_own_openapi_document(
    mode: schemathesis.GenerationMode, server: ServeProcess
) -> None:
    """Requests that the document allows, and others that it does not."""
    checks = [
        schemathesis.checks.not_a_server_error,
        schemathesis.checks.status_code_conformance,
        schemathesis.checks.content_type_conformance,
        schemathesis.checks.response_schema_conformance,
    ]
    tried = set()

    def try_operation(operation: Any) -> None:
        @settings(FUZZ, max_examples=40)
        @given(case=operation.as_strategy(generation_mode=mode))
        def try_case(case: Any) -> None:
            if isinstance(case.body, dict) and case.path.startswith("/v1/"):
                case.body["max_tokens"] = 1  # a reply without a limit takes long
                case.body.pop("max_completion_tokens", None)
            answer = case.call(timeout=60)
            if case.path not in ("/v1/chat/completions", "/v1/completions"):
                case.validate_response(answer, checks=checks)  # those two also stream
            assert answer.status_code < 500, answer.text
            assert_shows_no_internals(answer.text)
            tried.add((case.path, answer.status_code < 400))

        try_case()

    for found in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations():
        operation = found.ok()
        if mode is schemathesis.GenerationMode.POSITIVE or operation.body:
            try_operation(operation)
    assert {path for path, _ in tried} >= set(PATHS)
