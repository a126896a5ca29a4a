"""The real `prometheus` scrapes real servers, and autoscalers decide from PromQL.

Two `course serve` processes with the shipped model, real sockets. What Prometheus says is compared
with `/metrics` read directly; then a server and Prometheus itself are killed under running loops.
"""

import io
import json
import math
import re
import shutil
import socket
import time
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import httpx
import pytest

from course_lib.fleet.control_loop import (
    ControlLoop,
    NoMetrics,
    SafeAutoscaler,
    read_record,
    replay,
)
from course_lib.fleet.keda import Keda
from course_lib.fleet.manifest_spec import DeploymentSpec
from course_lib.fleet.manifests import scaled_object
from course_lib.fleet.metrics import FleetMetrics, measured
from course_lib.fleet.prometheus import (
    QUERIES,
    Prometheus,
    PrometheusError,
    PrometheusMetrics,
    promql,
)
from course_lib.fleet.prometheus_server import PrometheusServer
from course_lib.serving.scrape import histogram_quantile, scrape
from tests.fleet.safe_policies import JOB, LOAD, POLICIES
from tests.serving.servers import MODEL, ServeProcess, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None,
        reason="needs the program prometheus: sudo apt-get install prometheus",
    ),
]

SCRAPE_INTERVAL_S = 0.25
MAX_AGE_S = 4  # of a scrape; on a busy machine one may be late
#: What would run in the cluster; two requests a replica are its target.
SPEC = DeploymentSpec("chat", "example.com/course:1", max_num_seqs=2, requests_per_replica=2)
LONG = 3500  # tokens; many seconds of work


@pytest.fixture(scope="module")
def servers():
    with ServeProcess("--max-num-seqs", "2") as one, ServeProcess("--max-num-seqs", "2") as two:
        yield one, two


@pytest.fixture(scope="module")
def urls(servers):
    return [server.url for server in servers]


@pytest.fixture(scope="module")
def prometheus(urls):
    with PrometheusServer({"chat": urls}, SCRAPE_INTERVAL_S, SPEC.series_labels) as server:
        client = Prometheus(server.url)
        wait_until(lambda: client.query(promql("num_replicas_ready", JOB)) == 2)
        yield client


@contextmanager
def long_requests(counts):
    """So many requests at each URL, running or waiting until the end of the block."""
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": LONG, "ignore_eos": True}
    content = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: it\r\ncontent-length: {len(content)}\r\n"
    head += "content-type: application/json\r\n\r\n"
    with ExitStack() as stack:
        for url, count in counts.items():
            parts = urlsplit(url)
            for _ in range(count):
                connection = socket.create_connection((parts.hostname, parts.port), 30)
                stack.enter_context(connection).sendall(head.encode() + content)
        yield


def total(urls, series):
    """Of all servers, from their `/metrics`."""
    return sum(scrape(url).value(series) for url in urls)


def in_flight(urls):
    found = [scrape(url) for url in urls]  # once each: a request may begin to run in between
    names = ("vllm:num_requests_waiting", "vllm:num_requests_running")
    return sum(each.value(name) for each in found for name in names)


def settled(urls):
    wait_until(lambda: in_flight(urls) == 0, 60, "the servers became idle")


def test_it_understands_all_queries(prometheus):
    for labels in (None, JOB, {"job": "chat", "model_name": 'a "b" \\ ü'}):
        for name in QUERIES:
            query = promql(name, labels)
            answer = httpx.get(f"{prometheus.url}/api/v1/query", params={"query": query}).json()
            assert answer["status"] == "success", (query, answer)
            # KEDA reads vectors alone.
            assert answer["data"]["resultType"] == "vector", query
    with pytest.raises(PrometheusError, match=r"answers 400, .*parse error"):
        prometheus.query("sum(vllm:num_requests_waiting")


