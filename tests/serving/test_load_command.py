"""`course load`: what it prints and writes, and how it says what is wrong."""

import io
import json
import re
import socket
from pathlib import Path

import matplotlib
import pytest
from rich.console import Console
from typer.testing import CliRunner

from course_lib.classroom.plots import plot_latency_over_time
from course_lib.cli import app
from course_lib.load import as_tables, notes, parse_classes, parse_headers, parse_lengths
from course_lib.serving.load_client import SLO, LoadReport, RequestRecord, TrafficClass, Workload
from tests.serving.stub_server import StubServer

runner = CliRunner()
FEW = ["--users", "2", "--requests", "6", "--prompt-tokens", "5", "--output-tokens", "3"]


@pytest.fixture(autouse=True)
def no_screen() -> None:
    matplotlib.use("agg")


def load(*options: str):
    return runner.invoke(app, ["load", *options], env={"COLUMNS": "120"})


def test_it_prints_latencies_rates_and_goodput_and_writes_json_and_a_picture(tmp_path):
    with StubServer() as server:
        result = load(
            "--url", server.url, *FEW, "--shared-prefix", "0.5",
            "--output", str(tmp_path / "new" / "report.json"),
            "--plot", str(tmp_path / "plots" / "latency.png"),
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "6 requests in" in result.output and "closed loop of 2 users" in result.output
    for label in ("TTFT", "TPOT", "ITL", "end to end"):
        (line,) = (line for line in result.output.splitlines() if line.startswith(label))
        assert len(re.findall(r"[\d,]+\.\d\b", line)) == 4, line
    assert "100.0% had TTFT up to 2 s and TPOT up to 0.2 s" in result.output
    assert "How requests ended" not in result.output and "Note" not in result.output
    saved = json.loads((tmp_path / "new" / "report.json").read_text())
    assert saved["summary"]["outcomes"] == {"ok": 6}
    assert saved["workload"]["shared_prefix"] == 0.5
    assert len(saved["records"]) == 6
    assert (tmp_path / "plots" / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_refusals_and_failures_are_shown_with_what_the_server_said():
    with StubServer(refuse=[429, 429], retry_after="0") as server:
        result = load("--url", server.url, *FEW)
    assert result.exit_code == 0, result.output
    assert re.search(r"refused +2 +the server had no room", result.output)
    assert "2 queue_full: the queue is full" in result.output


def test_it_fails_when_nothing_was_served_and_hints_at_fields_a_server_may_not_know():
    with StubServer(refuse=[400] * 6, refusal="unknown field: ignore_eos") as server:
        result = load("--url", server.url, *FEW)
    assert result.exit_code == 1
    assert re.search(r"http error +6", result.output)
    assert "the server does not take ignore_eos; --no-ignore-eos leaves it out" in result.output
    assert "--no-usage" not in result.output


def test_a_trace_is_replayed(tmp_path):
    trace = tmp_path / "day.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,3,900\n10,4,2\n")
    with StubServer() as server:
        result = load(
            "--url", server.url, "--trace", str(trace), "--trace-speed", "100",
            "--max-output-tokens", "5",
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "2 requests" in result.output and "arrivals of day.csv" in result.output
    assert sorted(r["max_tokens"] for r in server.requests) == [2, 5]


def test_classes_have_a_line_each():
    with StubServer() as server:
        result = load(
            "--url", server.url, "--rate", "1000", "--requests", "20", "--prompt-tokens", "2",
            "--output-tokens", "1:3", "--class", "paid,tenant=acme,priority=-1", "--class", "free",
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(r"^paid +\d+ ", result.output, re.M)
    assert re.search(r"^free +\d+ ", result.output, re.M)
    assert {r.get("priority") for r in server.requests} == {-1, None}


def test_the_key_comes_from_the_environment():
    with StubServer(api_key="secret") as server:
        environment = {"COURSE_API_KEY": "secret"}
        result = runner.invoke(app, ["load", "--url", server.url, *FEW], env=environment)
    assert result.exit_code == 0, result.output
    assert "secret" not in result.output


def test_an_unreachable_server_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    result = load("--url", url, *FEW)
    assert result.exit_code == 1
    assert f"cannot reach a server at {url}" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--users", "2", "--rate", "1"], "users and rate_per_s contradict"),
        (["--users", "0"], "users must be a whole number"),
        (["--rate", "-1"], "rate_per_s must be a number above 0"),
        (["--prompt-tokens", "many"], "--prompt-tokens must be like 128 or 64:512"),
        (["--output-tokens", "9:5"], "output_tokens[1] must be"),
        (["--shared-prefix", "2"], "shared_prefix must be"),
        (["--trace", "nothing.csv"], "cannot read the trace nothing.csv"),
        (["--class", "paid,colour=red"], "--class must be like"),
        (["--header", "novalue"], "--header must be like"),
        (["--api", "embeddings"], "unknown api 'embeddings'"),
        (["--slo-ttft", "0"], "ttft_s must be"),
        (["--url", "localhost:8000"], "url must be like http://"),
    ],
)
def test_bad_options_are_refused_by_name(options, words):
    result = load(*options)
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output


def test_options_are_read():
    assert parse_lengths("x", "7") == 7
    assert parse_lengths("x", "7:9") == (7, 9)
    assert parse_classes([]) == (TrafficClass(),)
    assert parse_classes(["a,share=0.5,tenant=t,priority=-2", "b,priority=3"]) == (
        TrafficClass("a", 0.5, "t", -2),
        TrafficClass("b", priority=3),
    )
    assert parse_headers(["A: 1", "B:x:y"]) == {"A": "1", "B": "x:y"}
    for text in ("a,share=x", "a,priority=high"):
        with pytest.raises(ValueError, match=f"share and priority of --class '{text}' must be"):
            parse_classes([text])


def report_of(records: list[RequestRecord], **changes) -> LoadReport:
    fields = {
        "url": "http://h:1", "model": "m", "api": "completions", "slo": SLO(0.5, 0.1),
        "workload": Workload(users=1, num_requests=9).describe(), "started_at": "",
        "duration_s": 10.0, "client_cpu_s": 0.1, "records": records, **changes,
    }  # fmt: skip
    return LoadReport(**fields)


def served(index: int = 0, start_s: float = 0.0, ttft_s: float = 0.1, **changes) -> RequestRecord:
    return RequestRecord(
        index, "default", asked_prompt_tokens=10, asked_output_tokens=2, start_s=start_s,
        chunk_times_s=[start_s + ttft_s, start_s + ttft_s + 0.05], end_s=start_s + ttft_s + 0.06,
        status=200, output_tokens=2, **{"prompt_tokens": 10, "counted_by_server": True, **changes},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (report_of([served()]), None),
        (report_of([served(counted_by_server=False)]), "chunks were counted"),
        (report_of([served(prompt_tokens=30)]), "3.00 tokens for each word"),
        (report_of([served()], client_cpu_s=9.5), "used 95% of a core"),
        (report_of([served(start_s=1.0, scheduled_s=0.5)]), "up to 0.50 s"),
    ],
)
def test_notes_say_what_makes_figures_doubtful(report, words):
    found = notes(report)
    assert (len(found) == 1 and words in found[0]) if words else found == []


