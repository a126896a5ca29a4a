"""The load generator: what it sends, what it measures, and that it hides no failure."""

import asyncio
import itertools
import json
import socket
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.serving import load_client
from course_lib.serving.http_client import HttpClient
from course_lib.serving.load_client import (
    SLO,
    LoadReport,
    RequestRecord,
    ServerNotUsable,
    TrafficClass,
    Workload,
    load,
    run_load,
)
from course_lib.serving.load_report import OUTCOMES, Percentiles
from course_lib.traces.trace import Trace, TraceRequest
from tests.serving.stub_server import MODEL, StubServer


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_client, "PAUSE_AFTER_FAILURE_S", 0.0)


def quiet(url: str, workload: Workload, **options) -> LoadReport:
    return load(url, workload, show_progress=False, **options)


def few(**changes) -> Workload:
    return Workload(
        **{"users": 2, "num_requests": 4, "prompt_tokens": 5, "output_tokens": 3, **changes}
    )


# What is sent


def test_the_same_seed_gives_the_same_requests_and_another_seed_others():
    def prompts(**changes):
        workload = few(num_requests=20, prompt_tokens=(1, 50), output_tokens=(1, 9), **changes)
        return [(r.prompt, r.output_tokens) for r in workload.requests()]

    assert prompts() == prompts()
    assert prompts() != prompts(seed=1)


def test_prompts_do_not_depend_on_how_requests_arrive():
    closed = few(num_requests=20, prompt_tokens=(1, 50))
    opened = few(num_requests=20, prompt_tokens=(1, 50), users=None, rate_per_s=3.0)
    assert [r.prompt for r in closed.requests()] == [r.prompt for r in opened.requests()]


@given(
    low=st.integers(1, 50),
    spread=st.integers(0, 50),
    shared=st.floats(0, 1),
    seed=st.integers(0, 1000),
    vocab_size=st.sampled_from([None, 1, 500]),
)
@settings(max_examples=50)
def test_lengths_are_within_their_limits_and_prompts_share_what_was_asked(
    low, spread, shared, seed, vocab_size
):
    workload = Workload(
        users=1,
        num_requests=8,
        prompt_tokens=(low, low + spread),
        output_tokens=(low, low + spread),
        shared_prefix=shared,
        seed=seed,
        vocab_size=vocab_size,
    )
    planned = list(workload.requests())
    assert [r.index for r in planned] == list(range(8))
    pieces = [r.prompt.split() if isinstance(r.prompt, str) else r.prompt for r in planned]
    for request, parts in zip(planned, pieces, strict=True):
        assert len(parts) == request.prompt_tokens
        assert low <= request.prompt_tokens <= low + spread
        assert low <= request.output_tokens <= low + spread
        if vocab_size:
            assert all(0 <= token < vocab_size for token in parts)
    for one, other in itertools.combinations(pieces, 2):
        common = round(shared * min(len(one), len(other)))
        assert one[:common] == other[:common]


def test_without_a_shared_prefix_prompts_part_soon():
    workload = few(num_requests=20, prompt_tokens=64)
    starts = {" ".join(str(r.prompt).split()[:4]) for r in workload.requests()}
    assert len(starts) == 20


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process():
    workload = few(num_requests=4000, users=None, rate_per_s=5.0)
    gaps = np.diff([0.0] + [r.arrival_s for r in workload.requests()])
    assert (gaps >= 0).all()
    # The mean of 4000 exponential gaps is within 5 standard errors of 0.2 s; so is their spread.
    assert gaps.mean() == pytest.approx(0.2, rel=5 / 4000**0.5)
    assert gaps.std() == pytest.approx(0.2, rel=0.15)


def test_an_open_loop_ends_at_its_duration_and_a_closed_one_has_no_arrivals():
    arrivals = [
        r.arrival_s for r in Workload(rate_per_s=100.0, duration_s=2.0, prompt_tokens=1).requests()
    ]
    assert 100 < len(arrivals) < 300
    assert max(arrivals) < 2.0
    endless = Workload(users=1, duration_s=1.0, prompt_tokens=1)
    assert all(r.arrival_s is None for r in itertools.islice(endless.requests(), 50))
    assert endless.expected_requests is None
    assert few().expected_requests == 4


