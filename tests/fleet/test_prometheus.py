"""What is read from Prometheus' HTTP API, and what of its answers is refused."""

import json
import socket
import threading

import pytest

from course_lib.fleet.metrics import METRICS, ReplicaMetrics
from course_lib.fleet.prometheus import (
    QUERIES,
    Prometheus,
    PrometheusError,
    PrometheusMetrics,
    promql,
)
from course_lib.fleet.prometheus_server import PrometheusServer
from tests.fleet.fake_prometheus import FakePrometheus, one, vector

JOB = {"job": "chat"}


@pytest.fixture
def fake():
    with FakePrometheus() as server:
        yield server


@pytest.fixture
def prometheus(fake):
    return Prometheus(fake.url)


def test_a_query_gives_one_number_or_none(fake, prometheus):
    fake.answers = {
        "sum(a)": one("2.5"),
        "scalar(a)": {
            "status": "success",
            "data": {"resultType": "scalar", "result": [1.5, "7"]},
        },
    }
    assert prometheus.query("sum(a)") == 2.5
    assert prometheus.query("scalar(a)") == 7
    assert prometheus.query('sum(b{job="x"}) > 1') is None
    assert fake.asked[-1] == 'sum(b{job="x"}) > 1'


def test_a_query_by_label_gives_a_number_for_each(fake, prometheus):
    fake.answers = {
        "up": vector(({"instance": "a"}, "1"), ({"instance": "b"}, "0")),
        "twice": vector(({"instance": "a", "i": "0"}, "1"), ({"instance": "a", "i": "1"}, "0")),
    }
    assert prometheus.query_by("up", "instance") == {"a": 1, "b": 0}
    assert prometheus.query_by("nothing", "instance") == {}
    for query, label in [("twice", "instance"), ("up", "zone")]:
        with pytest.raises(PrometheusError, match=rf"one series for each {label}; add by"):
            prometheus.query_by(query, label)


def test_several_series_are_no_number(fake, prometheus):
    fake.answers["a"] = vector(({"i": "0"}, "1"), ({"i": "1"}, "1"))
    with pytest.raises(PrometheusError, match=r"a gives 2 series, expected one; aggregate"):
        prometheus.query("a")


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf"])
def test_what_is_no_number_is_an_error_and_not_zero(fake, prometheus, value):
    fake.answers["a"] = one(value)
    with pytest.raises(PrometheusError, match=r"a is -?(nan|inf)"):
        prometheus.query("a")


def test_a_refusal_is_told_with_its_reason(fake, prometheus):
    fake.status = 400
    fake.body = json.dumps({"status": "error", "error": "parse error: unclosed"}).encode()
    with pytest.raises(PrometheusError, match=r"sum\(: .* answers 400, parse error: unclosed"):
        prometheus.query("sum(")
    fake.status, fake.body = 503, b"<html>a proxy</html>"
    with pytest.raises(PrometheusError, match="answers 503 Service Unavailable"):
        prometheus.query("a")


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b'{"status": "success"}',
        b'{"data": {"resultType": "matrix", "result": [{"metric": {}, "values": []}]}}',
        b'{"data": {"resultType": "vector", "result": [{"metric": {}, "value": [1, "x"]}]}}',
        b'{"data": {"resultType": "scalar", "result": null}}',
    ],
)
def test_answers_of_another_shape_are_refused(fake, prometheus, body):
    fake.body = body
    with pytest.raises(PrometheusError, match="expected a scalar or an instant vector"):
        prometheus.query("a")


def test_a_part_of_the_answer_is_none(fake, prometheus):
    fake.answers["sum(a)"] = {**one("1"), "warnings": ["store eu: connection refused"]}
    with pytest.raises(PrometheusError, match="a part is missing, store eu: connection refused"):
        prometheus.query("sum(a)")
    fake.answers["sum(a)"] = {**one("1"), "warnings": ["PromQL info: might not be a counter"]}
    assert prometheus.query("sum(a)") == 1


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(PrometheusError, match=rf"{url} does not answer: .*refused"):
        Prometheus(url).query("a")


def test_one_that_hangs_is_left_after_the_timeout(fake):
    fake.hang.clear()
    with pytest.raises(PrometheusError, match=r"does not answer: .*timed out"):
        Prometheus(fake.url, timeout_s=0.1).query("a")