def test_gauges_are_those_of_the_servers(prometheus, urls):
    source = PrometheusMetrics(prometheus, JOB)
    with long_requests({urls[0]: 3, urls[1]: 4}):
        wait_until(lambda: prometheus.query(promql("num_requests_running", JOB)) == 4)
        wait_until(lambda: prometheus.query(promql("num_requests_waiting", JOB)) == 3)
        metrics = source.read()
        assert in_flight(urls) == 7, "a request ended too early for this test"
        waiting, running = metrics["num_requests_waiting"], metrics["num_requests_running"]
        assert (waiting, running) == (3, 4)
        assert waiting == total(urls, "vllm:num_requests_waiting")
        assert running == total(urls, "vllm:num_requests_running")
        assert metrics["num_replicas_ready"] == 2
        assert [replica.values["num_requests_waiting"] for replica in metrics.replicas] == [
            scrape(f"http://{replica.name}").value("vllm:num_requests_waiting")
            for replica in metrics.replicas
        ]
        # These go on growing, so that what Prometheus says lies between two looks.
        for name, series, combine in [
            ("kv_cache_utilization", "vllm:kv_cache_usage_perc", lambda used: sum(used) / 2),
            ("queue_age_s", "course:oldest_waiting_request_age_seconds", max),
        ]:
            before = combine([scrape(url).value(series) for url in urls])
            wait_until(lambda name=name, low=before: prometheus.query(promql(name, JOB)) > low)
            told = prometheus.query(promql(name, JOB))
            after = combine([scrape(url).value(series) for url in urls])
            assert 0 < before < told <= after, name
    settled(urls)


class Query:
    """A source that asks one query, word by word, and calls the answer `load`."""

    def __init__(self, prometheus, query):
        self.prometheus, self.query = prometheus, query

    def read(self):
        return FleetMetrics({"load": self.prometheus.query(self.query)})


def test_keda_decides_by_the_query_of_the_manifest(prometheus, urls):
    scaled = scaled_object(SPEC).body["spec"]
    query = scaled["triggers"][0]["metadata"]["query"]

    def make(clock):
        keda = Keda.from_scaled_object(scaled, {query: "load"}, clock)
        return SafeAutoscaler(keda, ["load"], keda.fallback)

    fleet = FakeFleet(2)
    loop = ControlLoop(Query(prometheus, query), make, fleet)
    with long_requests({urls[0]: 3, urls[1]: 4}):
        # While a request begins to run, a server may count it twice or not at all.
        wait_until(lambda: prometheus.query(promql("num_requests_running", JOB)) == 4)
        wait_until(lambda: prometheus.query(query) == 7)
        step = loop.step()
        assert step.metrics["load"] == in_flight(urls) == 7
        assert measured(PrometheusMetrics(prometheus, SPEC.series_labels).read(), LOAD) == 7
    assert step.decision.replicas == math.ceil(7 / 2)
    assert fleet.orders == [4]
    settled(urls)


def test_latencies_lengths_and_rates_are_those_of_the_last_minute(urls):
    window_s = 60
    settled(urls)
    with PrometheusServer({"chat": urls}, SCRAPE_INTERVAL_S) as server:
        prometheus = Prometheus(server.url)  # knows nothing of what was before
        wait_until(lambda: prometheus.query(promql("ttft_p95_ms", JOB)) is not None)
        # Where nothing was observed there is 0, not NaN.
        assert dict(PrometheusMetrics(prometheus, JOB).read()) == {
            **dict.fromkeys(QUERIES, 0),
            "num_replicas_ready": 2,
        }
        before = [scrape(url) for url in urls]
        usage = []
        for index in range(8):
            body = {"model": MODEL, "prompt": "Hello there " * (index + 1), "max_tokens": 5 + index}
            answer = httpx.post(
                f"{urls[index % 2]}/v1/completions", json={**body, "ignore_eos": True}, timeout=60
            )
            usage.append(answer.json()["usage"])
        after = [scrape(url) for url in urls]

        def quantile_ms(name):
            changes = [
                now.buckets(f"vllm:{name}", then) for then, now in zip(before, after, strict=True)
            ]
            edges = [edge for edge, _ in changes[0]]
            counts = [sum(change[i][1] for change in changes) for i in range(len(edges))]
            return 1000 * histogram_quantile(0.95, list(zip(edges, counts, strict=True)))

        expected = {
            "ttft_p95_ms": quantile_ms("time_to_first_token_seconds"),
            "tpot_p95_ms": quantile_ms("request_time_per_output_token_seconds"),
            "prompt_tokens_mean": sum(each["prompt_tokens"] for each in usage) / 8,
            "output_tokens_mean": sum(each["completion_tokens"] for each in usage) / 8,
            "request_rate_per_s": 8 / window_s,
        }
        assert expected["output_tokens_mean"] == 8.5
        found = {}

        def as_expected():
            found.update((name, prometheus.query(promql(name, JOB))) for name in expected)
            # A rate extends what it saw by half an interval or one at either end.
            return found == pytest.approx(expected, rel=0.1)

        wait_until(as_expected, window_s / 2, "PromQL came near what was sent")


class FakeFleet:
    def __init__(self, replicas):
        self.replicas = replicas
        self.orders = []

    def current_replicas(self):
        return self.replicas

    def scale_to(self, replicas):
        self.orders.append(replicas)
        self.replicas = replicas