def test_classes_are_mixed_by_their_shares():
    workload = few(
        num_requests=2000,
        prompt_tokens=1,
        classes=(TrafficClass("a", share=3.0), TrafficClass("b", share=1.0)),
    )
    names = [r.traffic_class.name for r in workload.requests()]
    assert names.count("a") == pytest.approx(1500, abs=100)


TRACE = Trace(
    "rush",
    (TraceRequest(0.0, 3960, 109), TraceRequest(4.0, 374, 44), TraceRequest(4.5, 20, 1000)),
    max_prompt_tokens=4000,
)


def test_a_trace_gives_arrivals_and_lengths():
    workload = Workload(trace=TRACE)
    planned = list(workload.requests())
    assert [r.arrival_s for r in planned] == [0.0, 4.0, 4.5]
    assert [len(r.prompt.split()) for r in planned] == [3960, 374, 20]
    assert [r.output_tokens for r in planned] == [109, 44, 1000]
    assert workload.expected_requests == 3
    assert Workload(trace=TRACE, duration_s=4.2).expected_requests == 2


def test_a_trace_can_be_used_for_its_lengths_alone():
    closed = list(Workload(trace=TRACE, users=1, num_requests=5).requests())
    assert [r.output_tokens for r in closed] == [109, 44, 1000, 109, 44]
    assert all(r.arrival_s is None for r in closed)


def test_a_report_names_the_trace_and_how_it_was_changed():
    described = Workload(trace=TRACE).describe()["trace"]
    assert described["name"] == "rush"
    assert described["max_prompt_tokens"] == 4000 and described["num_requests"] == 3
    json.dumps(described)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate_per_s": 1.0}, "users and rate_per_s contradict"),
        ({"users": None}, "say how requests arrive"),
        ({"num_requests": None}, "say when to stop"),
        ({"users": 0}, "users must be a whole number"),
        ({"num_requests": 0}, "num_requests must be"),
        ({"duration_s": 0.0}, "duration_s must be a number above 0"),
        ({"users": None, "rate_per_s": float("nan")}, "rate_per_s must be"),
        ({"shared_prefix": 1.5}, "shared_prefix must be"),
        ({"prompt_tokens": 0}, "prompt_tokens must be"),
        ({"prompt_tokens": (5, 4)}, r"prompt_tokens\[1\] must be a whole number of at least 5"),
        ({"output_tokens": (0, 4)}, r"output_tokens\[0\] must be"),
        ({"vocab_size": 0}, "vocab_size must be"),
        ({"classes": ()}, "classes is empty"),
        ({"classes": (TrafficClass(), TrafficClass())}, "two classes have the same name"),
    ],
)
def test_a_workload_that_makes_no_sense_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        few(**changes)


def test_a_share_and_an_slo_must_be_positive_and_a_priority_a_whole_number():
    with pytest.raises(ValueError, match="priority of class 'a' must be"):
        TrafficClass("a", priority=1.5)
    with pytest.raises(ValueError, match="share of class 'a' must be"):
        TrafficClass("a", share=0.0)
    with pytest.raises(ValueError, match="tpot_s must be"):
        SLO(1.0, 0.0)


# What is computed


def record(index=0, start_s=0.0, times=(), end_s=0.0, **changes) -> RequestRecord:
    return RequestRecord(
        index,
        "default",
        10,
        len(times),
        start_s=start_s,
        chunk_times_s=list(times),
        end_s=end_s,
        output_tokens=changes.pop("output_tokens", len(times)),
        **changes,
    )


def report_of(*records: RequestRecord, slo: SLO | None = None) -> LoadReport:
    return LoadReport(
        url="http://127.0.0.1:1",
        model=MODEL,
        api="completions",
        workload={},
        slo=slo or SLO(),
        started_at="2026-01-01T00:00:00+00:00",
        duration_s=10.0,
        client_cpu_s=1.0,
        records=records,
    )


