"""`compare_servers.py` as a script, against stubs; nothing here looks at times."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.stub_server import StubServer

ROOT = Path(__file__).resolve().parents[2]
FEW = ["--requests", "6", "--users", "2", "--prompt-tokens", "4", "--output-tokens", "2:3"]


def compare(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/compare_servers.py", *options],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_servers_get_the_same_requests_in_turn_and_stand_side_by_side(tmp_path):
    path = tmp_path / "new" / "comparison.json"
    with StubServer() as one, StubServer(usage=False) as other:
        result = compare(
            "--server", f"one={one.url}", "--server", f"other={other.url}", *FEW,
            "--model", "other=mine", "--rounds", "2", "--output", str(path),
        )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    order = [line for line in result.stdout.splitlines() if line.startswith("round ")]
    assert order == ["round 1: one", "round 1: other", "round 2: other", "round 2: one"]
    assert "TTFT p95 (ms)" in result.stdout and "1.00x" in result.stdout
    assert "other, round 1: the server did not count tokens" in result.stdout

    def sent(server: StubServer) -> list[str]:
        return sorted(request["prompt"] for request in server.requests)

    assert sent(one) == sent(other)
    assert len(set(sent(one))) == 2 + 2 * 6  # a warm-up, and no round repeats another's prompts
    assert {r["model"] for r in other.requests} == {"mine"}
    saved = json.loads(path.read_text())
    assert [(r["server"], r["round"], r["served"]) for r in saved["rows"]] == [
        ("one", 1, 6), ("one", 2, 6), ("other", 1, 6), ("other", 2, 6),
    ]  # fmt: skip
    assert saved["failed"] == {} and saved["workload"]["users"] == 2


def test_it_says_which_server_failed_and_what_was_not_served(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{taken.getsockname()[1]}"
    # Of the first one's refusals the warm-up gets two.
    with StubServer(refuse=[429] * 3) as some, StubServer(refuse=[500] * 99) as none:
        result = compare(
            "--server", f"some={some.url}", "--server", f"none={none.url}",
            "--server", f"gone={gone}", *FEW, "--rounds", "1",
        )  # fmt: skip
    assert result.returncode == 1
    assert "some, round 1: 1 of 6 not served: {'refused: queue_full': 1}" in result.stdout
    assert "none failed: served nothing" in result.stdout
    assert f"gone failed: cannot reach a server at {gone}" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--server", "http://127.0.0.1:1"], "--server must be NAME=VALUE"),
        (["--server", "a=http://h:1", "--server", "a=http://h:2"], "each name once"),
        (["--server", "a=http://h:1", "--model", "b=x"], "--model names b, which no --server"),
        (["--server", "a=http://h:1", "--requests", "0"], "num_requests must be"),
        (["--server", "a=h:1"], "url must be like http://"),
    ],
)
def test_bad_options_are_refused_by_name(options, words):
    result = compare(*options)
    assert result.returncode == 1
    assert words in result.stdout
    assert "Traceback" not in result.stderr
