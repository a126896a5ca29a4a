"""Servers that tests talk to over real sockets: in a thread, or as the command a user runs."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from course_lib import LLM
from course_lib.data import DEFAULT_MODEL
from course_lib.serving.api import Replica
from course_lib.serving.scrape import Scrape, scrape
from course_lib.serving.server import BackgroundServer

ROOT = Path(__file__).resolve().parents[2]
MODEL = DEFAULT_MODEL.name
ORDER = [{"role": "user", "content": "Where is my order A-1842?"}]


def load(**options: Any) -> LLM:
    """The shipped model with a small cache."""
    return LLM(DEFAULT_MODEL, **{"num_gpu_blocks_override": 2000, **options})


def wait_until(condition: Any, timeout_s: float = 30.0, what: str = "") -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what or condition} did not come true"
        time.sleep(0.02)


@contextmanager
def serving(llm: LLM, warm_up_prompts: Any = (), **replica: Any) -> Iterator[BackgroundServer]:
    """A server in a thread."""
    server = BackgroundServer(Replica(llm, MODEL, **replica), warm_up_prompts=warm_up_prompts)
    with server:
        yield server


def idle(url: str) -> bool:
    """Whether nothing is in the engine and no block is in use."""
    found = scrape(url)
    return all(
        found.value(name) == 0
        for name in (
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
        )
    )


def change(before: Scrape, after: Scrape, name: str) -> float:
    """By how much a counter has grown."""
    return after.value(name) - before.value(name)


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream that has been read; the last one is "[DONE]"."""
    found = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in found]


class ServeProcess:
    """`course serve` as a process of its own; what it prints is in `output`."""

    def __init__(self, *options: str, wait: bool = True) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        command = [sys.executable, "-c", "from course_lib.cli import app; app()", "serve"]
        self.process = subprocess.Popen(
            [*command, "--port", "0", *options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        self.url = ""
        if wait:
            wait_until(self._find_url, 120, "course serve announced its address")
            wait_until(lambda: self.status("/ready") == 200, what="it became ready")

    def _find_url(self) -> bool:
        assert self.process.poll() is None, self.output
        found = re.search(r"serving \S+ on (http://\S+)", self.output)
        self.url = found[1] if found else ""
        return bool(found)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return os.pread(self._output.fileno(), 2**24, 0).decode()

    def status(self, path: str) -> int:
        """Of a GET."""
        return httpx.get(self.url + path, timeout=30).status_code

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 60) -> int:
        """The exit code."""
        return self.process.wait(timeout_s)

    def __enter__(self) -> "ServeProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._output.close()


def assert_shows_no_internals(text: str) -> None:
    """Nothing in an answer or a log shows a traceback or a path of the server."""
    assert "Traceback" not in text
    assert str(ROOT) not in text
    assert "site-packages" not in text
    assert not re.search(r"\.py\b", text), text[-2000:]