def test_latencies_of_one_request_by_hand():
    one = record(start_s=1.0, times=[1.5, 1.7, 2.3], end_s=2.4)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.tpot_s == pytest.approx(0.4)
    assert one.itl_s == pytest.approx([0.2, 0.6])
    assert one.e2e_s == pytest.approx(1.4)
    # Two chunks of two tokens each: ITL is between chunks, TPOT for each token.
    pairs = record(times=[1.0, 2.5], output_tokens=4)
    assert pairs.tpot_s == pytest.approx(0.5)
    assert record(times=[1.0]).tpot_s is None
    assert record().ttft_s is None


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=60))
def test_percentiles_are_those_of_numpy(values):
    found = Percentiles.of(values)
    assert found is not None
    assert found.p50 == pytest.approx(np.quantile(values, 0.5))
    assert found.p95 == pytest.approx(np.quantile(values, 0.95))
    assert found.p99 == pytest.approx(np.quantile(values, 0.99))
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert found.count == len(values)


def test_percentiles_by_hand():
    found = Percentiles.of([float(n) for n in range(101)])
    assert found is not None and (found.p50, found.p95, found.p99) == (50.0, 95.0, 99.0)
    assert Percentiles.of([]) is None


def test_a_report_counts_only_what_was_served_in_latencies_and_all_in_goodput():
    report = report_of(
        record(0, times=[1.0, 1.1], end_s=1.1),  # meets both
        record(1, times=[1.0, 2.0], end_s=2.0),  # too slow a token
        record(2, times=[3.0, 3.1], end_s=3.1),  # too late a first one
        record(3, times=[0.5], end_s=0.5),  # one token: no TPOT to miss
        record(4, times=[0.5, 0.6], end_s=0.6, outcome="cut", status=200, reason="no_final_event"),
        record(5, end_s=0.1, outcome="refused", status=429, reason="queue_full"),
        slo=SLO(ttft_s=2.0, tpot_s=0.5),
    )
    assert report.goodput().met == 2
    assert report.goodput().share == pytest.approx(2 / 6)
    assert report.goodput().rate_per_s == pytest.approx(0.2)
    assert report.goodput(SLO(5.0, 5.0)).met == 4
    latency = report.latency
    assert latency["ttft"] is not None and latency["ttft"].count == 4
    assert latency["ttft"].p50 == pytest.approx(1.0)
    assert latency["tpot"] is not None and latency["tpot"].count == 3
    assert report.output_tokens == 7
    assert report.output_tokens_per_s == pytest.approx(0.7)
    assert report.requests_per_s == pytest.approx(0.4)
    assert report.outcomes == {"ok": 4, "refused": 1, "cut": 1}
    assert report.reasons == {"cut: no_final_event": 1, "refused: queue_full": 1}
    assert report.statuses == {"200": 1, "429": 1, "none": 4}
    assert report.client_cpu_share == pytest.approx(0.1)


def test_a_run_without_a_reply_has_no_latencies_and_no_goodput():
    report = report_of(record(outcome="refused", status=503))
    assert report.latency == {"ttft": None, "tpot": None, "itl": None, "e2e": None}
    assert report.goodput().share == 0.0
    assert json.loads(report.to_json())["summary"]["latency_s"]["ttft"] is None
    assert report_of().goodput().share == 0.0


def test_a_saved_report_is_read_back_and_has_summaries(tmp_path):
    report = report_of(record(times=[1.0, 1.25], end_s=1.5), record(1, outcome="refused"))
    path = report.save(tmp_path / "new" / "report.json")
    assert LoadReport.read(path) == LoadReport(**{**vars(report), "records": list(report.records)})
    saved = json.loads(path.read_text())
    assert saved["summary"]["latency_s"]["e2e"]["p99"] == 1.5
    assert saved["summary"]["outcomes"] == {"ok": 1, "refused": 1}
    assert saved["by_class"]["default"]["num_requests"] == 2
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a saved load report"):
        LoadReport.read(path)


# Against a server


def test_a_closed_loop_sends_all_and_never_more_than_its_users():
    with StubServer(token_s=0.002) as server:
        report = quiet(server.url, few(users=3, num_requests=12))
    assert report.outcomes == {"ok": 12}
    assert report.statuses == {"200": 12}
    assert 1 <= server.most_in_flight <= 3
    assert report.model == MODEL
    assert report.output_tokens == 36
    assert report.counted_by_server and report.other_length == 0
    sent = server.requests[0]
    assert sent["max_tokens"] == 3 and sent["ignore_eos"] is True and sent["stream"] is True
    assert sent["stream_options"] == {"include_usage": True}
    assert {r["prompt"] for r in server.requests} == {r.prompt for r in _plans(12)}
    for one in report.records:
        assert one.prompt_tokens == 5 and one.finish_reason == "length"
        assert len(one.chunk_times_s) == 3
        assert one.start_s < one.chunk_times_s[0] <= one.chunk_times_s[-1] <= one.end_s


