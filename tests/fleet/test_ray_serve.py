"""A fleet on Ray Serve: real processes, real sockets, replicas and machines that are killed.

The cluster is of two nodes, each with a raylet of its own, so that one of them can be taken away.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from course_lib import LLM, SamplingParams
from course_lib.data import DEFAULT_MODEL
from course_lib.fleet.control_loop import SafeAutoscaler, replay
from course_lib.fleet.proportional import ProportionalAutoscaler
from course_lib.fleet.proportional_base import LOAD_METRICS
from course_lib.serving.load_client import Workload, load
from tests.serving.servers import ORDER, ROOT, wait_until

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[fleet]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

from course_lib.fleet.ray_fleet import RayFleet, ReplicaView, patiently  # noqa: E402
from course_lib.fleet.ray_serve import FleetConfig  # noqa: E402

#: Ray starts a replica in seconds, on a busy machine in many.
PATIENCE_S = 240
MODEL = DEFAULT_MODEL.name


def autoscaler_of(limit: int) -> Callable[[Any], SafeAutoscaler]:
    """Made here, so that Ray's controller gets it by value; it does not know this file."""

    def make(clock: Any) -> SafeAutoscaler:
        rule = ProportionalAutoscaler(
            target_per_replica=8, window_s=10, max_replicas=limit, clock=clock
        )
        return SafeAutoscaler(rule, LOAD_METRICS)

    return make


MAKE = autoscaler_of(3)


@pytest.fixture(scope="session")
def ray_home() -> Iterator[None]:
    """A folder of its own for what Ray writes, of a short name, as the names of sockets are."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    before = {name: os.environ.get(name) for name in ("RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED")}
    os.environ.update(RAY_TMPDIR=folder, RAY_USAGE_STATS_ENABLED="0")
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(ray_home: None) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 4, "object_store_memory": 100 * 2**20}
    found = Cluster()
    patiently(lambda: found.add_node(**node, include_dashboard=False))  # the first one is the head
    patiently(lambda: found.add_node(**node))
    yield found
    found.shutdown()


@pytest.fixture(scope="session")
def fleet(cluster: Any) -> Iterator[RayFleet]:
    """Of 1 to 3 replicas, with 8 seats each; one that leaves has 5 seconds."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = FleetConfig(
        DEFAULT_MODEL, max_replicas=3, port=port, address=cluster.address, interval_s=1,
        max_num_seqs=8, drain_s=5,
    )  # fmt: skip
    with RayFleet(config, MAKE) as found:
        yield found


def running(fleet: RayFleet) -> list[ReplicaView]:
    return [replica for replica in fleet.view().replicas if replica.state == "RUNNING"]


def has_settled(fleet: RayFleet) -> bool:
    """Whether it is down to one replica, which has nothing to do."""
    view = fleet.view()
    assert view.last is not None
    idle = view.last.metrics.get("num_requests_running") == 0
    return idle and [replica.state for replica in view.replicas] == ["RUNNING"]


def wait(condition: Callable[[], bool], what: str) -> None:
    wait_until(condition, PATIENCE_S, what)


def body(prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": True, **more,
    }  # fmt: skip


async def stream(client: httpx.AsyncClient, index: int, begun: asyncio.Event) -> list[str]:
    """The events of a long stream; `begun` is set with the first one."""
    request = body(f"Stream {index} is", 3000, stream=True)
    async with client.stream("POST", "/v1/completions", json=request) as response:
        assert response.status_code == 200
        lines = []
        async for line in response.aiter_lines():
            begun.set()
            lines.append(line)
    return [line[6:] for line in lines if line.startswith("data: ")]


def end_of(events: list[str]) -> str:
    """How a stream ended: "length", or the code of its error."""
    *pieces, last, done = events
    assert pieces and done == "[DONE]"
    data = json.loads(last)
    if "error" in data:
        assert data["error"].keys() == {"message", "type", "param", "code"}
        return data["error"]["code"]
    return data["choices"][0]["finish_reason"]


async def whole(client: httpx.AsyncClient, index: int, max_tokens: int) -> httpx.Response:
    return await client.post("/v1/completions", json=body(f"Order {index} is", max_tokens))


