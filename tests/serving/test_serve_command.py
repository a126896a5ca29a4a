"""`course serve`: what it says when it starts, and what when it cannot."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from course_lib.cli import app
from course_lib.engine.startup import parse_startup_log
from course_lib.serving.server import listen
from tests.serving.servers import ROOT, ServeProcess, assert_shows_no_internals, wait_until

runner = CliRunner(env={"COLUMNS": "300"})


def sentence(*options: str) -> str:
    """What `course serve` prints when it cannot serve: one line, and exit code 1."""
    result = runner.invoke(app, ["serve", "--port", "0", *options])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stdout.strip().splitlines()
    assert "Traceback" not in result.output
    return line


def test_it_binds_to_this_machine_only_and_says_where() -> None:
    with ServeProcess() as server:
        assert server.url.startswith("http://127.0.0.1:")
        wait_until(lambda: "ready seconds=" in server.output)
        lines = server.output.strip().splitlines()
        said = [line for line in lines if " INFO startup " not in line]
        assert said[0].startswith("merchant-chat in float")
        assert said[1:] == [f"serving merchant-chat on {server.url} (Ctrl-C drains and stops)"]
        server.terminate()
        assert server.wait() == 0
        assert server.output.strip().splitlines() == lines
        assert_shows_no_internals(server.output)


def test_the_log_says_how_long_each_phase_of_the_start_took() -> None:
    with ServeProcess() as server:
        wait_until(lambda: "ready seconds=" in server.output)
        (start,) = parse_startup_log(server.output)
    assert start.pid == server.process.pid
    names = ["imports", "checkpoint", "tokenizer", "weights", "kv_cache", "warm_up"]
    assert [name for name in start.phases if name != "cuda_graphs"] == names
    assert sum(start.phases.values()) <= start.ready_s + 0.02


def test_a_port_in_use_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = sentence("--port", str(port), "--model", str(tmp_path))
    assert f"cannot listen on 127.0.0.1, port {port}: " in line and "in use" in line


def test_an_address_that_is_not_here_is_named() -> None:
    assert "cannot listen on 192.0.2.1, port 0" in sentence("--host", "192.0.2.1")
    assert "cannot listen on no.such.host.invalid" in sentence("--host", "no.such.host.invalid")


def test_itlistens_on_ipv6_too() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with ServeProcess("--host", "::1") as server:
        assert server.url.startswith("http://[::1]:")
        assert server.status("/ready") == 200


def test_small_writes_go_out_at_once() -> None:
    # asyncio switches Nagle's algorithm off only for sockets that are named TCP; with it on, each
    # answer waits 40 ms for the client's delayed acknowledgement.
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_model_that_cannot_be_served_is_named(tmp_path: Path) -> None:
    assert "is not a directory" in sentence("--model", str(tmp_path / "nothing"))
    assert "config.json" in sentence("--model", str(tmp_path))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--warm-up", "order " * 5000], "a warm-up prompt has"),
        (["--warm-up", ""], "a warm-up prompt has 0 tokens"),
    ],
)
def test_options_that_cannot_work_are_named(options: list[str], says: str) -> None:
    assert says in sentence(*options)


def test_what_is_not_installed_is_named() -> None:
    program = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from course_lib.cli import app; app(['serve', '--port', '0'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert "pip install -e '.[serve]'" in result.stdout and "uvicorn" in result.stdout
    assert "Traceback" not in result.stderr