def _plans(count: int):
    return few(num_requests=count).requests()


def test_an_open_loop_does_not_wait_for_replies():
    with StubServer(first_token_s=0.3) as server:
        report = quiet(server.url, few(users=None, rate_per_s=1000.0, num_requests=10))
    assert report.outcomes == {"ok": 10}
    assert server.most_in_flight > 2
    assert report.send_lag_p99_s is not None and report.send_lag_p99_s >= 0
    assert all(r.start_s >= (r.scheduled_s or 0) for r in report.records)


def test_delays_of_the_server_are_seen_where_they_happen():
    with StubServer(first_token_s=0.2, token_s=0.05) as server:
        report = quiet(server.url, few(users=1, num_requests=2, output_tokens=4))
    for one in report.records:  # a busy machine can only make them longer
        assert one.ttft_s is not None and one.ttft_s >= 0.2
        assert one.tpot_s is not None and one.tpot_s >= 0.04
        assert one.e2e_s >= 0.35


def test_a_duration_ends_a_closed_loop():
    with StubServer() as server:
        report = quiet(server.url, few(num_requests=None, duration_s=0.3))
    assert report.records and all(r.start_s < 0.3 for r in report.records)


def test_the_chat_api_sends_messages_and_does_not_take_the_role_for_a_token():
    with StubServer(first_token_s=0.2) as server:
        report = quiet(server.url + "/v1/", few(), api="chat")
    assert report.outcomes == {"ok": 4}
    assert server.requests[0]["messages"][0]["role"] == "user"
    assert "prompt" not in server.requests[0]
    assert all(len(r.chunk_times_s) == 3 for r in report.records)
    assert all(r.ttft_s is not None and r.ttft_s >= 0.2 for r in report.records)


def test_token_ids_are_sent_as_they_are():
    with StubServer() as server:
        report = quiet(server.url, few(vocab_size=100))
        with pytest.raises(ValueError, match="takes only text"):
            quiet(server.url, few(vocab_size=100), api="chat")
    assert all(len(r["prompt"]) == 5 and max(r["prompt"]) < 100 for r in server.requests)
    assert [r.prompt_tokens for r in report.records] == [5] * 4


def test_without_the_servers_count_chunks_are_counted_and_the_report_says_so():
    with StubServer(usage=False, tokens_per_chunk=3) as server:
        report = quiet(server.url, few(output_tokens=6))
    assert not report.counted_by_server
    assert report.output_tokens == 4 * 2
    assert report.other_length == 4
    with StubServer() as server:
        report = quiet(server.url, few(), include_usage=False, ignore_eos=False)
    assert "stream_options" not in server.requests[0] and "ignore_eos" not in server.requests[0]
    assert report.outcomes == {"ok": 4} and not report.counted_by_server


def test_several_tokens_in_a_chunk_are_one_gap_but_count_each():
    with StubServer(tokens_per_chunk=2) as server:
        report = quiet(server.url, few(num_requests=1, output_tokens=6))
    (one,) = report.records
    assert len(one.itl_s) == 2 and one.output_tokens == 6


def test_refusals_are_counted_by_status_and_reason_with_the_time_to_stay_away():
    with StubServer(refuse=[429, 503, 429], retry_after="0.01") as server:
        report = quiet(server.url, few(num_requests=5))
    assert report.outcomes == {"ok": 2, "refused": 3}
    assert report.statuses == {"200": 2, "429": 2, "503": 1}
    assert report.reasons == {"refused: queue_full": 3}
    refused = [r for r in report.records if not r.ok]
    assert all(r.retry_after_s == 0.01 and r.message == "the queue is full" for r in refused)


def test_a_user_stays_away_as_long_as_the_server_says():
    with StubServer(refuse=[429], retry_after="0.4") as server:
        report = quiet(server.url, few(users=1, num_requests=2))
    first, second = report.records
    assert not first.ok and second.ok
    assert second.start_s - first.end_s >= 0.4