def test_tables_of_a_run_without_a_reply_have_no_figures():
    failed = RequestRecord(0, "default", 1, 1, outcome="timeout", reason="timeout", message="late")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(as_tables(report_of([failed])))
    text = console.export_text()
    assert "--" in text and "timeout: late" in text and "1 request in" in text


def test_the_plot_shows_each_request_and_marks_those_without_a_latency():
    refused = RequestRecord(9, "default", 1, 1, start_s=3.0, outcome="refused", status=429)
    cut = RequestRecord(8, "default", 1, 1, start_s=4.0, outcome="cut", status=200)
    report = report_of([served(0), served(1, start_s=1.0, ttft_s=0.9), refused, cut])
    figure = plot_latency_over_time(report)
    ttft, e2e = figure.axes
    assert list(ttft.lines[0].get_xdata()) == [0.0, 1.0]
    assert list(ttft.lines[0].get_ydata()) == pytest.approx([0.1, 0.9])
    assert list(e2e.lines[0].get_ydata()) == pytest.approx([0.16, 0.96])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["refused (1)", "failed (1)"]
    assert [text.get_text().strip() for text in ttft.texts] == ["objective"]
    title = figure.get_suptitle()
    assert title == "m: 2 of 4 requests served, 25% within the SLO"
    assert ttft.get_ylabel() == e2e.get_ylabel() == "s"
    assert e2e.get_xlabel() == "time since the run began (s)"


def test_the_plot_of_refusals_alone_is_drawn_and_that_of_nothing_refused(tmp_path: Path):
    refused = RequestRecord(9, "default", 1, 1, start_s=3.0, outcome="refused", status=429)
    figure = plot_latency_over_time(report_of([refused]), title="Overload")
    figure.savefig(tmp_path / "plot.png")
    assert figure.get_suptitle().startswith("Overload: 0 of 1 requests served")
    with pytest.raises(ValueError, match="no requests"):
        plot_latency_over_time(report_of([]))
