"""Reading /metrics: values, differences of histograms, quantiles, and a watch in a thread."""

import http.server
import math
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.serving.scrape import Watch, histogram_quantile, quantile, scrape
from course_lib.serving.vllm_server import VllmServer, is_installed

TEXT = """\
# HELP vllm:num_requests_waiting Requests that wait.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 7.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 4.0
# TYPE vllm:admission_rejections_total counter
vllm:admission_rejections_total{model_name="m",reason="queue_age"} 2.0
vllm:admission_rejections_total{model_name="m",reason="max_num_queued_reqs"} 3.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5",model_name="m"} %d.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="1.0",model_name="m"} %d.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} %d.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 10.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 5.0
"""


class _Handler(http.server.BaseHTTPRequestHandler):
    counts = (10, 10, 10)

    def do_GET(self) -> None:
        body = (TEXT % self.counts).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_values_are_summed_over_labels_or_given_by_one(url: str) -> None:
    found = scrape(url)
    assert found.value("vllm:num_requests_waiting") == 7
    assert found.value("vllm:admission_rejections_total") == 5
    assert found.by_label("vllm:admission_rejections_total", "reason") == {
        "queue_age": 2,
        "max_num_queued_reqs": 3,
    }
    assert found.value("vllm:nothing") == 0


def test_a_quantile_counts_what_came_between_two_scrapes(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = scrape(url)
    monkeypatch.setattr(_Handler, "counts", (10, 30, 30))
    after = scrape(url)
    name = "vllm:time_to_first_token_seconds"
    assert after.buckets(name) == [(0.5, 10), (1.0, 30), (math.inf, 30)]
    assert after.buckets(name, before) == [(0.5, 0), (1.0, 20), (math.inf, 20)]
    assert quantile(after, name, 0.5, before) == 0.75
    assert quantile(after, name, 0.25) == pytest.approx(0.375)


@given(
    st.lists(st.integers(0, 50), min_size=2, max_size=8),
    st.floats(0.01, 1.0),
    st.floats(0.01, 1.0),
)
def test_quantiles_lie_within_the_edges_and_rise(news: list[int], a: float, b: float) -> None:
    counts = [float(sum(news[: i + 1])) for i in range(len(news))]
    edges = [*(i + 1.0 for i in range(len(news) - 1)), math.inf]
    buckets = list(zip(edges, counts, strict=True))
    low, high = (histogram_quantile(q, buckets) for q in sorted((a, b)))
    if counts[-1] == 0:
        assert math.isnan(low)
    else:
        assert 0 <= low <= high + 1e-9 and high <= edges[-2]


def test_a_watch_reads_until_it_ends_and_knows_no_age_of_vllm(url: str) -> None:
    ended = threading.Event()
    with Watch(url, interval_s=0.01) as watch:
        ended.wait(0.2)
    assert len(watch.samples) >= 2
    assert (watch.samples[0].num_running, watch.samples[0].num_waiting) == (4, 7)
    assert watch.samples[0].oldest_waiting_s is None
    times = [sample.time_s for sample in watch.samples]
    assert times == sorted(times)


def test_a_watch_of_a_server_that_has_gone_ends_quietly() -> None:
    with Watch("http://127.0.0.1:9") as watch:
        pass
    assert watch.samples == []


FAKE = """\
import http.server, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
if "--broken" in sys.argv:
    sys.exit("no GPU found")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(" ".join(sys.argv[1:]).encode())
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))


def test_vllm_starts_with_our_limits_and_is_gone_afterwards(fake_vllm: None) -> None:
    from urllib.request import urlopen

    with VllmServer(Path("/models/merchant-chat"), max_num_seqs=4) as server:
        options = urlopen(server.url).read().decode()
        assert "--model /models/merchant-chat --served-model-name merchant-chat" in options
        assert "--max-num-seqs 4" in options
    with pytest.raises(OSError):
        urlopen(server.url)


def test_vllm_that_does_not_start_shows_the_end_of_its_log(fake_vllm: None) -> None:
    server = VllmServer(Path("/m"), max_num_seqs=4, options=("--broken",))
    with pytest.raises(RuntimeError, match="no GPU found"), server:
        pass


def test_whether_vllm_is_there_is_known_without_importing_it() -> None:
    assert is_installed() in (True, False)
    assert "vllm" not in sys.modules