def client_of(fleet: RayFleet) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=fleet.url, timeout=PATIENCE_S, limits=httpx.Limits())


#: An autoscaler as a student's notebook saves it.
OWN_RULE = """
from course_lib.fleet.autoscaler import ScalingDecision
from course_lib.fleet.proportional_base import ProportionalBase

def enough(settings):
    return settings.min_replicas

class MyAutoscaler(ProportionalBase):
    def decide(self, metrics, current_replicas):
        return ScalingDecision(enough(self), "my own rule")

PART = MyAutoscaler
"""


def test_the_command_serves_by_ones_own_rule_and_ctrl_c_leaves_nothing_behind(
    ray_home: None, tmp_path: Path
) -> None:
    (tmp_path / "autoscaler.py").write_text(OWN_RULE)
    mark = f"COURSE_TEST={uuid.uuid4()}"
    command = [sys.executable, "-c", "from course_lib.cli import app; app()", "fleet", "up"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*command, "--max", "2", "--port", "0", "--interval", "1"],
            cwd=ROOT,
            env={
                **os.environ,
                "COLUMNS": "300",
                "COURSE_PARTS_DIR": str(tmp_path),
                **dict([mark.split("=")]),
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

        def said() -> str:
            return os.pread(output.fileno(), 2**20, 0).decode()

        try:
            wait(lambda: "load for it" in said() or process.poll() is not None, "it serves")
            found = re.search(r"serving merchant-chat on (http://127.0.0.1:\d+) ", said())
            assert found, said()
            question = {"messages": ORDER, "max_tokens": 20}
            answer = httpx.post(f"{found[1]}/v1/chat/completions", json=question, timeout=60)
            assert answer.json()["choices"][0]["message"]["content"].startswith("Order A-1842")
            wait(lambda: "1 replica: my own rule" in said(), "it says what it decides, and why")
            assert processes_with(mark) > {process.pid}
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 0, said()
            assert said().rstrip().endswith("stopped")
            wait(lambda: not processes_with(mark), "all processes have ended")
        finally:
            for pid in processes_with(mark):
                os.kill(pid, signal.SIGKILL)


def processes_with(mark: str) -> set[int]:
    """Of which the environment says that they descend from a certain one."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue  # it has ended, or is somebody else's
    return found


def test_the_answers_are_those_of_the_server_itself(fleet: RayFleet) -> None:
    question = {"messages": ORDER, "max_tokens": 40, "temperature": 0}
    answer = httpx.post(f"{fleet.url}/v1/chat/completions", json=question, timeout=60).json()
    expected = LLM(DEFAULT_MODEL).chat(ORDER, SamplingParams(temperature=0, max_tokens=40))
    assert answer["choices"][0]["message"]["content"] == expected[0].outputs[0].text
    refused = httpx.post(f"{fleet.url}/v1/chat/completions", json={"messages": []}, timeout=60)
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{fleet.url}/v1/models", timeout=60).json()["data"][0]["id"] == MODEL


def test_a_client_that_leaves_takes_its_request_with_it(fleet: RayFleet) -> None:
    wait(lambda: has_settled(fleet), "nothing runs")
    request = body("Once", 3000, stream=True)
    with httpx.stream("POST", f"{fleet.url}/v1/completions", json=request, timeout=60) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        wait(lambda: running(fleet)[0].values["num_requests_running"] == 1, "it runs")
    wait(lambda: has_settled(fleet), "it was aborted")


def test_a_spike_makes_it_grow_and_shrink_and_nothing_is_lost(fleet: RayFleet) -> None:
    wait(lambda: has_settled(fleet), "it is small")
    begin = len(fleet.decisions())
    workload = Workload(users=32, num_requests=200, prompt_tokens=(32, 96), output_tokens=64)
    reports = []
    spike = threading.Thread(target=lambda: reports.append(load(fleet.url, workload)))
    spike.start()
    most = 1
    while spike.is_alive():
        most = max(most, len(running(fleet)))
        time.sleep(0.2)
    (report,) = reports
    assert report.outcomes == {"ok": 200}
    assert most == 3
    wait(lambda: has_settled(fleet), "it is small again")

    steps = fleet.decisions()
    grew = [step for step in steps[begin:] if step.decision.replicas > step.current]
    shrank = [step for step in steps[begin:] if step.decision.replicas < step.current]
    assert grew and all("needed" in step.decision.reason for step in grew)
    assert shrank and all(step.decision.replicas >= 1 for step in shrank)
    assert max(step.metrics["ttft_p95_ms"] for step in steps[begin:] if step.metrics) > 0
    # What the fleet did is what the same object decides on the record of it.
    assert replay(steps, MAKE) == [step.decision for step in steps]


def test_a_replica_that_leaves_hands_back_what_it_cannot_finish(fleet: RayFleet) -> None:
    wait(lambda: has_settled(fleet), "it is small")

    async def scenario() -> tuple[list[str], list[int]]:
        begun = [asyncio.Event() for _ in range(6)]
        async with client_of(fleet) as client, asyncio.TaskGroup() as group:
            crowd = [group.create_task(whole(client, i, 200)) for i in range(24)]
            await asyncio.to_thread(wait, lambda: len(running(fleet)) == 3, "it has grown")
            streams = [group.create_task(stream(client, i, begun[i])) for i in range(6)]
            await asyncio.gather(*(event.wait() for event in begun))
            some = []
            while not all(task.done() for task in streams):
                some.append((await whole(client, 0, 20)).status_code)
        return [end_of(task.result()) for task in streams], [
            *some, *(task.result().status_code for task in crowd),
        ]  # fmt: skip

    ends, statuses = asyncio.run(scenario())
    assert set(ends) <= {"length", "draining"}
    assert "draining" in ends  # by the drain policy of the replica: it had no time for all of it
    assert set(statuses) == {200}


def test_a_killed_replica_loses_no_request(fleet: RayFleet) -> None:
    wait(lambda: has_settled(fleet), "one replica has it all")

    async def scenario() -> tuple[list[str], list[httpx.Response]]:
        begun = [asyncio.Event() for _ in range(4)]
        async with client_of(fleet) as client, asyncio.TaskGroup() as group:
            streams = [group.create_task(stream(client, i, begun[i])) for i in range(4)]
            await asyncio.wait_for(asyncio.gather(*(e.wait() for e in begun)), PATIENCE_S)
            asked = [group.create_task(whole(client, i, 400)) for i in range(8)]
            await asyncio.sleep(0.5)
            (replica,) = await asyncio.to_thread(running, fleet)
            assert replica.pid is not None
            os.kill(replica.pid, signal.SIGKILL)
        return [end_of(task.result()) for task in streams], [task.result() for task in asked]

    ends, answers = asyncio.run(scenario())
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 400
    assert ends == ["replica_lost"] * 4


def test_a_machine_that_is_taken_away_takes_no_request_with_it(
    fleet: RayFleet, cluster: Any
) -> None:
    lost = cluster.list_all_nodes()[-1]

    def on_lost() -> list[ReplicaView]:
        return [replica for replica in running(fleet) if replica.node == lost.node_id]

    async def user(client: httpx.AsyncClient, index: int, over: threading.Event) -> list[int]:
        statuses = []
        while not over.is_set():
            statuses.append((await whole(client, index, 60)).status_code)
        return statuses

    async def users(over: threading.Event) -> list[int]:
        async with client_of(fleet) as client:
            found = await asyncio.gather(*(user(client, index, over) for index in range(20)))
        return [status for statuses in found for status in statuses]

    statuses: list[int] = []
    over = threading.Event()
    work = threading.Thread(target=lambda: statuses.extend(asyncio.run(users(over))))
    work.start()
    try:
        wait(lambda: len(running(fleet)) == 3 and bool(on_lost()), "one of three replicas is there")
        begin = len(fleet.decisions())
        cluster.remove_node(lost, allow_graceful=False)
        wait(lambda: not on_lost(), "Ray has noticed")
        wait(lambda: len(running(fleet)) == 3, "others have taken their place")
    finally:
        over.set()
        work.join()
    assert statuses and set(statuses) == {200}
    steps = fleet.decisions()[begin:]
    blind = [s for s in steps if s.metrics.get("num_replicas_ready", 0) < s.current]
    assert blind
    assert all(step.decision.replicas >= step.current >= 1 for step in blind)