def test_a_user_does_not_stay_away_for_ever(monkeypatch):
    monkeypatch.setattr(load_client, "MAX_RETRY_AFTER_S", 0.01)
    with StubServer(refuse=[429], retry_after="86400") as server:
        report = quiet(server.url, few(users=1, num_requests=2))
    assert report.outcomes == {"ok": 1, "refused": 1}
    assert report.records[0].retry_after_s == 86400


@pytest.mark.parametrize("value", [None, "tomorrow", "inf"])
def test_a_retry_after_that_says_nothing_is_none(value):
    with StubServer(refuse=[503], retry_after=value) as server:
        report = quiet(server.url, few(num_requests=1))
    assert report.records[0].retry_after_s is None


def test_a_retry_after_may_be_a_date():
    later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    with StubServer(refuse=[503], retry_after=later) as server:
        workload = few(users=None, rate_per_s=100.0, num_requests=1)  # nobody waits for it
        report = quiet(server.url, workload)
    assert report.records[0].retry_after_s == pytest.approx(3600, abs=120)


@pytest.mark.parametrize(
    ("behaviour", "outcome", "reason", "chunks"),
    [
        ({"break_after": 2}, "cut", "ConnectionBroken", 2),
        ({"final_event": False}, "cut", "no_final_event", 3),
        ({"error_after": 1}, "stream_error", "EngineError", 1),
        ({"garbage": True}, "stream_error", "not_an_event", 3),
        ({"silent": True}, "empty", "no_text", 0),
        ({"refuse": [400] * 4}, "http_error", "queue_full", 0),
        ({"refuse": [500] * 4}, "http_error", "queue_full", 0),
    ],
)
def test_each_way_to_fail_has_a_name_and_is_not_in_the_latencies(
    behaviour, outcome, reason, chunks
):
    assert outcome in OUTCOMES
    with StubServer(**behaviour) as server:
        report = quiet(server.url, few())
    assert report.outcomes == {outcome: 4}
    assert report.reasons == {f"{outcome}: {reason}": 4}
    assert all(len(r.chunk_times_s) == chunks for r in report.records)
    assert report.latency["e2e"] is None and report.goodput().met == 0


def test_a_request_that_takes_too_long_is_given_up():
    with StubServer(hang=True) as server:
        report = quiet(server.url, few(num_requests=2), timeout_s=0.3)
    assert report.outcomes == {"timeout": 2}
    assert report.records[0].message == "not done in 0.3 s"


def test_a_server_that_goes_away_is_a_connection_error():
    with StubServer() as server:
        pass
    record_of_it = asyncio.run(_one_request_to(server.url))
    assert record_of_it.outcome == "connection_error"
    assert record_of_it.reason == "ConnectionRefusedError"
    assert record_of_it.status is None


async def _one_request_to(url: str) -> RequestRecord:
    run = load_client._Run(HttpClient(url), "completions", {}, {}, 60.0, None)
    return await run.send(next(few().requests()))


def test_tenants_and_priorities_are_sent_and_reported_for_each_class():
    classes = (
        TrafficClass("paid", tenant="acme", priority=0),
        TrafficClass("free", tenant="misc", priority=7),
        TrafficClass("plain"),
    )
    with StubServer() as server:
        report = quiet(
            server.url, few(num_requests=30, classes=classes), headers={"X-Trace": "yes"}
        )
    seen = {(h.get("x-tenant"), b.get("priority")) for h, b in _sent(server)}
    assert seen == {("acme", 0), ("misc", 7), (None, None)}
    assert all(h["x-trace"] == "yes" for h in server.headers)
    assert report.class_names == ["free", "paid", "plain"]
    assert sum(len(report.of_class(name).records) for name in report.class_names) == 30
    assert {r.tenant for r in report.of_class("paid").records} == {"acme"}


def _sent(server: StubServer):
    return zip(server.headers, server.requests, strict=True)


def test_a_key_is_sent_and_a_missing_one_is_asked_for():
    with StubServer(api_key="secret") as server:
        assert quiet(server.url, few(), api_key="secret").outcomes == {"ok": 4}
        assert server.headers[0]["authorization"] == "Bearer secret"
        with pytest.raises(ServerNotUsable, match=r"answered 401 and names no model.*api_key"):
            quiet(server.url, few())