def test_one_that_speaks_something_else():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"

        def speak():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0\r\n\r\n")

        thread = threading.Thread(target=speak)
        thread.start()
        with pytest.raises(PrometheusError, match="does not answer"):
            Prometheus(url).query("a")
        thread.join()


@pytest.mark.parametrize("url", ["", "localhost:9090", "ftp://a", "http://"])
def test_urls_that_cannot_be(url):
    with pytest.raises(ValueError, match=r"url must be like http://127\.0\.0\.1:9090"):
        Prometheus(url)


def test_labels_are_written_as_promql_does():
    assert promql("num_requests_waiting") == "sum(vllm:num_requests_waiting)"
    labels = {"job": "chat", "model_name": 'a "b"\\n'}
    assert promql("num_requests_running", labels) == (
        'sum(vllm:num_requests_running{job="chat",model_name="a \\"b\\"\\\\n"})'
    )
    assert promql("num_requests_waiting + num_requests_running", JOB) == (
        'sum(vllm:num_requests_waiting{job="chat"}) + sum(vllm:num_requests_running{job="chat"})'
    )
    for query in QUERIES:
        assert promql(query, JOB).count('{job="chat"}') == QUERIES[query].count("{selector}") > 0


def test_what_has_no_query_is_named():
    assert set(METRICS) - set(QUERIES) == {"gpu_utilization", "cpu_utilization"}
    with pytest.raises(ValueError, match="unknown metric in PromQL 'gpu_utilization'; known are"):
        promql("num_requests_waiting + gpu_utilization")


def test_the_fleets_metrics_and_those_of_each_replica(fake, prometheus):
    def by_instance(how, series, *values):
        rows = zip("abc", values, strict=False)
        fake.answers[f'{how} by (instance) ({series}{{job="chat"}})'] = vector(
            *(({"instance": instance}, value) for instance, value in rows)
        )

    for number, name in enumerate(QUERIES):
        fake.answers[promql(name, JOB)] = one(str(number))
    del fake.answers[promql("queue_age_s", JOB)]
    by_instance("max", "up", "1", "1", "0")
    by_instance("sum", "vllm:num_requests_waiting", "3", "0")
    by_instance("sum", "vllm:num_requests_running", "8", "2")
    by_instance("avg", "vllm:kv_cache_usage_perc", "0.75")

    metrics = PrometheusMetrics(prometheus, JOB).read()
    numbers = {name: float(number) for number, name in enumerate(QUERIES)}
    del numbers["queue_age_s"]
    assert dict(metrics) == numbers
    busy = {"num_requests_waiting": 3, "num_requests_running": 8, "kv_cache_utilization": 0.75}
    assert metrics.replicas == (
        ReplicaMetrics("a", True, busy),
        ReplicaMetrics("b", True, {"num_requests_waiting": 0, "num_requests_running": 2}),
        ReplicaMetrics("c", False),
    )


def test_no_series_at_all_are_no_metrics(prometheus):
    metrics = PrometheusMetrics(prometheus).read()
    assert dict(metrics) == {} and metrics.replicas == ()


def test_one_bad_number_and_nothing_is_read(fake, prometheus):
    fake.answers[promql("kv_cache_utilization")] = one("NaN")
    with pytest.raises(PrometheusError, match="kv_cache_usage_perc"):
        PrometheusMetrics(prometheus).read()


def test_what_was_before_an_outage_is_not_told_as_now(fake, prometheus):
    source = PrometheusMetrics(prometheus, JOB, max_age_s=30)
    fake.answers[promql("num_requests_waiting", JOB)] = one("5")
    age = 'time() - max(timestamp(vllm:num_requests_running{job="chat"}))'
    fake.answers[age] = one("29.5")
    assert source.read()["num_requests_waiting"] == 5
    fake.answers[age] = one("31")
    with pytest.raises(PrometheusError, match="the last scrape was 31 s ago"):
        source.read()


def test_a_program_that_is_not_there_or_does_not_start_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get install prometheus"):
        PrometheusServer({"chat": []})
    program = tmp_path / "prometheus"
    program.write_text("#!/bin/sh\necho 'no space left on device' >&2\nexit 1\n")
    program.chmod(0o755)
    with (
        pytest.raises(OSError, match="prometheus did not start: no space left on device"),
        PrometheusServer({"chat": []}),
    ):
        pass
    with pytest.raises(ValueError, match=r"scrape_interval_s must be a number at least 0\.001"):
        PrometheusServer({}, scrape_interval_s=0)