class Loops:
    """A loop for each policy, on the same Prometheus; all step together."""

    def __init__(self, prometheus, replicas):
        source = PrometheusMetrics(prometheus, JOB, MAX_AGE_S)
        self.fleets = {name: FakeFleet(replicas) for name in POLICIES}
        self.records = {name: io.StringIO() for name in POLICIES}
        self.loops = {
            name: ControlLoop(source, make, self.fleets[name], record=self.records[name])
            for name, make in POLICIES.items()
        }

    def step(self):
        time.sleep(SCRAPE_INTERVAL_S)
        return {name: loop.step() for name, loop in self.loops.items()}

    def step_until(self, condition, what):
        def step():
            self.last = self.step()
            return condition(self.last)

        wait_until(step, 60, what)
        return self.last

    def replicas(self):
        return {name: fleet.replicas for name, fleet in self.fleets.items()}


def test_a_reclaim_and_an_outage_move_nothing_and_the_record_replays(urls, caplog):
    """One run through all: load, a server killed, Prometheus killed, restarted, then quiet."""
    with (
        ServeProcess("--max-num-seqs", "2") as doomed,
        PrometheusServer({"chat": [urls[0], doomed.url]}, SCRAPE_INTERVAL_S) as server,
    ):
        client = Prometheus(server.url)
        wait_until(lambda: client.query(promql("num_replicas_ready", JOB)) == 2)
        wait_until(lambda: client.query(promql("ttft_p95_ms", JOB)) is not None)
        loops = Loops(client, replicas=2)
        with long_requests({urls[0]: 3, doomed.url: 4}):
            wait_until(lambda: client.query(promql("num_requests_running", JOB)) == 4)
            wait_until(lambda: client.query(promql(LOAD, JOB)) == 7)
            loops.step_until(
                lambda steps: steps["keda"].decision.replicas == 4, "KEDA saw 7 requests"
            )
            # A spot instance is reclaimed: its requests go with it, so the load seems less.
            doomed.process.kill()
            steps = loops.step_until(
                lambda steps: steps["keda"].metrics.get("num_replicas_ready") == 1,
                "the server was missed",
            )
            assert steps["keda"].metrics["num_requests_running"] <= 2
            assert [replica.ready for replica in steps["keda"].metrics.replicas].count(False) == 1
        # When nobody is served any more, KEDA would go to zero; but one of the replicas is unknown.
        settled(urls[:1])
        loops.step_until(
            lambda steps: re.match(
                "1 of 4 replicas report, so no scaling down; otherwise cooldown over",
                steps["keda"].decision.reason,
            ),
            "KEDA was kept from zero",
        )
        at_the_outage = loops.replicas()
        assert min(at_the_outage.values()) >= 2

        server.kill()
        killed_s = time.monotonic()
        steps = [loops.step() for _ in range(6)]
        for name, replicas in at_the_outage.items():
            decisions = [step[name].decision for step in steps]
            assert all(isinstance(step[name].metrics, NoMetrics) for step in steps)
            assert [decision.replicas for decision in decisions[:3]] == [replicas] * 3
            assert {decision.replicas for decision in decisions[3:]} == {max(replicas, 3)}
            assert all("Connection refused" in decision.reason for decision in decisions)
        assert "4 held, failure 6 in a row" in caplog.text

        # A new server takes the place of the one that was lost, and Prometheus comes back. Until
        # it has scraped, which takes it 5 s, it tells what was before; that is too old.
        held = loops.replicas()
        wait_until(lambda: time.monotonic() - killed_s > MAX_AGE_S)
        server.set_targets("chat", urls)
        server.start()
        steps = loops.step()
        assert {"the last scrape was" in step.decision.reason for step in steps.values()} == {True}
        assert loops.replicas() == held
        loops.step_until(
            lambda steps: steps["keda"].metrics.get("num_replicas_ready") == 2, "it scraped again"
        )
        for _ in range(4):
            loops.step()

    assert all(loops.fleets[name].orders for name in ("gpu", "hpa", "keda", "slo", "predictive"))
    for name, make in POLICIES.items():
        lines = loops.records[name].getvalue().splitlines()
        steps = read_record(lines)
        decided = [step.decision for step in steps]
        assert len(set(decided)) > 2, name
        assert replay(steps, make) == decided, name
        tampered = [
            re.sub(r'("num_requests_waiting"|"ttft_p95_ms"): [\d.e+-]+', r"\1: 9999", line)
            for line in lines
        ]
        assert replay(read_record(tampered), make) != decided, name