def test_a_server_without_a_list_of_models_needs_a_name():
    with StubServer(models=False) as server:
        with pytest.raises(ServerNotUsable, match="names no model; give model"):
            quiet(server.url, few())
        assert quiet(server.url, few(), model="mine").model == "mine"
    assert server.requests[0]["model"] == "mine"


def test_an_unreachable_server_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ServerNotUsable, match=f"cannot reach a server at {url} .*is it running"):
        quiet(url, few())


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://a:b", ""])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="url must be like http://"):
        quiet(url, few())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"api": "embeddings"}, "unknown api 'embeddings'; known are completions, chat"),
        ({"timeout_s": 0}, "timeout_s must be"),
        ({"headers": {"X-A": "1\r\nX-B: 2"}}, "header 'X-A' must be of printable"),
    ],
)
def test_bad_options_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        quiet("http://127.0.0.1:1", few(), **options)


def test_it_runs_inside_an_event_loop_as_in_a_notebook():
    async def cell() -> LoadReport:
        return quiet(server.url, few())

    with StubServer() as server:
        assert asyncio.run(cell()).outcomes == {"ok": 4}
        assert asyncio.run(run_load(server.url, few())).outcomes == {"ok": 4}

    async def failing_cell() -> LoadReport:
        return quiet("http://127.0.0.1:1", few())

    with pytest.raises(ServerNotUsable):
        asyncio.run(failing_cell())


def test_stopping_a_cell_stops_the_load(monkeypatch):
    joins = []

    class Stopped(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            joins.append(self)
            if len(joins) == 1:
                while not server.requests:
                    super().join(0.01)
                raise KeyboardInterrupt
            super().join(60)

    async def cell() -> None:
        with pytest.raises(KeyboardInterrupt):
            quiet(server.url, few())

    with StubServer(hang=True) as server, monkeypatch.context() as patched:
        patched.setattr(load_client.threading, "Thread", Stopped)
        asyncio.run(cell())
    assert len(joins) == 2 and not joins[0].is_alive()


def test_progress_is_told_of_each_request_and_shown_with_failures(capsys):
    told: list[RequestRecord] = []
    with StubServer(refuse=[429], first_token_s=0.3) as server:
        load(server.url, few(), on_progress=told.append)
    assert len(told) == 4
    shown = capsys.readouterr().err
    assert "4/4" in shown and "refused=1" in shown


# The HTTP client, against bytes


def reply_with(*replies: bytes) -> tuple[str, threading.Thread]:
    """A socket that answers one connection with these bytes, one reply for each request."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            for reply in replies:
                connection.recv(65536)
                connection.sendall(reply)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", thread


async def _get(url: str, times: int = 1) -> list[tuple[int, bytes]]:
    client = HttpClient(url)
    found = []
    for _ in range(times):
        async with client.request("GET", "/") as response:
            found.append((response.status, await response.read()))
    await client.close()
    return found


@pytest.mark.parametrize(
    ("reply", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"1;x=y\r\na\r\n2\r\nbc\r\n0\r\nT: 1\r\n\r\n",
            b"abc",
        ),
        (b"HTTP/1.0 200 OK\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200\r\ncontent-length: 0\r\n\r\n", b""),
    ],
)
def test_each_way_to_frame_a_body_is_read(reply, body):
    url, thread = reply_with(reply)
    assert asyncio.run(_get(url)) == [(200, body)]
    thread.join(10)


def test_a_connection_is_used_again():
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na"
    url, thread = reply_with(reply, reply)  # on one connection
    assert asyncio.run(_get(url, times=2)) == [(200, b"a")] * 2
    thread.join(10)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"", "ended with no reply"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "is not HTTP/1"),
        (b"hello", "ended with no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "in the middle of the reply"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -9\r\n\r\n", "HTTP has a number"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc", "in the middle"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "'zz.*has a number"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "in the middle"),
        (b"HTTP/1.1 OK\r\n\r\n", "'OK' stands where HTTP has a number"),
    ],
)
def test_a_reply_that_is_broken_is_an_error_and_does_not_hang(reply, words):
    url, thread = reply_with(reply)
    with pytest.raises(ConnectionError, match=words):
        asyncio.run(_get(url))
    thread.join(10)
